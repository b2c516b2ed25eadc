"""Adapters: recipe values to PEFT, saving, loading, merging."""

from peftlab.adapters.full import load_trained, save_trained, train_all, trained_files
from peftlab.adapters.head import HeadLoss, head_input, head_reason
from peftlab.adapters.lora import (
    ADAPTER_FILES,
    AdapterReport,
    add_adapter,
    add_lora,
    brought_parameters,
    check_adapter_files,
    check_targets,
    load_adapter,
    planned_modules,
    report,
    save_adapter,
)

__all__ = [
    "ADAPTER_FILES",
    "AdapterReport",
    "HeadLoss",
    "add_adapter",
    "add_lora",
    "brought_parameters",
    "check_adapter_files",
    "check_targets",
    "head_input",
    "head_reason",
    "load_adapter",
    "load_trained",
    "planned_modules",
    "report",
    "save_adapter",
    "save_trained",
    "train_all",
    "trained_files",
]

"""Adapters: recipe values to PEFT, saving, loading, merging."""

from peftlab.adapters.lora import (
    ADAPTER_FILES,
    AdapterReport,
    add_lora,
    check_adapter_files,
    load_adapter,
    report,
    save_adapter,
)

__all__ = [
    "ADAPTER_FILES",
    "AdapterReport",
    "add_lora",
    "check_adapter_files",
    "load_adapter",
    "report",
    "save_adapter",
]

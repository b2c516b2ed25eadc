"""Adapters: recipe values to PEFT, saving, loading, merging."""

from peftlab.adapters.lora import AdapterReport, add_lora, check_adapter_files, load_adapter, report, save_adapter

__all__ = ["AdapterReport", "add_lora", "check_adapter_files", "load_adapter", "report", "save_adapter"]

"""Run folders: the results of a training or a distillation, and how to open them."""

from peftlab.runs.folder import (
    LOCK_NAME,
    RUN_NAME,
    Run,
    check_folder_is_free,
    choose_folder,
    newest_checkpoint,
    open_run,
    open_source,
)
from peftlab.runs.json_file import finite, write_json

__all__ = [
    "LOCK_NAME",
    "RUN_NAME",
    "Run",
    "check_folder_is_free",
    "choose_folder",
    "finite",
    "newest_checkpoint",
    "open_run",
    "open_source",
    "write_json",
]

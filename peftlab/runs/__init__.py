"""Run folders: the results of a training or a distillation, and how to open them."""

from peftlab.runs.folder import (
    LOCK_NAME,
    RUN_NAME,
    Run,
    check_folder_is_free,
    check_unfinished,
    checkpoint_to_resume,
    choose_folder,
    open_run,
    open_source,
)
from peftlab.runs.json_file import finite, write_json

__all__ = [
    "LOCK_NAME",
    "RUN_NAME",
    "Run",
    "check_folder_is_free",
    "check_unfinished",
    "checkpoint_to_resume",
    "choose_folder",
    "finite",
    "open_run",
    "open_source",
    "write_json",
]

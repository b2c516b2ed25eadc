"""Writes a model as a plain transformers folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from peftlab.models.load_errors import quiet


def save_plain(model: Any, tokenizer: Any, folder: Path, *, extra_file: Path | None = None) -> None:
    """Writes config, safetensors and tokenizer so that ``from_pretrained(folder)`` loads them; one rename publishes them.

    ``folder`` is overwritten. Args: extra_file: a file to copy into it.
    """
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with quiet():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        if extra_file is not None:
            shutil.copy(extra_file, partial / extra_file.name)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

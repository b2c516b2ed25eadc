"""Hard links in place of copies: a model may have gigabytes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def link_file(source: Path, target: Path) -> None:
    """Hard-links a file if the disk allows it, else copies it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def link_tree(source: Path, target: Path) -> None:
    """Links a file, or all files of a folder, in place of what is there."""
    if source.is_file():
        target.unlink(missing_ok=True)
        link_file(source, target)
        return
    shutil.rmtree(target, ignore_errors=True)
    for file in source.rglob("*"):  # not copytree, whose error hides a full disk
        if file.is_file():
            own = target / file.relative_to(source)
            own.parent.mkdir(parents=True, exist_ok=True)
            link_file(file, own)

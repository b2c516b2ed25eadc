"""The files of another commit, to measure next to those of this tree."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

from bench import ROOT


def unpacked(commit: str, folder: Path) -> Path:
    """``folder``, after writing all files of the commit to it."""
    done = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"git has no commit {commit} here: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder

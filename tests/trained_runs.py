"""Finished runs that tests read. Each is trained once in a session, by the first worker that asks for it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import peftlab
from peftlab.training.progress import SilentProgress


class TrainedRuns:
    """``trained(document, write)``: a folder with the files that ``write`` creates and the finished run ``run``.

    The folder is shared. A test that changes something copies it first; ``check`` finds one that does not.
    """

    def __init__(self, base: Path) -> None:
        self._base = base
        self._used: set[Path] = set()
        base.mkdir(exist_ok=True)

    def __call__(self, document: dict[str, Any], write: Callable[[Path], object]) -> Path:
        document = {**document, "run": {**document.get("run", {}), "dir": "run"}}
        drafts = self._base / f"draft-{os.getpid()}"
        drafts.mkdir()
        write(drafts)
        key = hashlib.sha256(json.dumps([document, contents(drafts)], sort_keys=True).encode()).hexdigest()[:16]
        folder, finished = self._base / key, self._base / f"{key}.json"
        with (self._base / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if finished.exists():
                shutil.rmtree(drafts)
            else:
                shutil.rmtree(folder, ignore_errors=True)  # left by a worker that was killed
                drafts.rename(folder)
                with pytest.MonkeyPatch.context() as patch:
                    patch.chdir(folder)
                    peftlab.train(document, progress=SilentProgress())
                finished.write_text(json.dumps(contents(folder)))
        self._used.add(folder)
        return folder

    def check(self) -> None:
        """Checks that the used runs have not changed."""
        for folder in sorted(self._used):
            known = json.loads((self._base / f"{folder.name}.json").read_text())
            now = contents(folder)
            changed = sorted(name for name in known.keys() | now.keys() if known.get(name) != now.get(name))
            assert not changed, f"a test has changed a shared run instead of a copy: {folder}: {changed}"


def contents(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

"""Hashes of weight files, which take seconds a gigabyte: computed once, as long as the files do not change."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from peftlab.paths import cache_root, sha256_of_files

_FILE = "file-hashes.json"
# Files that are read within a moment are not worth an entry.
_LEAST_BYTES = 2**26
_MOST_ENTRIES = 500


def weights_fingerprint(paths: list[Path]) -> str:
    """Hex sha256 over the contents of ``paths`` in the order given.

    Of large files it is kept in the cache folder, by path, size and time of change, so that a command does not read again
    what an earlier one has read.
    """
    states = [(str(p), found.st_size, found.st_mtime_ns) for p in paths for found in [p.stat()]]
    if sum(size for _, size, _ in states) < _LEAST_BYTES:
        return sha256_of_files(paths)
    key, known = json.dumps(states), _read()
    if key not in known:
        known[key] = sha256_of_files(paths)
        _write(known)
    return known[key]


def _read() -> dict[str, str]:
    try:
        known = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # not there, damaged, or no home folder
        return {}
    return {k: v for k, v in known.items() if isinstance(v, str)} if isinstance(known, dict) else {}


def _write(known: dict[str, str]) -> None:
    """By a rename; a cache that cannot be written is none."""
    kept = dict(list(known.items())[-_MOST_ENTRIES:])
    with contextlib.suppress(OSError, RuntimeError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(kept, indent=0), encoding="utf-8")
        os.replace(partial, path)


def _path() -> Path:
    return cache_root() / _FILE

"""Cached hashes of weight files: hashing takes seconds per gigabyte, so an unchanged file is hashed once."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from peftlab.paths import cache_root, sha256_of_files

_FILE = "file-hashes.json"
_MOST_ENTRIES = 500


def weights_fingerprint(paths: list[Path], *, cached_from: int = 2**26) -> str:
    """Hex sha256 over the contents of ``paths`` in the given order.

    For large files it is cached in the cache folder, by path, size and modification time, so that later commands do not
    read the files again.

    Args: cached_from: size in bytes of large files; smaller ones are hashed quickly.
    """
    states = [(str(p), stat.st_size, stat.st_mtime_ns) for p in paths for stat in [p.stat()]]
    if sum(size for _, size, _ in states) < cached_from:
        return sha256_of_files(paths)
    key, known = json.dumps(states), _read()
    if key not in known:
        known[key] = sha256_of_files(paths)
        _write(known)
    return known[key]


def _read() -> dict[str, str]:
    try:
        known = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # missing, damaged, or no home folder
        return {}
    return {k: v for k, v in known.items() if isinstance(v, str)} if isinstance(known, dict) else {}


def _write(known: dict[str, str]) -> None:
    """Writes the cache atomically; a cache that cannot be written is skipped."""
    kept = dict(list(known.items())[-_MOST_ENTRIES:])
    with contextlib.suppress(OSError, RuntimeError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(kept, indent=0), encoding="utf-8")
        os.replace(partial, path)


def _path() -> Path:
    return cache_root() / _FILE

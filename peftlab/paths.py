"""Paths on this machine: files inside installed packages, and the cache folder."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import os
from pathlib import Path

from peftlab.errors import PeftlabError

PACKAGE_PREFIX = "package:"


def cache_root() -> Path:
    """The folder for converted models: ``$PEFTLAB_CACHE``, else ``$XDG_CACHE_HOME/peftlab``, else ``~/.cache/peftlab``."""
    if own := os.environ.get("PEFTLAB_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "peftlab"


def kernel_plans_file() -> Path:
    """The file that ``peftlab bench tune-kernels`` writes by default and every run reads."""
    return cache_root() / "kernel-plans.json"


def existing_folder(path: Path) -> Path:
    """``path``, or the nearest folder around it that exists."""
    return next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())


def package_path(name: str, *, key: str, error: type[PeftlabError]) -> Path:
    """The file or folder that ``package:IMPORT_NAME/RELATIVE/PATH`` names, without importing the package.

    Raises: ``error`` if the form is wrong, the package is not installed, or it has no such file.
    """
    import_name, _, relative = name.removeprefix(PACKAGE_PREFIX).partition("/")
    if not import_name or not relative:
        raise error(f"expected package:IMPORT_NAME/RELATIVE/PATH, found {name!r}", key=key)
    try:
        spec = importlib.util.find_spec(import_name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise error(
            f"package {import_name!r} (from {name!r}) is not installed; install it with pip, or use a local path",
            key=key,
        )
    folders = list(spec.submodule_search_locations or [])
    for folder in folders:
        path = Path(folder) / relative
        if path.exists():
            return path
    raise error(f"package {import_name!r} is installed but has no {relative!r}{_nearest(folders, relative)}", key=key)


def _nearest(folders: list[str], relative: str) -> str:
    parent, wanted = Path(relative).parent, Path(relative).name
    names = [p.name for f in folders if (Path(f) / parent).is_dir() for p in (Path(f) / parent).iterdir()]
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    return f"; did you mean {(parent / near[0]).as_posix()!r}?" if near else ""


def sha256_of_files(paths: list[Path]) -> str:
    """Hex sha256 over the contents of ``paths`` in the given order. It is cached while path, size and modification time stay
    the same.
    """
    return _sha256(tuple((path, *_state(path)) for path in paths))


@functools.lru_cache(maxsize=256)
def _sha256(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _state(path: Path) -> tuple[int, int]:
    """Size, and modification time in ns."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns

"""Atomic writes, and the lock of a folder being written."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from peftlab.errors import ArtifactError, RecipeError

LOCK = ".lock"
REMEDY = "restore the file, or overwrite the cache with `peftlab teach --replace`"


def publish(path: Path, data: bytes) -> None:
    """Writes ``path`` atomically: a crash leaves the old file or the new one. Raises: OSError."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    rename(partial, path)


def rename(partial: Path, path: Path) -> None:
    """Renames a file that is on the disk, and waits until the new name is on the disk too."""
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_at(file: int, data: bytes, offset: int) -> None:
    """Writes all of ``data`` at ``offset``; a failed write can be repeated. Raises: OSError."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


def sha256(path: Path) -> str:
    """Hex digest of a file's contents."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def damaged(path: Path, how: str) -> ArtifactError:
    """The error for a damaged file of a cache."""
    return ArtifactError(f"teacher cache {path.parent} is damaged: {path.name} {how}; {REMEDY}")


def check_file(path: Path, *, num_bytes: int, digest: str | None = None) -> None:
    """Raises: ArtifactError unless ``path`` has the recorded length and, if given, the recorded sha256."""
    if not path.is_file():
        raise damaged(path, "is missing")
    if (size := path.stat().st_size) != num_bytes:
        raise damaged(path, f"has {size:,} bytes, expected {num_bytes:,}")
    if digest is not None and sha256(path) != digest:
        raise damaged(path, "does not have its recorded hash")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks ``folder`` against writes by other processes. The kernel releases the lock when the process ends in any way; the
    process id in the file is for the message.

    Raises: RecipeError if another process holds the lock.
    """
    path = folder / LOCK
    file = _lock(path)
    try:
        os.ftruncate(file, 0)
        write_at(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _lock(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(file, 32, 0).decode(errors="replace") or "unknown"
            os.close(file)
            raise RecipeError(
                f"process {owner} is already writing a cache to {path.parent}: wait for it to end, or choose another folder"
            ) from None
        # The holder may have removed the file between our open and our lock: others would then lock a new file.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file).st_ino:
                return file
        os.close(file)

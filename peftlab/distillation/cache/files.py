"""Files that are there whole or not at all, and the lock of a folder that is being written."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from peftlab.errors import ArtifactError, RecipeError

LOCK = ".lock"
REMEDY = "restore the file, or run `peftlab teach --replace` to write the cache anew"


def publish(path: Path, data: bytes) -> None:
    """Writes ``path`` so that a crash at any moment leaves the old file or the new one. Raises: OSError."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    rename(partial, path)


def rename(partial: Path, path: Path) -> None:
    """Gives a file that is on the disk its name, and waits until the name is there too."""
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_at(file: int, data: bytes, offset: int) -> None:
    """Writes all of ``data`` at ``offset``; a write that failed may simply be repeated. Raises: OSError."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


def sha256(path: Path) -> str:
    """Hex digest of a file's contents."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def damaged(path: Path, how: str) -> ArtifactError:
    """The error of a file of a cache that is not as it was written."""
    return ArtifactError(f"teacher cache {path.parent} is damaged: {path.name} {how}; {REMEDY}")


def check_file(path: Path, *, num_bytes: int, digest: str | None = None) -> None:
    """Raises: ArtifactError unless ``path`` has the length and, where given, the sha256 that were recorded."""
    if not path.is_file():
        raise damaged(path, "is missing")
    if (found := path.stat().st_size) != num_bytes:
        raise damaged(path, f"has {found:,} bytes, expected {num_bytes:,}")
    if digest is not None and sha256(path) != digest:
        raise damaged(path, "does not have its recorded hash")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it no other process writes ``folder``. The kernel holds the lock and ends it with the process, however that
    ends; the process id in the file is for the message.

    Raises: RecipeError when another process has it.
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
                f"expected {path.parent} free to write, found that process {owner} is writing the cache there: wait for it to "
                "end, or choose another folder"
            ) from None
        # Its holder may have removed the file between our open and our lock: then others lock another one.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file).st_ino:
                return file
        os.close(file)

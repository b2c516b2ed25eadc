"""A capture that is killed at any moment resumes to the bytes that it would have written."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peftlab.distillation.cache import CacheWriter, Fill, files, open_cache
from peftlab.distillation.cache.manifest import MANIFEST
from peftlab.distillation.cache.shards import ROW
from peftlab.errors import ArtifactError, RecipeError

FILL = Fill("mixed", k=3, draws=4, num_classes=20)
LENGTHS = {"train": [3, 1, 9, 2, 0, 5, 4], "eval": [2, 6]}
TARGETS = {
    name: [
        FILL.target(torch.randn(n, 20, generator=torch.Generator().manual_seed(i)), i) for i, n in enumerate(lengths)
    ]
    for name, lengths in LENGTHS.items()
}
HEAD = {"weight": torch.arange(12.0).reshape(3, 4)}


def capture(folder: Path) -> None:
    """Writes the cache as one call of a verb does: it resumes, or does nothing if the cache is complete."""
    if (folder / MANIFEST).exists():
        return
    with CacheWriter(folder, FILL, {"teacher": "a"}, shard_bytes=90) as writer:
        writer.save_tensors(HEAD)
        for name, targets in TARGETS.items():
            split = writer.split(name, len(targets))
            for i in range(split.done, len(targets)):
                split.add(1000 + i, targets[i])
        writer.finish({"accuracy": 0.5})


def contents(folder: Path) -> dict[str, bytes]:
    """All files except those that only a killed process leaves beside a complete cache."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("capture.json", ".lock")}


def forked(work: Callable[[], int]) -> int:
    """Exit status, or minus the signal, of ``work`` in a copy of this process."""
    if (pid := os.fork()) == 0:
        try:
            os._exit(work())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(event: int) -> list[int]:
    """Makes this process kill itself at the given change of a file, half way through a write. Returns the counter."""
    count = [0]

    def wrap(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == event:
                if name == "pwrite":
                    original(args[0], args[1][: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return wrapped

    for name in ("pwrite", "fsync", "replace", "ftruncate", "unlink", "open"):
        setattr(os, name, wrap(getattr(os, name), name))
    return count


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips fsync. A killed process loses nothing that the kernel has, and waiting takes most of the time of these tests."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    capture(folder)
    return contents(folder)


def test_cache_capture_has_several_shards(whole: dict[str, bytes]) -> None:
    assert {name for name in whole if name.endswith(".bin")} == {
        "train-00000.bin",
        "train-00001.bin",
        "train-00002.bin",
        "eval-00000.bin",
    }


@pytest.mark.parametrize("first", [1, 2, 3])
def test_cache_capture_killed_at_every_file_change_resumes(first: int, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Three parts take every third change each, because a fork is slow."""
    event, seen_partial = first, False
    while True:
        folder = tmp_path / str(event)

        def killed(event: int = event, folder: Path = folder) -> int:
            kill_at(event)
            capture(folder)
            return 0

        status = forked(killed)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        seen_partial |= any(path.suffix == ".partial" for path in folder.glob("*"))
        if not (folder / MANIFEST).exists():
            with pytest.raises(ArtifactError, match="run `peftlab teach`"):
                open_cache(folder)
        capture(folder)
        assert contents(folder) == whole, f"killed at change {event}"
        open_cache(folder, fill=FILL, identity={"teacher": "a"}).verify()
        event += 3
    assert event > 90 and seen_partial


def test_cache_capture_killed_repeatedly_resumes(whole: dict[str, bytes], tmp_path: Path) -> None:
    chosen = random.Random(0)
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        kills = 0
        while True:
            event = chosen.randint(10, 45)

            def killed(event: int = event, folder: Path = folder) -> int:
                kill_at(event)
                capture(folder)
                return 0

            if forked(killed) == 0:
                break
            kills += 1
        assert kills > 1 and contents(folder) == whole


def test_cache_writer_reuses_every_added_example(tmp_path: Path) -> None:
    """A new writer reuses all added examples, not only those of complete shards."""
    with CacheWriter(tmp_path, FILL, {}) as writer:
        split = writer.split("train", 7)
        for i in range(5):
            split.add(i, TARGETS["train"][i])
    with CacheWriter(tmp_path, FILL, {}) as writer:
        assert writer.split("train", 7).done == 5
    # The shard has its name but not yet its index.
    (tmp_path / "train-00000.bin.partial").rename(tmp_path / "train-00000.bin")
    with CacheWriter(tmp_path, FILL, {}) as writer:
        assert writer.split("train", 7).done == 5


def test_cache_writer_syncs_a_file_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    names, pwrite, replace = [], os.pwrite, os.replace

    def written(file: int, data: Any, offset: int) -> int:
        synced.discard(os.fstat(file).st_ino)
        return pwrite(file, data, offset)

    def renamed(source: Path, target: Path) -> None:
        assert os.stat(source).st_ino in synced, f"{source} is renamed before it is on the disk"
        names.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda file: synced.add(os.fstat(file).st_ino))
    monkeypatch.setattr(os, "pwrite", written)
    monkeypatch.setattr(os, "replace", renamed)
    capture(tmp_path)
    assert names[-1] == "manifest.json" and len(names) == 12
    assert tmp_path.stat().st_ino in synced, "the names too"


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda records, journal: (records[:-1], journal), 3),
        (lambda records, journal: (records, journal[:-1]), 4),
        (lambda records, journal: (records + b"torn", journal + b"torn"), 5),
        (lambda records, journal: (records, journal + bytes(ROW.itemsize)), 5),
        (lambda records, journal: (records[:20] + b"x" + records[21:], journal), 0),
        (lambda records, journal: (b"", journal), 0),
        (lambda records, journal: (records, b""), 0),
    ],
)
def test_cache_writer_keeps_consistent_records_after_a_power_loss(
    damage: Callable[[bytes, bytes], tuple[bytes, bytes]], left: int, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    def begun() -> CacheWriter:
        return CacheWriter(tmp_path, FILL, {"teacher": "a"}, shard_bytes=10**6)

    with begun() as writer:
        split = writer.split("train", 7)
        for i in range(5):
            split.add(1000 + i, TARGETS["train"][i])
    records, journal = tmp_path / "train-00000.bin.partial", tmp_path / "train-00000.journal"
    for path, data in zip((records, journal), damage(records.read_bytes(), journal.read_bytes()), strict=True):
        path.write_bytes(data)
    with begun() as writer:
        split = writer.split("train", 7)
        assert split.done == left
        assert journal.stat().st_size == left * ROW.itemsize, "rows that do not count are gone"
        for i in range(left, 7):
            split.add(1000 + i, TARGETS["train"][i])
        writer.finish()
    open_cache(tmp_path).split("train").read(range(7))
    assert (tmp_path / "train-00000.bin").read_bytes() == b"".join(whole[f"train-{i:05d}.bin"] for i in range(3)), (
        "the same records, cut elsewhere"
    )


def test_cache_writer_on_a_full_disk_keeps_what_is_stored(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """A limit on file size stands in for a full disk: the kernel also writes a part and refuses the rest."""

    def limited() -> int:
        begun = CacheWriter(tmp_path, FILL, {"teacher": "a"}, shard_bytes=90)
        with begun as writer:
            writer.save_tensors(HEAD)
            split = writer.split("train", 7)
            split.add(1000, TARGETS["train"][0])
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
            try:
                for i in range(1, 7):
                    split.add(1000 + i, TARGETS["train"][i])
            except OSError as error:
                return 7 if error.errno == errno.EFBIG else 8
        return 0

    assert forked(limited) == 7
    with pytest.raises(ArtifactError, match=r"found 2 of 7 examples of train; run `peftlab teach` again to resume"):
        open_cache(tmp_path)
    capture(tmp_path)
    assert contents(tmp_path) == whole


def test_cache_writer_refuses_a_second_writer(process: Any, tmp_path: Path) -> None:
    """A living process keeps the folder. After it is killed, the next process can take it."""
    program = """
import sys, time, torch
from pathlib import Path
from peftlab.distillation.cache import CacheWriter, Fill
fill = Fill("topk", k=2, num_classes=9)
with CacheWriter(Path(sys.argv[1]), fill, {}) as writer:
    split = writer.split("train", 50)
    for i in range(50):
        split.add(i, fill.target(torch.randn(4, 9, generator=torch.Generator().manual_seed(i)), i))
        if i == 20:
            print("twenty", flush=True)
            time.sleep(60)
"""
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    with process.start(["-c", program, tmp_path], env=environment) as other:
        other.wait_for(lambda: other.stdout == "twenty\n")
        fill = Fill("topk", k=2, num_classes=9)
        with (
            pytest.raises(
                RecipeError, match=f"process {other.pid} is already writing a cache to .*: wait for it to end"
            ),
            CacheWriter(tmp_path, fill, {}),
        ):
            pass
        other.send_signal(signal.SIGKILL)
        assert other.wait().returncode == -signal.SIGKILL
    with pytest.raises(ArtifactError, match="found 21 of 50 examples of train"):
        open_cache(tmp_path)
    with CacheWriter(tmp_path, fill, {}) as writer:
        split = writer.split("train", 50)
        assert split.done == 21
        with (
            pytest.raises(RecipeError, match=f"process {os.getpid()} is already writing"),
            CacheWriter(tmp_path, fill, {}),
        ):
            pass
        for i in range(21, 50):
            split.add(i, fill.target(torch.randn(4, 9, generator=torch.Generator().manual_seed(i)), i))
        writer.finish()
    open_cache(tmp_path).split("train").check_keys(np.arange(50, dtype=np.uint64))
    assert not (tmp_path / ".lock").exists()


def test_locked_retries_when_the_lock_file_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first writer ends between the open and the lock of the next one. A third writer would lock a new file."""
    flock = files.fcntl.flock
    calls: list[int] = []

    def late(file: int, operation: int) -> None:
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        flock(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with files.locked(tmp_path):
        assert len(calls) == 2
        with pytest.raises(RecipeError, match="is already writing a cache to"), files.locked(tmp_path):
            pass

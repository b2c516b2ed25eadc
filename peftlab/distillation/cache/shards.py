"""Shards: records of successive examples in one file, with their index in another.

train-00000.bin            records, concatenated
train-00000.index          safetensors: per example key, bytes, positions and crc32; sha256 and bytes of the shard
train-00001.bin.partial    the shard being written, and
train-00001.journal        its index so far, a row per example

A shard is complete once its index exists, which is written last. After a kill, the shard being written is kept up to the
first record with a wrong crc32, so that little is repeated, and every shard gets the same bytes as without the kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from peftlab.distillation.cache.files import check_file, damaged, publish, rename, write_at

ROW = np.dtype([("key", "<u8"), ("bytes", "<u4"), ("positions", "<u4"), ("crc", "<u4")])


def checksum(record: bytes, key: int, num_positions: int) -> int:
    """crc32 of an example's key, its number of positions and its record. It is not 0 for a row of zeros, which a power
    failure may leave behind."""
    return zlib.crc32(record, zlib.crc32(struct.pack("<QI", key, num_positions)))


@dataclass(frozen=True)
class Shard:
    """A complete shard. rows: [examples] of ``ROW``. num_bytes: size of the records."""

    path: Path
    rows: NDArray[np.void]
    num_bytes: int
    sha256: str

    @property
    def index(self) -> Path:
        return self.path.with_suffix(".index")

    @property
    def num_positions(self) -> int:
        return int(self.rows["positions"].sum(dtype=np.int64))


def shard_path(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.bin"


def complete_shards(folder: Path, split: str) -> list[Shard]:
    """The complete shards of ``split`` in order, up to the first incomplete one. Raises: ArtifactError for a damaged one."""
    shards: list[Shard] = []
    while (path := shard_path(folder, split, len(shards))).with_suffix(".index").is_file():
        shards.append(read_shard(path))
        check_file(path, num_bytes=shards[-1].num_bytes)
    return shards


def read_shard(path: Path) -> Shard:
    """The shard with the records ``path``; only its index is read. Raises: ArtifactError."""
    index = path.with_suffix(".index")
    try:
        with safe_open(index, framework="numpy") as tensors:
            about = json.loads(tensors.metadata()["shard"])
            columns = {name: tensors.get_tensor(name) for name in ROW.names or ()}
        rows = np.empty(len(columns["key"]), dtype=ROW)
        for name, column in columns.items():
            rows[name] = column
        shard = Shard(path, rows, int(about["bytes"]), str(about["sha256"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise damaged(index, f"cannot be read ({error})") from error
    if int(rows["bytes"].sum(dtype=np.int64)) != shard.num_bytes:
        raise damaged(index, "does not match the size of its shard")
    return shard


class OpenShard:
    """The shard being written. It resumes from the data of an earlier process. Raises: OSError."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_name(f"{path.name}.partial")
        self._journal = path.with_suffix(".journal")
        if path.exists():  # published without its index: the process was killed between the two
            os.replace(path, self._partial)
        self._records = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o644)
        self._index = os.open(self._journal, os.O_RDWR | os.O_CREAT, 0o644)
        self._digest = hashlib.sha256()
        self._rows: list[tuple[int, int, int, int]] = []
        self.num_bytes = 0
        self._recover()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_positions(self) -> int:
        return sum(row[2] for row in self._rows)

    def add(self, record: bytes, *, key: int, num_positions: int) -> None:
        row = (key, len(record), num_positions, checksum(record, key, num_positions))
        write_at(self._records, record, self.num_bytes)
        write_at(self._index, np.array([row], dtype=ROW).tobytes(), len(self._rows) * ROW.itemsize)
        self._took(record, row)

    def publish(self) -> Shard:
        """The complete shard; this one is closed."""
        os.ftruncate(self._records, self.num_bytes)
        os.fsync(self._records)
        rename(self._partial, self._path)
        shard = Shard(self._path, np.array(self._rows, dtype=ROW), self.num_bytes, self._digest.hexdigest())
        about = json.dumps({"bytes": shard.num_bytes, "sha256": shard.sha256})
        columns = {name: np.ascontiguousarray(shard.rows[name]) for name in ROW.names or ()}
        publish(shard.index, save(columns, metadata={"shard": about}))
        self.close()
        self._journal.unlink()
        return shard

    def close(self) -> None:
        os.close(self._records)
        os.close(self._index)

    def _recover(self) -> None:
        """Recovers the records that match their row in the journal; later data is overwritten."""
        journal = self._journal.read_bytes()
        rows = np.frombuffer(journal[: len(journal) // ROW.itemsize * ROW.itemsize], dtype=ROW)
        for row in rows.tolist():
            record = os.pread(self._records, row[1], self.num_bytes)
            if len(record) != row[1] or checksum(record, row[0], row[2]) != row[3]:
                break
            self._took(record, row)
        os.ftruncate(self._records, self.num_bytes)
        os.ftruncate(self._index, len(self._rows) * ROW.itemsize)

    def _took(self, record: bytes, row: tuple[int, int, int, int]) -> None:
        self._digest.update(record)
        self._rows.append(row)
        self.num_bytes += len(record)

"""Reads a cache: checks it when opening, then reads any examples in any order through memory maps."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from peftlab.distillation.cache import manifest
from peftlab.distillation.cache.files import check_file, damaged
from peftlab.distillation.cache.fill import Fill
from peftlab.distillation.cache.identity import Identity, differences, unfit
from peftlab.distillation.cache.records import Classes, decode, join
from peftlab.distillation.cache.shards import ROW, Shard, checksum, read_shard, shard_path
from peftlab.distillation.targets import SparseTarget
from peftlab.errors import ArtifactError

# Hashing takes about a second per GiB. A larger cache is opened without it: every record has its own checksum.
_HASHED_BYTES = 4 * 2**30
# A map holds a file descriptor; a process may have 1,024.
_OPEN_MAPS = 256


class CachedSplit:
    """The examples of one split, numbered in the order of the capture."""

    def __init__(self, name: str, fill: Fill, shards: list[Shard]) -> None:
        self.name, self.fill = name, fill
        self._shards = shards
        self._rows = np.concatenate([shard.rows for shard in shards]) if shards else np.empty(0, dtype=ROW)
        self._first = np.cumsum([0, *(len(shard.rows) for shard in shards)])
        sizes = [shard.rows["bytes"].astype(np.int64) for shard in shards]
        self._offsets = np.concatenate([np.cumsum(size) - size for size in sizes]) if sizes else np.empty(0, np.int64)
        self._map = functools.lru_cache(maxsize=_OPEN_MAPS)(self._open_map)

    def __len__(self) -> int:
        return len(self._rows)

    def num_positions(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """[n] number of positions of each example."""
        return self._rows["positions"][np.asarray(indices, dtype=np.int64)].astype(np.int64)

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> SparseTarget | Tensor:
        """The targets of the examples' positions, concatenated in the order of ``indices``.

        Returns: a SparseTarget, with tail bucket for topk, else none; for hidden a tensor [N, H], bfloat16 if stored so,
        else float32. On the CPU.
        Raises: ArtifactError for a damaged record, IndexError for a missing example.
        """
        decoded = [self._decoded(int(i)) for i in indices]
        hidden = [part for part in decoded if isinstance(part, Tensor)]
        if self.fill.kind != "hidden":
            return join([part for part in decoded if isinstance(part, Classes)], self.fill)
        dtype = torch.bfloat16 if self.fill.hidden == "bfloat16" else torch.float32
        return torch.cat(hidden) if hidden else torch.empty(0, self.fill.hidden_size or 0, dtype=dtype)

    def check_keys(self, keys: NDArray[np.uint64]) -> None:
        """Raises: ArtifactError unless ``keys``, ``example_key`` of each example, equal those of the capture, in order."""
        own = self._rows["key"]
        if len(keys) != len(own):
            raise ArtifactError(
                f"the teacher cache has {len(own):,} examples of {self.name}, the data has {len(keys):,}: it was made for "
                "other data; run `peftlab teach --replace`"
            )
        differ = np.flatnonzero(own != keys)
        if not len(differ):
            return
        reason = (
            "they are in another order"
            if np.array_equal(np.sort(own), np.sort(keys))
            else "the data, the template, the tokenizer or max_length has changed"
        )
        raise ArtifactError(
            f"the teacher cache was made for other examples: {len(differ):,} of {len(own):,} of {self.name} differ, the first "
            f"is example {differ[0]}; {reason}. Run `peftlab teach --replace`, or use the data as it was"
        )

    def _decoded(self, example: int) -> Classes | Tensor:
        if not 0 <= example < len(self):
            raise IndexError(f"expected an example from 0 to {len(self) - 1} of {self.name}, found {example}")
        row, start = self._rows[example], int(self._offsets[example])
        number = int(np.searchsorted(self._first, example, side="right")) - 1
        num_positions, size = int(row["positions"]), int(row["bytes"])
        record = self._map(number)[start : start + size] if size else b""
        if checksum(record, int(row["key"]), num_positions) != int(row["crc"]):
            raise damaged(
                self._shards[number].path, f"does not have the recorded checksum at example {example} of {self.name}"
            )
        return decode(record, num_positions, self.fill)

    def _open_map(self, number: int) -> mmap.mmap:
        with self._shards[number].path.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


class TeacherCache:
    """A complete cache. ``open_cache`` makes it.

    Attributes: fill: how the targets are stored. manifest: all of ``manifest.json``. extra: the caller's values from
    ``CacheWriter.finish``.
    """

    def __init__(self, folder: Path, document: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, document
        self.fill = Fill(**document["fill"])
        self.extra: dict[str, Any] = document["extra"]
        self._splits = {
            name: CachedSplit(name, self.fill, [read_shard(folder / entry["file"]) for entry in split["shards"]])
            for name, split in document["splits"].items()
        }

    @property
    def names(self) -> list[str]:
        """The splits in the cache: train, eval or both."""
        return list(self._splits)

    def split(self, name: str) -> CachedSplit:
        """The split ``name``. Raises: ArtifactError if the capture had no such split."""
        if name not in self._splits:
            raise ArtifactError(
                f"expected {name} in the teacher cache {self.folder}, found {', '.join(self._splits) or 'nothing'}: run "
                f"`peftlab teach` with data for {name}"
            )
        return self._splits[name]

    def head_tensors(self) -> dict[str, Tensor]:
        """The tensors from ``CacheWriter.save_tensors``. Raises: ArtifactError if there are none, or the file is damaged."""
        if self.manifest["tensors"] is None:
            raise ArtifactError(
                f"expected the teacher's head in the cache {self.folder}, found none; run `peftlab teach --replace`"
            )
        self._check_tensors()
        return load_file(self.folder / manifest.TENSORS)

    def verify(self) -> None:
        """Compares every file with its recorded hash. Raises: ArtifactError with the first that differs."""
        for entry in _shards(self.manifest):
            _check_shard(self.folder, entry, hashed=True)
        if self.manifest["tensors"] is not None:
            self._check_tensors()

    def _check_tensors(self) -> None:
        entry = self.manifest["tensors"]
        check_file(self.folder / entry["file"], num_bytes=entry["bytes"], digest=entry["sha256"])


def open_cache(
    folder: Path,
    *,
    identity: Identity | None = None,
    fill: Fill | None = None,
    reasons: Mapping[str, str] | None = None,
) -> TeacherCache:
    """The cache in ``folder``, with its files checked: sizes always, hashes below 4 GiB.

    Args: identity, fill: what it must have been made for; None: anything. reasons: the meaning of a difference in a key of
    the identity, such as {"data": "made for other data"}.
    Raises: ArtifactError if the cache is missing, incomplete, damaged, or made for something else.
    """
    document = manifest.read(folder / manifest.MANIFEST)
    if document is None:
        raise ArtifactError(_absence(folder))
    try:
        mismatches = differences(document["fill"], fill.settings()) if fill else []
        mismatches += differences(document["identity"], identity, reasons) if identity is not None else []
        if mismatches:
            raise unfit(f"the teacher cache {folder} does not match", mismatches)
        hashed = sum(split["bytes"] for split in document["splits"].values()) < _HASHED_BYTES
        for entry in _shards(document):
            _check_shard(folder, entry, hashed=hashed)
        if (entry := document["tensors"]) is not None:
            check_file(folder / entry["file"], num_bytes=entry["bytes"])
        return TeacherCache(folder, document)
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(folder / manifest.MANIFEST, f"has invalid contents ({error!r})") from error


def _shards(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [entry for split in document["splits"].values() for entry in split["shards"]]


def _check_shard(folder: Path, entry: Mapping[str, Any], *, hashed: bool) -> None:
    """Checks the files of a shard; the index is small and always hashed. Raises: ArtifactError."""
    check_file(folder / entry["file"], num_bytes=entry["bytes"], digest=entry["sha256"] if hashed else None)
    check_file(folder / entry["index"], num_bytes=entry["index_bytes"], digest=entry["index_sha256"])


def _absence(folder: Path) -> str:
    """Why ``folder`` has no complete cache."""
    begun = manifest.read(folder / manifest.CAPTURE)
    if begun is None:
        return f"expected a teacher cache in {folder}, found none; run `peftlab teach` first"
    stored = [f"{_num_stored(folder, name):,} of {n:,} examples of {name}" for name, n in begun["splits"].items()]
    return (
        f"expected a complete teacher cache in {folder}, found {' and '.join(stored) or 'no example'}; run `peftlab teach` "
        "again to resume"
    )


def _num_stored(folder: Path, split: str) -> int:
    """The number of examples in an unfinished cache: in complete shards, and in the journal of the next."""
    stored, number = 0, 0
    while (path := shard_path(folder, split, number)).with_suffix(".index").is_file():
        stored, number = stored + len(read_shard(path).rows), number + 1
    journal = path.with_suffix(".journal")
    return stored + (journal.stat().st_size // ROW.itemsize if journal.is_file() else 0)

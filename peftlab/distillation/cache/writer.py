"""Writes a cache, example by example in order; it can be killed and resumed at any moment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from peftlab.distillation.cache import manifest
from peftlab.distillation.cache.files import damaged, locked, rename
from peftlab.distillation.cache.fill import Fill
from peftlab.distillation.cache.identity import Identity, differences, unfit
from peftlab.distillation.cache.records import encode
from peftlab.distillation.cache.shards import OpenShard, Shard, complete_shards, shard_path
from peftlab.distillation.targets import SparseTarget
from peftlab.errors import ArtifactError, RecipeError

SHARD_BYTES = 256 * 2**20


def check_begun(
    folder: Path,
    fill_like: Callable[[Mapping[str, Any]], Fill],
    identity: Identity,
    reasons: Mapping[str, str] | None = None,
) -> dict[str, Any] | None:
    """The description of an unfinished capture in ``folder``; None if there is none.

    Args: fill_like: how a capture with these settings would be stored now. Others: as in ``open_cache``.
    Raises: ArtifactError if it is damaged, or made for something else.
    """
    begun = manifest.read(folder / manifest.CAPTURE)
    if begun is None:
        return None
    try:
        mismatches = differences(begun["fill"], fill_like(begun["fill"]).settings())
        mismatches += differences(begun["identity"], identity, reasons)
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(folder / manifest.CAPTURE, f"has invalid contents ({error!r})") from error
    if mismatches:
        raise unfit(f"the unfinished teacher cache in {folder} does not match", mismatches)
    return begun


class SplitWriter:
    """One split of a cache: ``done`` examples are stored, ``add`` stores the next."""

    def __init__(self, folder: Path, name: str, fill: Fill, *, num_examples: int, shard_bytes: int) -> None:
        self.name, self.num_examples = name, num_examples
        self._folder, self._fill, self._shard_bytes = folder, fill, shard_bytes
        self.shards: list[Shard] = complete_shards(folder, name)
        self._in_shards = sum(len(shard.rows) for shard in self.shards)
        for shard in self.shards:
            shard.path.with_suffix(".journal").unlink(missing_ok=True)
        self._open: OpenShard | None = None
        if self._in_shards < num_examples:
            self._open = OpenShard(shard_path(folder, name, len(self.shards)))
            self._publish_if_due()

    @property
    def done(self) -> int:
        """The number of stored examples, and the number of the next one for ``add``."""
        return self._in_shards + (0 if self._open is None else len(self._open))

    def add(self, key: int, target: SparseTarget | Tensor) -> None:
        """Stores the next example.

        Args: key: its ``example_key``. target: from ``fill.target``, with any number of positions.
        Raises: VerificationError for non-finite values, ValueError for one example too many, OSError if the disk is full:
        the next writer resumes from the stored examples.
        """
        if self.done >= self.num_examples:
            raise ValueError(f"expected {self.num_examples} examples of {self.name}, found one more")
        record = encode(target, self._fill, where=f"example {self.done} of {self.name}")
        if self._open is None:
            self._open = OpenShard(shard_path(self._folder, self.name, len(self.shards)))
        self._open.add(record, key=key, num_positions=len(target))
        self._publish_if_due()

    def close(self) -> None:
        """Leaves the open shard for a writer that resumes."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _publish_if_due(self) -> None:
        if self._open is None:
            return
        if self._open.num_bytes >= self._shard_bytes or self.done == self.num_examples:
            self.shards.append(self._open.publish())
            self._open, self._in_shards = None, self._in_shards + len(self.shards[-1].rows)


class CacheWriter:
    """A context that writes a cache into ``folder``; if it is left early, the next writer resumes there.

    Args:
        identity: what the targets depend on besides the fill: teacher, tokenizer, template, data. An unfinished cache with
            another identity is refused. shard_bytes: a shard ends with the record that reaches this size.
        replace: remove an existing cache first, complete or not.
        reasons: see ``differences``.
    Raises, on entering: RecipeError if a complete cache exists and ``replace`` is False, or another process is writing it;
    ArtifactError if an unfinished one has another fill or identity, or is damaged; OSError.
    """

    def __init__(
        self,
        folder: Path,
        fill: Fill,
        identity: Identity,
        *,
        replace: bool = False,
        shard_bytes: int = SHARD_BYTES,
        reasons: Mapping[str, str] | None = None,
    ) -> None:
        assert shard_bytes > 0
        self.folder, self.fill, self.identity = folder, fill, dict(identity)
        self._replace, self._shard_bytes, self._reasons = replace, shard_bytes, reasons
        self._splits: dict[str, SplitWriter] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> CacheWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._stack:
            self._stack.enter_context(locked(self.folder))
            self._begin()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split in self._splits.values():
            split.close()
        self._stack.close()

    def split(self, name: str, num_examples: int) -> SplitWriter:
        """The writer of ``name``, train or eval. Raises: ArtifactError if it was begun with another number of examples."""
        assert name in manifest.SPLITS and name not in self._splits
        planned: dict[str, int] = self._capture["splits"]
        if planned.setdefault(name, num_examples) != num_examples:
            raise ArtifactError(
                f"teacher cache {self.folder} was begun for {planned[name]:,} examples of {name}, found {num_examples:,}: the "
                "data has changed; choose another folder, or overwrite this cache"
            )
        manifest.write(self.folder / manifest.CAPTURE, self._capture)
        self._splits[name] = SplitWriter(
            self.folder, name, self.fill, num_examples=num_examples, shard_bytes=self._shard_bytes
        )
        return self._splits[name]

    def save_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Stores ``tensors``, such as the teacher's head for hidden states; they replace earlier ones."""
        path = self.folder / manifest.TENSORS
        partial = path.with_name(f"{path.name}.partial")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        rename(partial, path)

    def finish(self, extra: Mapping[str, Any] | None = None) -> None:
        """Completes the cache. Args: extra: JSON values of the caller, such as the teacher's metrics.

        Raises: ValueError if examples are missing, OSError.
        """
        for name, split in self._splits.items():
            if split.done != split.num_examples:
                raise ValueError(f"expected {split.num_examples} examples of {name}, found {split.done}")
        if missing := sorted(set(self._capture["splits"]) - set(self._splits)):
            raise ValueError(f"expected all splits to be finished, {', '.join(missing)} is not")
        splits = {name: manifest.describe_split(s.num_examples, s.shards) for name, s in self._splits.items()}
        document = manifest.describe(self.folder, self.fill, self.identity, splits, extra or {})
        manifest.write(self.folder / manifest.MANIFEST, document)
        (self.folder / manifest.CAPTURE).unlink()

    def _begin(self) -> None:
        if self._replace:
            self._clear()
        elif manifest.read(self.folder / manifest.MANIFEST) is not None:
            raise RecipeError(
                f"expected a folder without a teacher cache, found a complete one in {self.folder}: reuse it, choose another "
                "folder, or overwrite it"
            )
        begun = check_begun(self.folder, lambda _: self.fill, self.identity, self._reasons)
        if begun is None:
            self._clear()  # shards without a capture are left from a killed replacement
            begun = {"fill": self.fill.settings(), "identity": self.identity, "splits": {}}
        self._capture = {key: begun[key] for key in ("fill", "identity", "splits")}

    def _clear(self) -> None:
        """Removes a cache, complete or not, and nothing else. The manifest goes first, which invalidates the cache.

        Raises: ArtifactError if the manifest belongs to something else, such as a checkpoint.
        """
        manifest.refuse_another(self.folder / manifest.MANIFEST)
        for name in (manifest.MANIFEST, manifest.CAPTURE):
            (self.folder / name).unlink(missing_ok=True)
        for path in list(self.folder.iterdir()):
            if manifest.OWN.fullmatch(path.name):
                path.unlink()

"""What a cache refuses, and its error messages."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from peftlab.distillation.cache import CacheWriter, Fill, example_key, open_cache, reader
from peftlab.errors import ArtifactError, RecipeError

FILL = Fill("topk", k=3, num_classes=20)
IDENTITY = {"teacher": "a", "data": "d1", "max_length": 64, "template": None}
KEYS = np.array([11, 12, 13, 14, 15, 2**64 - 1], dtype=np.uint64)


def write(folder: Path, *, fill: Fill = FILL, upto: int = 6, replace: bool = False) -> None:
    with CacheWriter(folder, fill, IDENTITY, shard_bytes=100, replace=replace) as writer:
        train, evaluated = writer.split("train", 6), writer.split("eval", 1)
        for i in range(train.done, upto):
            train.add(int(KEYS[i]), fill.target(torch.randn(4, 20, generator=torch.Generator().manual_seed(i)), i))
        if upto == 6:
            evaluated.add(5, fill.target(torch.zeros(2, 20), 0))
            writer.save_tensors({"weight": torch.ones(3, 4)})
            writer.finish({"accuracy": 0.75})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write(tmp_path / "cache")
    return tmp_path / "cache"


def test_open_cache_opens_a_complete_cache(cache: Path) -> None:
    reopened = open_cache(cache, identity=dict(reversed(IDENTITY.items())), fill=FILL)
    assert reopened.fill == FILL and reopened.extra == {"accuracy": 0.75} and reopened.names == ["train", "eval"]
    assert reopened.manifest["identity"] == IDENTITY
    assert set(reopened.manifest["versions"]) == {"peftlab", "python", "torch", "numpy", "safetensors"}
    assert (len(reopened.split("train")), len(reopened.split("eval"))) == (6, 1)
    assert torch.equal(reopened.head_tensors()["weight"], torch.ones(3, 4))
    assert open_cache(cache).fill == FILL
    reopened.verify()
    assert {p.name for p in cache.iterdir()} == {
        "manifest.json",
        "tensors.safetensors",
        *(f"{name}.{kind}" for name in ("train-00000", "train-00001", "eval-00000") for kind in ("bin", "index")),
    }


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-00001.bin", lambda d: changed(d, 30), "train-00001.bin does not have its recorded hash"),
        ("train-00001.bin", lambda d: d[:-5], r"train-00001.bin has \d+ bytes, expected \d+"),
        ("train-00000.bin", lambda d: None, "train-00000.bin is missing"),
        ("train-00000.index", lambda d: changed(d, len(d) - 3), "train-00000.index does not have its recorded hash"),
        ("eval-00000.index", lambda d: None, "eval-00000.index is missing"),
        ("tensors.safetensors", lambda d: None, "tensors.safetensors is missing"),
        ("manifest.json", lambda d: d[:50], "manifest.json cannot be read"),
        (
            "manifest.json",
            lambda d: d.replace(b'"splits"', b'"slits"'),
            "manifest.json has invalid contents",
        ),
    ],
)
def test_open_cache_refuses_damage(
    name: str, damage: Callable[[bytes], bytes | None], message: str, cache: Path
) -> None:
    left = damage((cache / name).read_bytes())
    (cache / name).unlink() if left is None else (cache / name).write_bytes(left)
    with pytest.raises(
        ArtifactError,
        match=f"cache is damaged: {message}.*restore the file, or overwrite the cache with `peftlab teach --replace`",
    ):
        open_cache(cache, fill=FILL, identity=IDENTITY)


def test_cache_read_of_a_large_cache_refuses_damage(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_HASHED_BYTES", 100)
    shard = cache / "train-00001.bin"
    shard.write_bytes(changed(shard.read_bytes(), 30))
    reopened = open_cache(cache)
    reopened.split("train").read([0, 1, 2])
    with pytest.raises(
        ArtifactError, match=r"train-00001.bin does not have the recorded checksum at example \d of train"
    ):
        reopened.split("train").read(range(6))
    with pytest.raises(ArtifactError, match=r"train-00001.bin does not have its recorded hash"):
        reopened.verify()


def test_head_tensors_refuses_a_damaged_head(cache: Path) -> None:
    path = cache / "tensors.safetensors"
    path.write_bytes(changed(path.read_bytes(), len(path.read_bytes()) - 1))
    with pytest.raises(ArtifactError, match=r"tensors.safetensors does not have its recorded hash"):
        open_cache(cache).head_tensors()


def test_open_cache_refuses_a_shard_of_another_cache(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write(other, fill=Fill("topk", k=3, num_classes=20, temperature=2.0))
    for kind in ("bin", "index"):
        shutil.copy(other / f"train-00000.{kind}", cache)
    with pytest.raises(ArtifactError, match=r"train-00000.bin does not have its recorded hash"):
        open_cache(cache)


def test_open_cache_refuses_a_missing_or_incomplete_cache(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected a teacher cache in .*, found none; run `peftlab teach` first"):
        open_cache(tmp_path / "nowhere")
    write(tmp_path, upto=5)
    assert (tmp_path / "train-00000.index").exists() and (tmp_path / "train-00001.journal").exists()
    message = "found 5 of 6 examples of train and 0 of 1 examples of eval; run `peftlab teach` again to resume"
    with pytest.raises(ArtifactError, match=message):
        open_cache(tmp_path)
    with CacheWriter(tmp_path, FILL, IDENTITY) as writer:
        writer.split("train", 6)
        with pytest.raises(ValueError, match="expected 6 examples of train, found 5"):
            writer.finish()


def test_open_cache_names_each_key_of_another_identity(cache: Path) -> None:
    other = {**IDENTITY, "data": "d2", "max_length": 128, "revision": "main"}
    del other["template"]
    with pytest.raises(ArtifactError) as error:
        open_cache(cache, identity=other, reasons={"data": "made for other data"})
    assert (
        f"the teacher cache {cache} does not match: made for other data: data is 'd1' in the cache, 'd2' here; "
        "made with another max length: max_length is 64 in the cache, 128 here; "
        "made with another revision: revision is nothing in the cache, 'main' here; "
        "made with another template: template is None in the cache, nothing here. Restore what it was made with"
    ) in str(error.value)


def test_open_cache_refuses_another_fill(cache: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"made with another k: k is 3 in the cache, 4 here. Restore what it was made with"
    ):
        open_cache(cache, fill=Fill("topk", k=4, num_classes=20))
    with pytest.raises(ArtifactError, match="made with another kind: kind is 'topk' in the cache, 'sampled' here; "):
        open_cache(cache, fill=Fill("sampled", draws=4, num_classes=20))


def test_check_keys_refuses_other_examples(cache: Path) -> None:
    train = open_cache(cache).split("train")
    train.check_keys(KEYS)
    with pytest.raises(ArtifactError, match="has 6 examples of train, the data has 5: it was made for other data"):
        train.check_keys(KEYS[:5])
    other = KEYS.copy()
    other[[2, 4]] += np.uint64(100)
    with pytest.raises(ArtifactError, match="2 of 6 of train differ, the first is example 2; the data, the template"):
        train.check_keys(other)
    with pytest.raises(
        ArtifactError, match="6 of 6 of train differ, the first is example 0; they are in another order"
    ):
        train.check_keys(KEYS[::-1])


def test_example_key_depends_on_ids_and_mask() -> None:
    ids, trained = np.array([1, 2, 3]), np.array([False, True, True])
    keys = {
        example_key(ids),
        example_key(ids, trained),
        example_key(ids, ~trained),
        example_key(ids[:2]),
        example_key(ids[::-1]),
    }
    assert len(keys) == 5 and all(0 <= key < 2**64 for key in keys)
    assert example_key(ids) == example_key(ids.astype(np.int32)), "whatever the type"
    assert example_key(ids) == 8990308797230768126, "fixed: caches of an earlier version stay valid"


def test_cache_writer_refuses_to_spoil_a_folder(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"found a complete one in .*: reuse it, choose another folder, or overwrite"):
        write(cache)
    begun = tmp_path / "begun"
    write(begun, upto=3)
    with (
        pytest.raises(
            ArtifactError,
            match=r"the unfinished teacher cache in .* does not match: made with another k: k is 3 in the cache, 4 here. Restore",
        ),
        CacheWriter(begun, Fill("topk", k=4, num_classes=20), IDENTITY),
    ):
        pass
    with (
        pytest.raises(
            ArtifactError, match=r"does not match: other data: data is 'd1' in the cache, 'd2' here. Restore"
        ),
        CacheWriter(begun, FILL, {**IDENTITY, "data": "d2"}, reasons={"data": "other data"}),
    ):
        pass
    with CacheWriter(begun, FILL, IDENTITY) as writer:
        assert writer.split("train", 6).done == 3
        with pytest.raises(ArtifactError, match="begun for 1 examples of eval, found 2: the data has changed"):
            writer.split("eval", 2)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text(json.dumps({"adapter.safetensors": "00"}))
    for replace in (False, True):
        with pytest.raises(ArtifactError, match="does not belong to a teacher cache; choose another folder"):
            write(checkpoint, replace=replace)
    assert os.listdir(checkpoint) == ["manifest.json"]


@pytest.mark.parametrize("upto", [3, 6])
def test_cache_writer_replace_removes_only_the_cache(upto: int, tmp_path: Path) -> None:
    write(tmp_path, fill=Fill("topk", k=3, num_classes=20, values="float32"), upto=upto)
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, replace=True)
    assert open_cache(tmp_path, fill=FILL).fill == FILL
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(open_cache(tmp_path).split("train").read(range(6))) == 24


def test_cache_writer_does_not_resume_a_killed_replacement(cache: Path) -> None:
    (cache / "manifest.json").unlink()
    with CacheWriter(cache, FILL, IDENTITY) as writer:
        assert writer.split("train", 6).done == 0


def test_open_cache_refuses_another_version(cache: Path) -> None:
    path = cache / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ArtifactError, match=r"expected version 1 of the teacher cache's format in .*, found 2"):
        open_cache(cache)


def test_cache_split_refuses_wrong_calls(cache: Path, tmp_path: Path) -> None:
    train = open_cache(cache).split("train")
    for index in (6, -1):
        with pytest.raises(IndexError, match=f"expected an example from 0 to 5 of train, found {index}"):
            train.read([index])
    with CacheWriter(tmp_path / "b", FILL, {}) as writer:
        split = writer.split("train", 1)
        split.add(1, FILL.target(torch.zeros(1, 20), 0))
        with pytest.raises(ValueError, match="expected 1 examples of train, found one more"):
            split.add(2, FILL.target(torch.zeros(1, 20), 0))
        writer.finish()
    headless = open_cache(tmp_path / "b")
    with pytest.raises(ArtifactError, match="expected the teacher's head in the cache"):
        headless.head_tensors()
    with pytest.raises(ArtifactError, match=r"expected eval in the teacher cache .*, found train: run"):
        headless.split("eval")


def test_cache_read_with_more_shards_than_open_maps(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = open_cache(cache).split("train").read([5, 0, 5, 1])
    monkeypatch.setattr(reader, "_OPEN_MAPS", 1)
    got = open_cache(cache).split("train").read([5, 0, 5, 1])
    assert not isinstance(want, torch.Tensor) and not isinstance(got, torch.Tensor)
    assert torch.equal(want.ids, got.ids) and torch.equal(want.probs, got.probs)

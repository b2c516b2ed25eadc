"""A cache returns what was stored, for every fill, number of positions and width of ids."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftlab.distillation.cache import CachedSplit, CacheWriter, Fill, open_cache
from peftlab.distillation.cache.records import decode, encode
from peftlab.distillation.losses import divergence, sparse_divergence
from peftlab.distillation.targets import SparseTarget
from peftlab.errors import VerificationError

LENGTHS = [3, 1, 0, 40, 1, 7]

FILLS = {
    "topk": Fill("topk", k=5, num_classes=37),
    "topk, one class": Fill("topk", k=1, num_classes=37, temperature=2.0),
    "topk, all classes": Fill("topk", k=37, num_classes=37),
    "topk, two classes": Fill("topk", k=2, num_classes=2),
    "topk, one of one": Fill("topk", k=1, num_classes=1),
    "topk, float32": Fill("topk", k=5, num_classes=37, values="float32"),
    "topk, 17 bits": Fill("topk", k=4, num_classes=128_256),
    "topk, 18 bits": Fill("topk", k=4, num_classes=262_144, values="float32"),
    "sampled": Fill("sampled", draws=9, num_classes=37),
    "sampled, once": Fill("sampled", draws=1, num_classes=37, temperature=2.0),
    "sampled, 255 times": Fill("sampled", draws=255, num_classes=3),
    "sampled, 18 bits": Fill("sampled", draws=9, num_classes=151_936),
    "mixed": Fill("mixed", k=4, draws=9, num_classes=37),
    "mixed, float32": Fill("mixed", k=4, draws=9, num_classes=37, values="float32"),
    "mixed, all but one": Fill("mixed", k=4, draws=9, num_classes=5),
}


def teacher_logits(num_positions: int, num_classes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_positions, num_classes, generator=generator) * 3
    if num_classes > 3 and num_positions > 1:
        z[0, 2:] = -math.inf  # a position of two classes
    return z


def written(folder: Path, fill: Fill, targets: list[SparseTarget | Tensor], *, shard_bytes: int = 500) -> CachedSplit:
    with CacheWriter(folder, fill, {}, shard_bytes=shard_bytes) as writer:
        split = writer.split("train", len(targets))
        for key, target in enumerate(targets):
            split.add(key, target)
        writer.finish()
    return open_cache(folder, fill=fill).split("train")


def by_class(target: SparseTarget, num_classes: int) -> Tensor:
    return torch.zeros(len(target), num_classes).scatter_add_(1, target.ids, target.probs.float())


@pytest.mark.parametrize("name", FILLS)
def test_cache_returns_stored_classes(name: str, tmp_path: Path) -> None:
    fill, num_classes = FILLS[name], FILLS[name].num_classes or 0
    targets = [fill.target(teacher_logits(n, num_classes, i), i) for i, n in enumerate(LENGTHS)]
    split = written(tmp_path, fill, targets)
    assert split.num_positions(range(6)).tolist() == LENGTHS
    # log p in float16 has a relative error of 2^-11, 0.01 for the smallest value here. A count is exact.
    exact = fill.values == "float32" or fill.kind == "sampled"
    for order in ([3], [1], [2], [5, 0, 3, 3, 2, 1], []):
        read = split.read(order)
        assert isinstance(read, SparseTarget)
        assert read.tail == ("bucket" if fill.kind == "topk" else "none") and read.temperature == fill.temperature
        start = 0
        for i in order:
            want = targets[i]
            assert isinstance(want, SparseTarget)
            got = read.rows(slice(start, start + len(want)))
            torch.testing.assert_close(
                by_class(got, num_classes), by_class(want, num_classes), rtol=1e-6 if exact else 0.01, atol=1e-7
            )
            assert (got.ids[:, : fill.k or 1] == want.ids[:, : fill.k or 1]).all(), "most probable first, as it was"
            start += len(want)
        assert start == len(read)
        for ids, probs in zip(read.ids.tolist(), read.probs.tolist(), strict=True):
            real = [i for i, p in zip(ids, probs, strict=True) if p > 0]
            assert len(set(real)) == len(real)
            assert set(ids[(fill.k or 1) :]) <= set(ids[: fill.k or 1]) | set(real)


def test_cache_returns_float32_classes_to_the_bit(tmp_path: Path) -> None:
    fill = Fill("topk", k=6, num_classes=400, values="float32")
    target = fill.target(teacher_logits(50, 400, 0)[1:], 0)
    assert isinstance(target, SparseTarget) and (target.probs.double().sum(1) < 1).all()
    read = written(tmp_path, fill, [target]).read([0])
    assert isinstance(read, SparseTarget)
    assert torch.equal(read.ids, target.ids) and torch.equal(read.probs, target.probs)


@pytest.mark.parametrize("hidden", ["bfloat16", "int8", "float32"])
@pytest.mark.parametrize("size", [64, 33, 1])
def test_cache_returns_stored_hidden_states(hidden: str, size: int, tmp_path: Path) -> None:
    fill = Fill("hidden", hidden=hidden, hidden_size=size)
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(n, size, generator=generator) * 5 for n in LENGTHS]
    states[3][:, :1] = 4_000.0  # one channel with a massive activation
    states[0][0] = 0.0
    split = written(tmp_path, fill, list(states))
    read = split.read([3, 2, 0])
    want = torch.cat([states[3], states[2], states[0]])
    assert isinstance(read, Tensor) and read.dtype == (torch.bfloat16 if hidden == "bfloat16" else torch.float32)
    if hidden == "int8":
        groups = torch.nn.functional.pad(want, (0, -size % 32)).unflatten(1, (-1, 32))
        # Half a step of the group's scale, which is rounded up by at most 2^-7.
        most = groups.abs().amax(-1, keepdim=True).expand_as(groups).flatten(1)[:, :size] / 127 / 2
        assert ((read - want).abs() <= most * (1 + 2**-7) + 1e-12).all()
    else:
        assert torch.equal(read, want.bfloat16() if hidden == "bfloat16" else want)
    assert split.read([]).shape == (0, size)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_classes=st.integers(1, 40), seed=st.integers(0, 999), std=st.floats(0.0, 30.0))
def test_stored_classes_are_a_distribution_with_a_finite_loss(
    data: st.DataObject, num_classes: int, seed: int, std: float
) -> None:
    """Sums above 1, rests from rounding, and -inf would give a loss that is negative, inf or NaN."""
    k = data.draw(st.integers(1, num_classes))
    exist = data.draw(st.integers(1, num_classes))
    values = data.draw(st.sampled_from(["float16", "float32"]))
    fill = Fill("topk", k=k, num_classes=num_classes, values=values)
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(6, num_classes, generator=generator) * std for _ in range(2))
    student[0] = teacher[0]
    for z in (teacher, student):
        z[:, exist:] = -math.inf
    read = stored(fill, fill.target(teacher, 0))
    assert (read.probs.double().sum(1) <= 1 + 1e-6).all()
    assert (by_class(read, num_classes)[:, exist:] == 0).all()
    leaf = student.double().requires_grad_()
    loss = sparse_divergence(leaf, read, temperature=1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    assert (loss >= -1e-6).all()


def stored(fill: Fill, target: SparseTarget | Tensor) -> SparseTarget:
    read = decode(encode(target, fill, where="here"), len(target), fill)
    assert not isinstance(read, Tensor)
    return SparseTarget(torch.from_numpy(read.ids), torch.from_numpy(read.probs), fill.temperature, "bucket")


def test_stored_rest_avoids_a_loss_from_rounding() -> None:
    """Why the rest is stored: for a confident teacher, 1 - sum of rounded values is noise of 1e-4; the true rest is 1e-6."""
    fill = Fill("topk", k=3, num_classes=20)
    z = torch.full((1, 20), -14.0)
    z[0, :3] = torch.tensor([1.0, 0.3, -0.4])
    target = fill.target(z, 0)
    assert float(sparse_divergence(z.double(), stored(fill, target), temperature=1.0)) < 1e-6
    assert isinstance(target, SparseTarget)
    without = SparseTarget(target.ids, target.probs.log().half().float().exp(), 1.0, "bucket")
    assert abs(float(sparse_divergence(z.double(), without, temperature=1.0))) > 1e-4


@pytest.mark.parametrize("values", ["float16", "float32"])
def test_stored_mass_of_draws_is_exact_even_if_small(values: str) -> None:
    """The mass is 1e-9. One minus the head's sum would be float32 rounding, 1e-8 or 0."""
    fill = Fill("mixed", k=3, draws=8, num_classes=20, values=values)
    z = torch.full((6, 20), -23.0)
    z[:, :3] = torch.tensor([1.0, 0.3, -0.4]) + torch.arange(6.0)[:, None] / 7
    exact = z.double().softmax(-1)[:, 3:].sum(-1)
    assert (exact < 1e-8).all()
    torch.testing.assert_close(stored(fill, fill.target(z, 0)).probs[:, 3:].sum(-1).double(), exact, rtol=0.01, atol=0)


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_stored_classes_in_float32_give_the_dense_loss(T: float, tmp_path: Path) -> None:
    fill = Fill("topk", k=300, num_classes=300, values="float32", temperature=T)
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(30, 300, generator=generator) * 3 for _ in range(2))
    teacher[:, 290:] = -math.inf
    student[:, 290:] = -math.inf
    read = written(tmp_path, fill, [fill.target(part, i) for i, part in enumerate(teacher.split(11))]).read(range(3))
    losses, gradients = [], []
    for loss_of in (
        lambda z: sparse_divergence(z, read, temperature=T),
        lambda z: divergence(z, teacher, temperature=T),
    ):
        leaf = student.clone().requires_grad_()
        loss = loss_of(leaf).mean()
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("fill", "values"),
    [
        (Fill("topk", k=2, num_classes=9), torch.zeros(4, 9)),
        (Fill("sampled", draws=2, num_classes=9), torch.zeros(4, 9)),
        (Fill("mixed", k=2, draws=2, num_classes=9), torch.zeros(4, 9)),
        (Fill("hidden", hidden_size=9), torch.zeros(4, 9)),
    ],
)
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_encode_refuses_a_teacher_with_nan_or_inf(fill: Fill, values: Tensor, wrong: float) -> None:
    broken = values.clone()
    broken[2, 3] = wrong
    with pytest.raises(VerificationError, match="at 1 of 4 positions of example 7 of train, the first at position 2"):
        encode(fill.target(broken, 0), fill, where="example 7 of train")
    if fill.kind != "hidden":
        with pytest.raises(VerificationError, match="at 4 of 4 positions"):
            encode(fill.target(torch.full((4, 9), -math.inf), 0), fill, where="x")


def test_encode_refuses_a_target_of_another_fill() -> None:
    fill = Fill("topk", k=2, num_classes=9)
    for other in (
        SparseTarget.from_logits(torch.zeros(3, 9), 3),
        SparseTarget.from_logits(torch.zeros(3, 9), 2, temperature=2.0),
        torch.zeros(3, 9),
    ):
        with pytest.raises(ValueError, match="expected a target of"):
            encode(other, fill, where="x")
    drawn = Fill("sampled", draws=4, num_classes=9)
    with pytest.raises(ValueError, match="expected weights of 4 draws"):
        encode(SparseTarget(torch.tensor([[1, 2, 3]]), torch.full((1, 3), 1 / 3), 1.0, "none"), drawn, where="x")


@pytest.mark.parametrize(
    "fill",
    [
        Fill("topk", k=50, num_classes=49_152),
        Fill("sampled", draws=50, num_classes=49_152),
        Fill("mixed", k=16, draws=16, num_classes=128_256),
        Fill("hidden", hidden_size=576, hidden="int8"),
    ],
    ids=lambda fill: fill.kind,
)
def test_bytes_per_position_equals_the_size_of_the_files(fill: Fill, tmp_path: Path) -> None:
    width = fill.hidden_size or fill.num_classes or 0
    target = fill.target(torch.randn(60, width, generator=torch.Generator().manual_seed(0)) * 3, 0)
    with CacheWriter(tmp_path, fill, {}, shard_bytes=200_000) as writer:
        split = writer.split("train", 60)
        for key in range(60):
            split.add(key, target)
        writer.finish()
    recorded = open_cache(tmp_path).manifest["splits"]["train"]
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("train-*"))
    assert recorded["positions"] == 3_600 and recorded["bytes"] == on_disk
    assert recorded["bytes_per_position"] == pytest.approx(on_disk / 3_600, rel=0.02)
    planned = fill.bytes_per_position()
    if fill.kind in ("topk", "hidden"):
        assert recorded["bytes_per_position"] == pytest.approx(planned, rel=0.02)
    else:
        assert recorded["bytes_per_position"] <= planned * 1.02


def test_cache_writes_and_reads_fast(tmp_path: Path) -> None:
    """20,000 positions of 50 classes take 0.03 s each way on an idle core, and at most 2 s anywhere."""
    fill = Fill("topk", k=50, num_classes=49_152)
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(49_152, generator=generator)[:50] for _ in range(200)])
    target = SparseTarget(ids, torch.rand(200, 50, generator=generator).softmax(-1))
    began = time.perf_counter()
    split = written(tmp_path, fill, [target] * 100, shard_bytes=2**20)
    wrote = time.perf_counter()
    read = split.read(np.arange(100))
    assert wrote - began < 2 and time.perf_counter() - wrote < 2
    assert len(read) == 20_000

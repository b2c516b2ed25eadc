"""The dropout of lora_linear: its generators, its packed mask, its seed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from peftlab_kernels import runtime
from peftlab_kernels.lora_linear import dropout_mask, lora_linear, lora_linear_reference, passes
from peftlab_kernels.lora_linear.reference import philox_mask_reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.ops.lora_linear_examples import (
    EACH_BACKEND,
    NAMES,
    NEEDS_TRITON,
    SCALE,
    SEED,
    TOLERANCE,
    check,
    problem,
    run_op,
    threshold_of,
    truth,
)


def _mask_of(M: int, K: int, dropout: float, seed: int, backend: str, device: torch.device, R: int = 4) -> Tensor:
    """[M, ceil(K / 8)]: the packed mask of a call."""
    _, packed = passes.dropout_down(
        torch.zeros(M, K, device=device), torch.zeros(R, K, device=device), dropout, torch.tensor(seed), backend
    )
    return packed


@NEEDS_TRITON
@pytest.mark.parametrize("seed", [0, 5, 2**31, 2**32 - 1, 2**40 + 3, 2**62 - 1])
@pytest.mark.parametrize("dropout", [0.05, 0.3, 0.9])
def test_lora_linear_triton_mask_equals_philox(device: torch.device, dropout: float, seed: int) -> None:
    for M, K in [(63, 130), (1, 1), (65, 50)]:
        want = philox_mask_reference(seed, M, K, dropout)
        assert torch.equal(_mask_of(M, K, dropout, seed, "triton", device).cpu(), want)
        alone = passes.draw_mask(torch.empty(M, K, device=device), dropout, torch.tensor(seed), "triton")
        assert torch.equal(alone.cpu(), want)


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**40 + 3, 2**62 - 1])
def test_lora_linear_pytorch_philox_equals_the_reference(device: torch.device, seed: int) -> None:
    """A GPU without Triton draws this mask."""
    for M, K in [(63, 130), (1, 1), (65, 50)]:
        want, value = philox_mask_reference(seed, M, K, 0.3), torch.tensor(seed, device=device)
        assert torch.equal(passes._philox(slice(0, M), K, threshold_of(0.3), value).cpu(), want)
        part = slice(M // 3, M)
        assert torch.equal(passes._philox(part, K, threshold_of(0.3), value).cpu(), want[part])


def test_lora_linear_philox_reference_gives_the_published_words() -> None:
    """Known answers of Philox-4x32 with counter and key 0 (Random123, kat_vectors), 7 and 10 rounds. A lane of 16 bits
    is kept at a threshold equal to itself and dropped at the next one."""
    published = {
        7: (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
        10: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    }
    for rounds, words in published.items():
        for i, lane in enumerate(half for word in words for half in (word & 0xFFFF, word >> 16)):
            kept, dropped = (
                int(philox_mask_reference(0, 1, 8, (lane + more) / 65536, rounds=rounds)) >> i & 1 for more in (0, 1)
            )
            assert (kept, dropped) == (1, 0), f"{rounds} rounds, lane {i}"


@NEEDS_TRITON
@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (128, 32)])
def test_lora_linear_mask_does_not_depend_on_the_tile(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int]
) -> None:
    want = _mask_of(90, 130, 0.3, SEED, "triton", device)
    options = passes.down_options
    other = {"BLOCK_M": tile[0], "BLOCK_K": tile[1]}
    monkeypatch.setattr(passes, "down_options", lambda *args: options(*args) | other)
    assert torch.equal(_mask_of(90, 130, 0.3, SEED, "triton", device), want)
    assert torch.equal(_mask_of(90, 130, 0.3, SEED, "triton", device, R=100), want)


@pytest.mark.parametrize("dropout", [0.05, 0.5])
@EACH_BACKEND
def test_lora_linear_mask_keeps_the_right_share(device: torch.device, backend: str, dropout: float) -> None:
    """The shares are within 5 sigma: in all, in each of the 8 places of a byte, and in agreement with the mask of
    another seed."""
    M, K = 128, 400
    share = 1 - threshold_of(dropout) / 65536

    def within(kept: Tensor, expected: float) -> None:
        sigma = (expected * (1 - expected) / kept.numel()) ** 0.5
        assert abs(float(kept.double().mean()) - expected) < 5 * sigma

    first, second = (passes.unpack_mask(_mask_of(M, K, dropout, seed, backend, device), K) for seed in (SEED, SEED + 1))
    within(first, share)
    for place in range(8):
        within(first[:, place::8], share)
    within(first == second, share**2 + (1 - share) ** 2)
    within(first[:, 1:] == first[:, :-1], share**2 + (1 - share) ** 2)
    within(first[1:] == first[:-1], share**2 + (1 - share) ** 2)


@EACH_BACKEND
def test_lora_linear_seed_gives_one_mask(device: torch.device, backend: str) -> None:
    first, again, other = (_mask_of(63, 130, 0.3, seed, backend, device) for seed in (SEED, SEED, SEED + 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    case = problem("dense", (63, 50, 130, 8), torch.float32, device, backend=backend, dropout=0.3)
    a, b, c = (run_op(case, backend, seed=torch.tensor(seed)) for seed in (SEED, SEED, SEED + 1))
    assert all(torch.equal(a[name], b[name]) for name in NAMES)
    assert not any(torch.equal(a[name], c[name]) for name in ("y", "x", "A", "B"))


def test_lora_linear_torch_mask_in_pieces_equals_the_formula(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows beyond the first piece follow the same rule for mask, values and gradients."""
    monkeypatch.setattr(passes, "_PIECE", dict.fromkeys(passes._PIECE, 1000))
    case = problem("dense", (63, 50, 130, 8), torch.float64, device, dropout=0.3)
    check(run_op(case, "torch"), truth(case), TOLERANCE[torch.float64])


@EACH_BACKEND
def test_dropout_mask_equals_the_mask_that_lora_linear_draws(device: torch.device, backend: str) -> None:
    case = problem("dense", (60, 50, 130, 8), torch.float32, device, backend=backend, dropout=0.3)
    keep, keep_scale = dropout_mask(case.x.view(5, 12, 50), 0.3, torch.tensor(SEED), backend=backend)
    assert torch.equal(keep.view(60, 50), case.keep)
    assert keep_scale == pytest.approx(1 / case.share, rel=1e-15)


def test_unpack_mask_gives_the_bits_in_order(device: torch.device) -> None:
    packed = torch.tensor([[0b00000001, 0b10000010], [0b11111110, 0b00000000]], dtype=torch.uint8, device=device)
    got = passes.unpack_mask(packed, 10).int().tolist()
    assert got == [[1, 0, 0, 0, 0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1, 1, 0, 0]]


@EACH_BACKEND
def test_lora_linear_checkpointing_replays_the_mask(device: torch.device, backend: str) -> None:
    case = problem("nf4", (63, 50, 130, 8), torch.float32, device)

    def layer(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        y = lora_linear(
            x, case.base, A, B, scale=SCALE, dropout=0.3, seed=runtime.new_seed(x.device), backend=backend
        )  # fmt: skip
        return torch.tanh(y)

    def grads(**options: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in case.inputs()[:3]]
        torch.manual_seed(0)
        y = checkpoint(layer, *leaves, use_reentrant=False, **options) if options else layer(*leaves)
        return list(torch.autograd.grad(y, leaves, case.grad))

    plain = grads()
    assert all(torch.equal(a, b) for a, b in zip(plain, grads(preserve_rng_state=True), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain, grads(preserve_rng_state=False), strict=True))


@pytest.mark.gpu
@NEEDS_TRITON
def test_lora_linear_in_a_cuda_graph_draws_a_new_mask_at_each_replay() -> None:
    """The graph is captured once. Each replay has its own seed, and its mask equals the NumPy reference's."""
    device = torch.device("cuda")
    case = problem("dense", (64, 48, 128, 8), torch.float16, device)

    def forward() -> tuple[Tensor, Tensor]:
        seed = runtime.new_seed(device)
        y = lora_linear(case.x, case.base, case.A, case.B, scale=SCALE, dropout=0.5, seed=seed)
        return y, seed

    torch.manual_seed(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, seed = forward()
    seeds = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        seeds.append(int(seed))
        keep = passes.unpack_mask(philox_mask_reference(seeds[-1], 64, 48, 0.5), 48).to(device)
        want = lora_linear_reference(
            case.x.double(), case.W, case.A.double(), case.B.double(), scale=SCALE, keep=keep, keep_scale=2.0
        )
        assert float((y.double() - want).abs().max()) <= TOLERANCE[torch.float16] * float(want.abs().max())
    assert len(set(seeds)) == 3


def test_lora_linear_seed_stays_on_its_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel launch reads the value of the seed. On a GPU that would wait for the device and become a constant of a
    captured graph."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the kernels need Triton")
    seen: list[Any] = []
    monkeypatch.setattr(runtime, "launch", lambda kernel, grid, *args, **options: seen.append(args))
    seed = torch.tensor(SEED, device=device)
    x, A = torch.zeros(63, 130, device=device), torch.zeros(4, 130, device=device)
    passes.dropout_down(x, A, 0.3, seed, "triton")
    passes.draw_mask(x, 0.3, seed, "triton")
    assert len(seen) == 2
    for args in seen:
        assert any(arg is seed for arg in args) and SEED not in [arg for arg in args if isinstance(arg, int)]


def test_new_seed_follows_the_default_generator() -> None:
    torch.manual_seed(0)
    first, second = runtime.new_seed(), runtime.new_seed()
    torch.manual_seed(0)
    assert int(runtime.new_seed()) == int(first) != int(second)
    assert first.dtype == torch.int64 and first.shape == () and first.device.type == "cpu"


@pytest.mark.gpu
def test_new_seed_follows_the_generator_of_its_device() -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    first, second = runtime.new_seed(device), runtime.new_seed(device)
    torch.manual_seed(0)
    assert int(runtime.new_seed(device)) == int(first) != int(second)
    assert first.dtype == torch.int64 and first.shape == () and first.device.type == "cuda"

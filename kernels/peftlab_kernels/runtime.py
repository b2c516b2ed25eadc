"""What all ops share: the choice of backend, kernel launches, reused scratch memory, the seed of a mask."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# Triton reads it when a kernel is defined. Its interpreter multiplies bfloat16 wrongly (as bit patterns), so kernels
# then cast to float32 before every arithmetic step.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Below 8.0 Triton has no matrix instructions: products keep whole tiles in registers and spill up to 2.5 KB a thread.
MIN_CAPABILITY = {False: (7, 5), True: (8, 0)}
# Backend of a processor's matrix unit -> type to which it rounds the operands of products with the frozen weight.
CPU_OPERANDS = {"cpu-bf16": "bf16", "cpu-int8": "int8"}
_MATRIX_UNITS = {
    "cpu-bf16": {"amx_tile": "AMX", "avx512_bf16": "AVX512-BF16"},
    "cpu-int8": {"vnni": "AVX512-VNNI"},
}


def triton_problem(device: torch.device | str, *, products: bool) -> str | None:
    """Why Triton kernels cannot run on a device, or None if they can. products: kernels with matrix products."""
    device = torch.device(device)
    if device.type != "cuda":
        return _unfit(device.type, None, products)
    index = torch.cuda.current_device() if device.index is None else device.index
    return _unfit("cuda", index, products) or _probed(torch.device(f"cuda:{index}"))


@functools.cache
def _unfit(device_type: str, index: int | None, products: bool) -> str | None:
    """The problem, if it is known without running a kernel."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device_type == "cuda":
        capability, needed = torch.cuda.get_device_capability(index), MIN_CAPABILITY[products]
        if capability >= needed:
            return None
        reason = "the GPU has compute capability {}.{}, and {}.{} is needed".format(*capability, *needed)
        return reason + (" for matrix products" if products else "")
    if device_type == "cpu" and INTERPRETED:
        return None
    return f"Triton has no {device_type} backend"


_probes: dict[torch.device, str | None] = {}


def _probed(device: torch.device) -> str | None:
    """Compiles and runs a kernel once per process: a missing part (most often a C compiler) raises at the first launch only.

    It skips this while a CUDA graph is captured, because reading the result would end the capture. Running out of memory
    says nothing about Triton, so that is not remembered.
    """
    if device not in _probes:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        try:
            with _disable_current_modes():  # such as FakeTensorMode
                _probes[device] = _probe(device)
        except torch.OutOfMemoryError:
            return None
    return _probes[device]


def _probe(device: torch.device) -> str | None:
    try:
        from peftlab_kernels.probe import row_sums

        x = torch.arange(256, dtype=torch.float32, device=device).view(16, 16)
        return None if torch.equal(row_sums(x), x.sum(1)) else "Triton's first kernel gave a wrong result"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: PyTorch takes over
        return f"Triton's first kernel failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs a kernel on the device of its first argument, a tensor. Triton itself would use the current device."""
    if torch.version.hip is not None:
        options.pop("maxnreg", None)  # the AMD backend rejects unknown options
    with _current(arguments[0].device):
        kernel[grid](*arguments, **options)


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def operands_problem(backend: str) -> str | None:
    """Why products of ``CPU_OPERANDS`` cannot run on this processor, or would not be faster; None if they can."""
    has = {name: bool(getattr(torch.cpu, f"_is_{name}_supported", bool)()) for name in _MATRIX_UNITS[backend]}
    if not any(has.values()):
        return f"the processor has none of {', '.join(_MATRIX_UNITS[backend].values())}"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch is built without oneDNN"
    if backend == "cpu-int8" and int8_saturates():
        return "its int8 products overflow 16-bit sums"
    return None


def int8_saturates() -> bool:
    """Without VNNI (or with ONEDNN_MAX_CPU_ISA below it) oneDNN adds pairs of int8 products in 16 bits. With values of 127 the
    sums are then wrong by a tenth."""
    a_MK = torch.full((32, 64), 127, dtype=torch.int8)
    exact = 64 * 127 * 127
    return any(bool((torch._int_mm(sign * a_MK, a_MK.t()) != sign * exact).any()) for sign in (1, -1))


def choose_backend(backend: str, tensor: Tensor, *, products: bool) -> str:
    """``triton`` or ``torch`` for ``backend`` (auto, triton, torch, or one of ``CPU_OPERANDS``).

    products: whether the kernels have matrix products. Raises: ValueError when the backend cannot run.
    """
    if backend == "torch":
        return "torch"
    if backend in CPU_OPERANDS:  # other kernels do not round their operands
        backend = "auto"
    if backend == "auto" and not tensor.is_cuda:
        return "torch"
    problem = triton_problem(tensor.device, products=products)
    if problem is None and tensor.dtype not in TRITON_DTYPES:
        problem = f"the kernels take float32, float16 and bfloat16, not {tensor.dtype}"
    if backend == "auto":
        return "torch" if problem else "triton"
    if backend != "triton":
        raise ValueError(f"expected backend auto, triton, torch, {', '.join(CPU_OPERANDS)}, found {backend!r}")
    if problem:
        raise ValueError(f"backend triton cannot run: {problem}")
    return "triton"


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.held: dict[Any, Tensor] = {}


_buffers = _Buffers()


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, use: str = "") -> Tensor:
    """Uninitialized memory that the next call for the same use on the same thread and stream reuses.

    Work queued on the current stream must consume it before then. Never return it to a caller or save it.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.empty(shape, dtype=dtype, device=device)  # a graph replays into its own memory
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    numel = 1
    for size in shape:
        numel *= size
    held = _buffers.held.get((device, stream, dtype, use))
    if held is None or held.numel() < numel:
        with torch.inference_mode(False):  # a tensor created in inference mode cannot be written outside it
            _buffers.held[device, stream, dtype, use] = held = torch.empty(numel, dtype=dtype, device=device)
    return held[:numel].view(shape)


def release_scratch() -> None:
    """Frees this thread's scratch memory."""
    _buffers.held.clear()


def new_seed(device: torch.device | str = "cpu") -> Tensor:
    """[] int64, drawn from the device's default generator, which activation checkpointing replays.

    On a GPU the seed stays there: a CUDA graph advances the generator's offset and draws a new seed at each replay, whereas a
    number from the host would be fixed in the graph. For other devices it is in CPU memory, where masks are drawn.
    """
    on_gpu = torch.device(device).type == "cuda"
    return torch.randint(0, 2**62, (), dtype=torch.int64, device=device if on_gpu else "cpu")


class DifferentiableOnce(torch.autograd.Function):
    """Connects a gradient to the tensors it depends on. ``once_differentiable`` refuses a second derivative only if the upstream
    gradient requires one, and drops it silently if only the inputs do."""

    @staticmethod
    def forward(ctx: Any, what: str, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        ctx.what = what
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.what} can be differentiated once; for second derivatives use run.kernels=reference")


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def dot_dtype(dtype: torch.dtype) -> Any:
    """Triton's type of the operands of ``tl.dot`` for tensors of ``dtype``."""
    import triton.language as tl

    if INTERPRETED:
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]

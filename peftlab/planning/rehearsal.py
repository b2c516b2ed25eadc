"""Runs a training step without computing it, and counts the bytes of its tensors.

Every operation on a phantom weight, or on what came from one, goes to PyTorch's FakeTensorMode, which works out shapes and dtypes
only. Ids, masks and positions stay real, so that code which reads them takes the path that it will take. What a step allocates
is therefore what the model's own code, autograd and our operators allocate, for every family, without formulas.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from peftlab import ops
from peftlab.planning.phantoms import is_phantom, stored_tensors

_MOST_REAL = 2**22  # elements of a real tensor of whole numbers that a factory may make


@dataclass
class Peak:
    """The largest number of bytes that exist at once, and what they are.

    Attributes: parts: bytes by part of the step. Their sum is ``total``.
    """

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class Rehearsal(TorchDispatchMode):
    """While active, nothing is computed, and every new tensor is counted under the current ``part``.

    Args: models: their own tensors are not counted. gpu_bytes: memory of the GPU that is planned for; None: a CPU.
    """

    def __init__(self, *models: Any, gpu_bytes: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._gpu_bytes = gpu_bytes
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._doubles: dict[int, FakeTensor] = {}
        self._own: set[int] = set()
        self._held: dict[int, Tensor] = {}
        for model in models:
            for _, tensor in stored_tensors(model):
                key = tensor.untyped_storage()._cdata
                self._held[key] = tensor
                if is_phantom(tensor) or isinstance(tensor, torch.nn.Parameter):
                    self._own.add(key)
        self._alive: dict[int, tuple[int, str]] = {}
        self._now: Counter[str] = Counter()
        self._total = 0
        self.part = "activations"
        self.peak = Peak()

    def __enter__(self) -> Any:
        ops.release_scratch()  # kept memory of a real step would not be counted, and that of this one is of no use to a real step
        self._fake.__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        ops.release_scratch()
        self._fake.__exit__(*error)

    def start(self) -> None:
        """Forgets the peak so far; what exists now still counts."""
        self.peak = Peak(self._total, dict(self._now))

    def relabel(self, tensors: Any, part: str) -> None:
        """Counts tensors that exist under ``part`` from now on."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._alive:
                size, before = self._alive[key]
                self._now[before] -= size
                self._now[part] += size
                self._alive[key] = (size, part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        tree_map_only(Tensor, tensors.append, (args, kwargs))
        if self._stays_real(func, tensors, args, kwargs):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        elif func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: False}.get(tensors[0].dtype, 0 if not tensors[0].is_floating_point() else 0.0)
        elif func.name() == "bitsandbytes::int8_vectorwise_quant":
            out = self._rows_of_int8(args[0])
        elif func.name() == "bitsandbytes::int8_mixed_scaled_mm":
            out = args[0].new_empty((*args[0].shape[:-1], args[2].shape[0])), None
        else:
            if func is torch.ops.aten.index.Tensor:
                args = (args[0], self._positions(args[1]))
            elif func is torch.ops.aten.index_put_.default or func is torch.ops.aten.index_put.default:
                args = (args[0], self._positions(args[1]), *args[2:])
            extra = self._workspace(func, args)
            args, kwargs = tree_map_only(Tensor, self._double, (args, kwargs))
            if extra:
                self._consider({"loss": extra})
            out = func(*args, **kwargs)
        tree_map_only(Tensor, lambda tensor: self._count(tensor, func), out)
        return out

    def _stays_real(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> bool:
        if tensors:
            return not any(isinstance(t, FakeTensor) or t.untyped_storage()._cdata in self._own for t in tensors)
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        shape = args[0] if args and isinstance(args[0], list | tuple | torch.Size) else ()
        numel = 1
        for size in shape:
            numel *= int(size)
        whole = not dtype.is_floating_point or "arange" in str(func) or "scalar_tensor" in str(func)
        return numel <= 1 or (whole and numel <= _MOST_REAL)

    @staticmethod
    def _rows_of_int8(x: Tensor) -> tuple[Tensor, Tensor, None]:
        """bitsandbytes' fake of this operator has an unknown number of outlier columns; there are few."""
        return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32), None

    def _workspace(self, func: Any, args: Any) -> int:
        if func.namespace != "peftlab":
            return 0
        names = [argument.name for argument in func._schema.arguments]
        named = dict(zip(names, args, strict=False))
        return ops.loss_workspace(func._schema.name, named, gpu_bytes=self._gpu_bytes)

    def _positions(self, indices: Any) -> Any:
        """Masks among ``indices`` as the positions that they choose, which give the size of the result."""
        positions: list[Any] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8) or isinstance(index, FakeTensor):
                positions.append(index)
            else:
                with unset_fake_temporarily():
                    positions += list(index.nonzero().unbind(1))
        return positions

    def _double(self, tensor: Tensor) -> Tensor:
        """The fake tensor for one of the model's own; any other as it is."""
        if isinstance(tensor, FakeTensor):
            return tensor
        key = tensor.untyped_storage()._cdata
        if key not in self._own:
            return tensor
        known = self._doubles.get(key)
        if known is None or known.shape != tensor.shape:
            with unset_fake_temporarily():
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            known = self._doubles[key] = FakeTensor(self._fake, empty, torch.device("cpu"))
            self._held[known.untyped_storage()._cdata] = known
        return known

    def _count(self, tensor: Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._held:
            return
        size = storage.nbytes()
        part = self._part_of(func)
        self._alive[key] = (size, part)
        self._now[part] += size
        self._total += size
        weakref.finalize(storage, self._freed, key)
        if self._total > self.peak.total:
            self.peak = Peak(self._total, dict(self._now))

    def _freed(self, key: int) -> None:
        size, part = self._alive.pop(key, (0, ""))
        self._total -= size
        self._now[part] -= size

    def _consider(self, extra: dict[str, int]) -> None:
        total = self._total + sum(extra.values())
        if total > self.peak.total:
            parts = Counter(self._now)
            parts.update(extra)
            self.peak = Peak(total, dict(parts))

    def _part_of(self, func: Any) -> str:
        name = func.name() if hasattr(func, "name") else str(func)
        if "dequant" in name:
            return "dequantized weights"
        if torch._C._current_graph_task_id() != -1:
            return "backward pass"
        if "scaled_dot_product" in name or "_softmax" in name:
            return "attention"
        return self.part


class CudaAutocast(TorchFunctionMode):
    """Casts to float32 what autocast on a GPU casts, and on a CPU leaves in 16 bits (PyTorch 2.13, autocast_mode.h)."""

    _WIDE = frozenset(
        (
            F.layer_norm,
            torch.layer_norm,
            F.softmax,
            torch.softmax,
            F.log_softmax,
            torch.log_softmax,
            F.cross_entropy,
        )
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._WIDE and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _wide, (args, kwargs or {}))
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return func(*args, **(kwargs or {}))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor

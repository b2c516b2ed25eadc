"""What one run of a model says about its blocks: which module's output is added to the residual stream, and where.

In the first run of each block, an addition of the residual stream and the output of a module ends a sublayer. Hence BERT,
Llama, Bloom (which adds inside of its MLP) and Phi (which adds two outputs at once) need no table.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ADDS = {"add", "__add__", "__radd__", "__iadd__", "add_"}
# Operations after which a tensor is still the output of the same module.
_KEEPS = {"dropout", "to", "type_as", "contiguous", "view", "reshape", "mul", "__mul__", "__rmul__", "float", "clone"}
_ATTENDS = "scaled_dot_product_attention"
# Attention kernels outside of torch are seen only by the name of their module's class.
_ATTENTION_NAMES = ("attention", "attn")


@dataclass(frozen=True)
class Place:
    """The end of one sublayer. Names are those of modules in the transformers model.

    Attributes:
        output: the module whose output is added to the residual stream. residual: a module of the block whose first input is
            the residual stream. norm: the layer norm over the sum, in a post-norm block.
        width: of the output. dtype, device: those of the output when the model runs.
    """

    output: str
    residual: str | None
    norm: str | None
    width: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Block:
    """The self-attention and the feed-forward sublayer of a block; None where the place was not found."""

    name: str
    attention: Place | None
    feed_forward: Place | None
    problem: str | None = None


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor among the arguments of a module."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


@dataclass
class _Source:
    """The modules that gave a tensor, the last and outermost first."""

    modules: list[str]


@dataclass
class _Sum:
    sources: list[_Source]
    residual: Tensor
    output: Tensor
    after_attention: bool
    call: int


@dataclass
class _Call:
    name: str
    module: nn.Module
    input: Tensor | None
    output: Tensor | None = None


@dataclass
class Trace:
    """What the first run of a block does. All tensors are kept until its end, so that an ``id`` names one of them."""

    name: str
    names: dict[nn.Module, str]
    kept: list[Tensor] = field(default_factory=list)
    stream: set[int] = field(default_factory=set)
    normed: set[int] = field(default_factory=set)  # norms of the stream, which post-norm blocks continue with
    sources: dict[int, list[_Source]] = field(default_factory=dict)
    same: dict[int, int] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)
    sums: list[_Sum] = field(default_factory=list)
    running: list[_Call] = field(default_factory=list)
    attending: set[str] = field(default_factory=set)
    attends: bool = False
    attended: bool = False  # since the last sum
    found: Block | None = None

    def starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _Call(self.names[module], module, first_tensor(args, kwargs))
        if call.input is not None:
            self.kept.append(call.input)
        self.calls.append(call)
        self.running.append(call)
        if any(word in type(module).__name__.lower() for word in _ATTENTION_NAMES):
            self.attend()

    def ends(self, module: nn.Module, output: Any) -> None:
        call = self.running.pop()
        assert call.module is module
        value = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(value, Tensor):
            return
        call.output = value
        self.kept.append(value)
        if self._in(call.input, self.stream) and _keeps_shape(call):
            self.normed.add(id(value))
        known = self._sources(value)
        if len(known) < 2:
            self.sources[id(value)] = [_Source([call.name, *(known[0].modules if known else [])])]
        elif all(source.modules[0].startswith(f"{call.name}.") for source in known):
            self.sources[id(value)] = [_Source([call.name])]  # such as the sum of two experts inside of it

    def attend(self) -> None:
        self.attends = self.attended = True
        self.attending.update(call.name for call in self.running)

    def operation(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        if name == _ATTENDS or (name == "softmax" and isinstance(output, Tensor) and output.dim() >= 4):
            self.attend()
        if not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor):
            return
        if name in _KEEPS and output is not args[0] and output.numel() == args[0].numel():
            scaled = name.strip("_") in ("mul", "rmul") and isinstance(args[1], Tensor) and args[1].dim() > 1
            if not scaled:
                self.kept += [args[0], output]
                self.same[id(output)] = id(args[0])
        elif name in _ADDS and len(args) > 1 and isinstance(args[1], Tensor) and args[0].shape == args[1].shape:
            self._add(args[0], args[1], output)

    def _add(self, a: Tensor, b: Tensor, output: Tensor) -> None:
        self.kept += [a, b, output]
        for known in (self.stream, self.normed):
            if self._in(a, known) == self._in(b, known):
                continue
            residual, value = (a, b) if self._in(a, known) else (b, a)
            sources = self._sources(value)
            if sources or known is self.stream:
                if sources:
                    self.sums.append(_Sum(sources, residual, output, self.attended, len(self.calls)))
                    self.attended = False
                self.stream.add(id(output))
                return
        if not self._in(a, self.stream):
            self.sources[id(output)] = [*self._sources(a), *self._sources(b)]

    def _chain(self, value: Tensor | None) -> Iterator[int]:
        """The ids of the tensor and of what it was before operations that keep it."""
        key = None if value is None else id(value)
        seen: set[int] = set()
        while key is not None and key not in seen:
            seen.add(key)
            yield key
            key = self.same.get(key)

    def _in(self, value: Tensor | None, known: set[int]) -> bool:
        return any(key in known for key in self._chain(value))

    def _sources(self, value: Tensor) -> list[_Source]:
        modules: list[str] = []
        for key in self._chain(value):
            found = self.sources.get(key, [])
            if len(found) > 1:
                return found if not modules else [_Source(modules)]
            modules += found[0].modules if found else []
        return [_Source(modules)] if modules else []

    def block(self) -> Block:
        assert self.found is not None
        return self.found

    def close(self) -> None:
        """Draws the conclusions and forgets the tensors."""
        attention: list[tuple[_Sum, _Source]] = []
        feed_forward: list[tuple[_Sum, _Source]] = []
        for total in self.sums:
            for source in total.sources:
                attends = self._attends(source) if len(total.sources) > 1 else total.after_attention
                (attention if attends else feed_forward).append((total, source))
        # A second attention of a decoder's block is the cross-attention.
        first = self._place(*attention[0]) if attention else None
        last = self._place(*feed_forward[0]) if len(feed_forward) == 1 else None
        problem = None
        if len(feed_forward) != 1:
            problem = f"{self.name} has {len(feed_forward) or 'no'} feed-forward outputs in its residual stream, not 1"
        self.found = Block(self.name, first, last, problem)
        self.kept, self.calls, self.sums = [], [], []

    def _attends(self, source: _Source) -> bool:
        """Whether attention ran in one of the modules or in one around them."""
        around = set()
        for name in source.modules:
            parts = name.removeprefix(f"{self.name}.").split(".")
            around |= {".".join([self.name, *parts[:count]]) for count in range(1, len(parts) + 1)}
        return bool(around & self.attending)

    def _place(self, total: _Sum, source: _Source) -> Place | None:
        counts = Counter(call.name for call in self.calls)
        output = next((name for name in source.modules if counts[name] == 1), None)
        if output is None:
            return None
        norm = None
        if total is self.sums[-1]:
            after = [c for c in self.calls[total.call :] if self._is_norm(c, total.output) and counts[c.name] == 1]
            norm = after[0].name if after else None
        value = total.output
        return Place(output, self._reads(total.residual, counts), norm, value.shape[-1], value.dtype, value.device)

    def _reads(self, stream: Tensor, counts: Counter[str]) -> str | None:
        """A module whose first input is the residual stream, or the stream before the sum if no module reads this one: in
        Cohere's blocks the feed-forward's output is added to that of the attention, and both read the block's input."""
        while True:
            before = set(self._chain(stream))
            for call in self.calls:
                if counts[call.name] == 1 and before & set(self._chain(call.input)):
                    return call.name
            sums = [total for total in self.sums if id(total.output) in before and total.residual is not stream]
            if not sums:
                return None
            stream = sums[0].residual

    def _is_norm(self, call: _Call, value: Tensor) -> bool:
        return id(value) in self._chain(call.input) and _keeps_shape(call)


def _keeps_shape(call: _Call) -> bool:
    """Whether it changed its input as a norm does: elementwise, without matrices."""
    if call.input is None or call.output is None or call.output is call.input:
        return False
    return call.output.shape == call.input.shape and all(p.dim() <= 1 for p in call.module.parameters())


class Watch(TorchFunctionMode):
    """Gives the calls of modules and of torch's functions to the trace of the innermost block that runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}
        self._candidates = _equal_blocks(model)
        self._stack: list[Trace | None] = []
        inside = {module for block in self._candidates for module in block.modules()}
        self._watched = [module for module in self._names if module in inside]
        self.traces = {block: Trace(self._names[block], self._names) for block in self._candidates}

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        for module in self._watched:
            handles.append(module.register_forward_pre_hook(self._starts, with_kwargs=True))
            handles.append(module.register_forward_hook(self._ends, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._stack and (outer := self._stack[-1]) is not None:
            outer.starts(module, args, kwargs)
        if (trace := self.traces.get(module)) is not None:
            # A shared block runs once per layer; its first run says all.
            fresh = trace if trace.found is None and trace not in self._stack else None
            self._stack.append(fresh)
            given = first_tensor(args, kwargs)
            if fresh is not None and given is not None:
                fresh.kept.append(given)
                fresh.stream.add(id(given))

    def _ends(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module in self.traces and (trace := self._stack.pop()) is not None:
            trace.close()
        if self._stack and (outer := self._stack[-1]) is not None:
            outer.ends(module, output)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._stack and (trace := self._stack[-1]) is not None:
            trace.operation(getattr(func, "__name__", ""), args, output)
        return output


def _equal_blocks(model: nn.Module) -> list[nn.Module]:
    """The elements of the lists whose elements have one class, in the order of the model's modules."""
    chosen = {
        block
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
        for block in module
    }
    return [module for module in model.modules() if module in chosen]

"""Which modules of a model are its head."""

from __future__ import annotations

from typing import Any

# The head of T5ForQuestionAnswering (transformers 5.23), which is its own body.
_LOOSE_HEAD = "qa_outputs"


def head_modules(model: Any) -> list[str]:
    """Names of the modules with weights outside the body of a transformers model, and of the head in a body of timm."""
    body = model.base_model
    if hasattr(body, "get_classifier"):
        head = body.get_classifier()
        return [n for n, module in model.named_modules() if module is head and any(True for _ in module.parameters())]
    children = [(n, child) for n, child in model.named_children() if any(True for _ in child.parameters())]
    names = [n for n, child in children if (n == _LOOSE_HEAD if body is model else child is not body)]
    return _not_nested(model, names)


def _not_nested(model: Any, names: list[str]) -> list[str]:
    """``names``, with the children of a module in place of it if a module in it ends with one of the names: PEFT finds modules to
    train by the end of their names, and wraps both (the ``head.head`` of DPT)."""
    modules = dict(model.named_modules())
    while outer := next(
        (n for n in names if any(m.startswith(f"{n}.") and m.endswith(tuple(names)) for m in modules)), ""
    ):
        if any(True for _ in modules[outer].parameters(recurse=False)):
            break
        inner = [
            f"{outer}.{n}" for n, child in modules[outer].named_children() if any(True for _ in child.parameters())
        ]
        names = [name for n in names for name in (inner if n == outer else [n])]
    return names

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
    return [n for n, child in children if (n == _LOOSE_HEAD if body is model else child is not body)]

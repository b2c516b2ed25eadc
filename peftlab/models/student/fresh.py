"""Students with fresh random weights: a control that shows the value of copied weights."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

from peftlab.errors import RecipeError
from peftlab.models.student.cut import StudentCut, check_cut, chosen_layers
from peftlab.models.student.rebuild import rebuilt
from peftlab.models.student.stack import cut_layers, find_stack

_SECTION = "distill.student_init"
_IN_CONFIG = {"num_heads": "num_attention_heads"}


def fresh_student(skeleton: Any, cut: StudentCut, *, auto_class: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """A float32 model of the cut architecture, initialised from ``seed``, and notes on the cut.

    Args: skeleton: the source on the meta device; its layers are cut. cut: for any architecture whose config has the sizes.
    Raises: RecipeError for layers or sizes that the architecture does not allow.
    """
    import transformers

    start = time.perf_counter()
    notes: dict[str, Any] = {"parameters_before": _num_parameters(skeleton), **_cut_shapes(skeleton, cut)}
    rebuilt(skeleton, skeleton.config, key=_SECTION)
    # The caller's random state does not change; a new model is created on the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, auto_class).from_config(skeleton.config, dtype=torch.float32)
    return model, {
        **notes,
        "weights": "random",
        "parameters": _num_parameters(model),
        "seconds": time.perf_counter() - start,
    }


def fresh_skeleton(skeleton: Any, cut: StudentCut) -> Any:
    """The model of ``fresh_student`` without weights, on the meta device. Arguments and errors are the same."""
    _cut_shapes(skeleton, cut)
    return rebuilt(skeleton, skeleton.config, key=_SECTION)


def _cut_shapes(skeleton: Any, cut: StudentCut) -> dict[str, Any]:
    """Cuts the skeleton's layers and its config; returns notes on the layers."""
    notes: dict[str, Any] = {}
    if cut.layers is not None or cut.num_layers is not None:
        check_cut(StudentCut(layers=cut.layers, num_layers=cut.num_layers), copy.deepcopy(skeleton))
        total = len(find_stack(skeleton))
        layers = chosen_layers(cut, total)
        notes = {"num_layers_before": total, "layers": layers, "remarks": cut_layers(skeleton, layers)}
    _set_widths(skeleton.config.get_text_config(), cut)
    return notes


def _num_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _set_widths(config: Any, cut: StudentCut) -> None:
    wanted = {name: size for name, size in vars(cut.widths).items() if size is not None}
    one_per_head = getattr(config, "num_key_value_heads", None) == getattr(config, "num_attention_heads", None)
    if one_per_head and hasattr(config, "num_key_value_heads") and "num_heads" in wanted:
        wanted.setdefault("num_key_value_heads", wanted["num_heads"])
    for name, size in wanted.items():
        entry = _IN_CONFIG.get(name, name)
        if not isinstance(getattr(config, entry, None), int):
            raise RecipeError(f"{config.model_type} has no single {entry} in its config", key=f"{_SECTION}.{name}")
        setattr(config, entry, size)

"""Injects any adapter method of ``specs.methods`` through PEFT, and reports what is trained."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftlab.adapters.target_modules import check_modules_to_save, check_targets, is_adaptable
from peftlab.errors import RecipeError
from peftlab.specs.methods import METHODS


@dataclass(frozen=True)
class AdapterReport:
    """What is adapted and how much is trained (numbers of parameters and modules)."""

    num_modules: int
    num_trained: int
    num_total: int
    kinds: dict[str, int]

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} x{count}" for name, count in sorted(self.kinds.items()))
        share = 100 * self.num_trained / self.num_total
        return f"{self.num_trained:,} of {self.num_total:,} parameters trained ({share:.2f} %) in {self.num_modules} modules: {kinds}"


def inject(
    model: nn.Module,
    method: str,
    *,
    peft_type: str | None,
    targets: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] = (),
    kernels: str = "auto",
    **options: Any,
) -> Any:
    """The model with adapters injected by PEFT (a ``PeftModel``); only the adapters require gradients.

    Args:
        method: name in ``specs.methods`` of a method that adds an adapter.
        peft_type: PEFT task type, such as ``CAUSAL_LM``; None if PEFT has none: the modules outside the body are then the
            head, which is trained in full, as PEFT does for sequence classifiers.
        targets: ``all-linear``, module name endings, or one regular expression over full module names.
        kernels: auto, triton or reference; see ``fused.set_kernels``. No effect for a method without fused layers.
        options: the method's other keys of the section ``adapter``, such as ``rank``.
    Raises: RecipeError if a target or a module to save matches nothing.
    """
    import peft

    from peftlab.adapters import fused

    spec = METHODS[method]
    assert spec.config is not None
    check_targets(model, targets)
    check_modules_to_save(model, modules_to_save)
    head = _head(model) if peft_type is None else []
    alpha = options.get("alpha")
    if alpha is not None and float(alpha).is_integer():
        options["alpha"] = int(alpha)  # as in PEFT's own files
    config = getattr(peft, spec.config)(
        task_type=peft_type,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=[*head, *(m for m in modules_to_save if m not in head)] or None,
        exclude_modules=_inside(head),
        **{spec.keys[key]: value for key, value in options.items()},
        **spec.fixed,
    )
    if isinstance(config, peft.LoraConfig):
        fused.register(config)
    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute of transformers 5 under its old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        peft_model = peft.get_peft_model(model, config)
    fused.set_kernels(peft_model, kernels)
    return peft_model


def planned_modules(model: nn.Module, *, peft_type: str | None, targets: str | Sequence[str]) -> list[str]:
    """Full names of the modules of a model without adapters that match ``targets``, by PEFT's own rules."""
    from peft import LoraConfig, PeftConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    config: PeftConfig = LoraConfig(
        task_type=peft_type,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=_inside(_head(model)) if peft_type is None else None,
    )
    config = _maybe_include_all_linear_layers(config, model)
    return [
        name
        for name, module in model.named_modules()
        if is_adaptable(module) and check_target_module_exists(config, name)
    ]


def report(model: Any) -> AdapterReport:
    """Counts over an injected model. Raises: RecipeError if nothing is trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    kinds: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            kinds[name.rsplit(".", 1)[-1]] = kinds.get(name.rsplit(".", 1)[-1], 0) + 1
    trained, total = model.get_nb_trainable_parameters()
    if not trained or not kinds:
        raise RecipeError("no module was adapted, so nothing would be trained", key="adapter.targets")
    return AdapterReport(sum(kinds.values()), trained, total, kinds)


def _head(model: nn.Module) -> list[str]:
    """Names of the modules with weights outside the body of a transformers model."""
    body: Any = model.base_model
    return [n for n, child in model.named_children() if child is not body and any(True for _ in child.parameters())]


def _inside(modules: Sequence[str]) -> str | None:
    """A regular expression for the names of ``modules`` and all their submodules; None without modules."""
    return rf"({'|'.join(map(re.escape, modules))})(\..*)?" if modules else None

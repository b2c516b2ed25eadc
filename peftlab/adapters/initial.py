"""Initialisations of LoRA that look at training rows, and those that change the base weights.

PiSSA, OLoRA, CorDA and LoRA-GA begin with a part of each weight in the adapter and take it out of the weight. Their adapter
means nothing on the model's own files, so what is saved is a plain LoRA of twice the rank: ``[A; A_0]`` and ``[B, -B_0]``, whose
product is what training changed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.errors import RecipeError

_KEY = "adapter.init_lora_weights"
_NEED_ROWS = ("eva", "corda", "lora_ga")
_CHANGE_WEIGHTS = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class InitialRows:
    """Training rows for an initialisation.

    Attributes: inputs: the model's arguments for each batch. loss: mean loss of a model on a batch, by index.
    """

    inputs: Sequence[dict[str, Tensor]]
    loss: Callable[[nn.Module, int], Tensor]


def needs_rows(config: Any) -> bool:
    """Whether the initialisation of this configuration looks at training rows."""
    return getattr(config, "init_lora_weights", None) in _NEED_ROWS


def before_injection(model: nn.Module, config: Any, rows: InitialRows | None) -> None:
    """Collects what CorDA and LoRA-GA initialise from. Raises: RecipeError for quantized weights, and without rows."""
    kind = getattr(config, "init_lora_weights", None)
    if kind == "loftq" and not torch.cuda.is_available():
        raise RecipeError("PEFT initialises LoftQ on a GPU only; remove it, or train on one", key=_KEY)
    if kind not in ("corda", "lora_ga"):
        return
    given = _rows(rows, kind)
    with _quiet():
        if kind == "corda":
            from peft.tuners.lora.corda import preprocess_corda

            _set_default(config, "corda_config", "CordaConfig")
            preprocess_corda(model, config, run_model=lambda: _run(model, given))
        else:
            from peft.tuners.lora.loraga import preprocess_loraga

            _set_default(config, "lora_ga_config", "LoraGAConfig")
            preprocess_loraga(model, config, train_step=lambda: _backward(model, given))
    model.zero_grad(set_to_none=True)


def after_injection(model: Any, rows: InitialRows | None) -> None:
    """Initialises EVA's factors, and remembers the first factors of an adapter that changed the base weights."""
    config = model.peft_config["default"]
    kind = getattr(config, "init_lora_weights", None)
    if kind == "eva":
        _initialise_eva(model, _rows(rows, kind))
    if changes_weights(kind):
        names = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.")
        first = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if any(part in n for part in names)}
        model.first_factors = first


def as_plain_lora(model: Any, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``state``, PEFT's tensors of an adapter, and the changes of its configuration, for the base weights as they were before the
    adapter changed them; both unchanged for any other adapter."""
    first: dict[str, Tensor] = getattr(model, "first_factors", {})
    if not first:
        return state, {}
    config = model.peft_config["default"]
    by_name = {name.replace(".default", ""): value for name, value in first.items()}
    plain = {}
    for name, value in state.items():
        start = by_name.get(name)
        if start is None:
            plain[name] = value
        elif ".lora_A." in name or ".lora_embedding_A" in name:
            plain[name] = torch.cat([value.cpu(), start.to(value.dtype)], dim=0)
        else:
            plain[name] = torch.cat([value.cpu(), -start.to(value.dtype)], dim=1)
    wider = 2**0.5 if config.use_rslora else 2
    changes = {
        "r": 2 * config.r,
        "lora_alpha": wider * config.lora_alpha,
        "rank_pattern": {name: 2 * rank for name, rank in config.rank_pattern.items()},
        "alpha_pattern": {name: wider * alpha for name, alpha in config.alpha_pattern.items()},
        "init_lora_weights": True,
        "corda_config": None,
        "lora_ga_config": None,
    }
    return plain, changes


def changes_weights(kind: object) -> bool:
    """Whether LoRA with this ``init_lora_weights`` takes its first factors out of the base weights."""
    return isinstance(kind, str) and kind.startswith(_CHANGE_WEIGHTS)


def _rows(rows: InitialRows | None, kind: str) -> InitialRows:
    if rows is None:
        raise RecipeError(f"{kind} initialises the adapter from training rows, and there are none here", key=_KEY)
    return rows


def _set_default(config: Any, name: str, config_class: str) -> None:
    from peft.tuners.lora import config as lora_config

    if getattr(config, name) is None:
        setattr(config, name, getattr(lora_config, config_class)())


@torch.no_grad()
def _run(model: nn.Module, rows: InitialRows) -> None:
    """Runs the model on each row alone: CorDA's hooks take the inputs of one row."""
    model.eval()
    for inputs in rows.inputs:
        for i in range(len(next(iter(inputs.values())))):
            row = {name: value[i : i + 1] for name, value in inputs.items()}
            mask = row.pop("attention_mask", None)
            if mask is not None:
                row = {name: value[:, mask[0].bool()] for name, value in row.items()}
            model(**row)


def _backward(model: nn.Module, rows: InitialRows) -> None:
    for index in range(len(rows.inputs)):
        rows.loss(model, index).backward()


def _initialise_eva(model: Any, rows: InitialRows) -> None:
    from peft import initialize_lora_eva_weights

    def flat(layer_input: Any, mask: Tensor | None, name: str) -> Tensor:
        """[n, H] the inputs of a layer at real tokens."""
        x: Tensor = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
        return x[mask] if mask is not None and x.shape[:2] == mask.shape else x.reshape(-1, x.shape[-1])

    def real(inputs: dict[str, Tensor], config: Any) -> Tensor | None:
        mask = inputs.get("attention_mask")
        return None if mask is None else mask.bool()

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with _quiet():
            initialize_lora_eva_weights(
                model,
                list(rows.inputs),
                prepare_model_inputs_fn=real,
                prepare_layer_inputs_fn=flat,
                show_progress_bar=False,
            )
    except (ValueError, TypeError, RuntimeError) as error:
        raise RecipeError(f"PEFT cannot initialise EVA from these rows: {error}", key=_KEY) from error
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps PEFT's progress bars from the terminal."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield

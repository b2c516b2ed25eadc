"""The formula of each method on each kind of layer, against the forward and the merge of PEFT in float64."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftlab.adapters import formulas
from peftlab.adapters.layer_rules import rule_of


class Experts(nn.Module):
    """Three experts of 6 -> 8 -> 6 in bare parameters, all of which see each row."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, *((6, 8) if is_transposed else (8, 6))))
        self.down = nn.Parameter(torch.randn(3, *((8, 6) if is_transposed else (6, 8))))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w if self.is_transposed else w.mT for w in (self.up, self.down))
        return (x @ up).relu() @ down


class Layers(nn.Module):
    """One of each kind of layer that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 16)
        self.gpt2 = Conv1D(10, 16)
        self.embed = nn.Embedding(20, 12)
        self.conv = nn.Conv2d(4, 8, (3, 2), stride=2, padding=1)
        self.square = nn.Conv2d(4, 8, 3)
        self.point = nn.Conv2d(4, 8, 1)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.line = nn.Conv1d(4, 24, 3)
        self.volume = nn.Conv3d(4, 8, 2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.experts = Experts(is_transposed=False)
        self.transposed = Experts(is_transposed=True)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


_INPUTS: dict[str, Callable[[], Tensor]] = {
    "linear": lambda: torch.randn(5, 12),
    "gpt2": lambda: torch.randn(5, 16),
    "embed": lambda: torch.arange(20),
    "conv": lambda: torch.randn(2, 4, 6, 7),
    "square": lambda: torch.randn(2, 4, 5, 5),
    "point": lambda: torch.randn(2, 4, 3, 3),
    "grouped": lambda: torch.randn(2, 4, 5, 5),
    "line": lambda: torch.randn(2, 4, 7),
    "volume": lambda: torch.randn(2, 4, 3, 3, 3),
    "experts": lambda: torch.randn(5, 6),
    "transposed": lambda: torch.randn(5, 6),
}
CONVS = ["conv", "point", "line", "volume"]
PLAIN = ["linear", "gpt2", "embed", *CONVS]
PARAMETERS = ["experts.up", "experts.down", "transposed.up", "transposed.down", "linear.weight"]


def lora(targets: list[str], **options: Any) -> Any:
    return peft.LoraConfig(target_modules=targets, r=3, lora_alpha=5, **options)


def oft(targets: list[str], **options: Any) -> Any:
    return peft.OFTConfig(target_modules=targets, **{"oft_block_size": 4, **options})


# Scalings and radii that float32 holds exactly, since PEFT rounds some of them to it.
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: lora(PLAIN),
    "lora-bias": lambda: lora(["linear", "gpt2", *CONVS], lora_bias=True),
    "rslora-patterns": lambda: lora(PLAIN, use_rslora=True, rank_pattern={"linear": 2}, alpha_pattern={"gpt2": 7}),
    "parameters": lambda: lora([], target_parameters=PARAMETERS, rank_pattern={r"experts\.down": 2}),
    "dora": lambda: lora(PLAIN, use_dora=True),
    "pissa": lambda: lora(["linear"], init_lora_weights="pissa"),
    "olora": lambda: lora(["linear"], init_lora_weights="olora"),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["linear", "gpt2"], init_r=4, lora_alpha=6, total_step=9),
    "ia3": lambda: peft.IA3Config(target_modules=["linear", "gpt2", "conv", "grouped", "volume"], feedforward_modules=[]),
    "ia3-inputs": lambda: peft.IA3Config(
        target_modules=(names := ["linear", "gpt2", "square", "grouped", "volume"]), feedforward_modules=names
    ),
    "vera": lambda: peft.VeraConfig(target_modules=["linear", "gpt2"], r=5),
    "loha": lambda: peft.LoHaConfig(target_modules=["linear", "conv", "point", "grouped", "line"], r=3, alpha=6),
    "loha-effective": lambda: peft.LoHaConfig(
        target_modules=["conv", "point", "grouped", "line"], r=3, alpha=6, use_effective_conv2d=True
    ),
    "lokr": lambda: peft.LoKrConfig(target_modules=["linear", "conv", "point", "grouped"], r=9, alpha=5),
    "lokr-factors": lambda: peft.LoKrConfig(
        target_modules=["linear", "conv", "point", "line"], r=1, alpha=5, decompose_both=True, decompose_factor=4
    ),
    "lokr-effective": lambda: peft.LoKrConfig(
        target_modules=["conv"], r=1, alpha=6, use_effective_conv2d=True, decompose_factor=2
    ),
    "oft": lambda: oft(["linear", "point", "embed"], use_cayley_neumann=False),
    "oft-series": lambda: oft(["linear", "point", "embed"], num_cayley_neumann_terms=6),
    "oft-three-terms": lambda: oft(["linear"], num_cayley_neumann_terms=3),
    "oft-shared": lambda: oft(["linear", "embed"], block_share=True),
    "coft": lambda: oft(["linear", "embed"], oft_block_size=3, coft=True, eps=0.125),
}  # fmt: skip


def adapted(name: str) -> Any:
    """A PEFT model in float64 with other values in all that is trained."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Layers(), CONFIGS[name]()).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model.eval()


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def by_rule(model: Any) -> Any:
    """The base model with the formulas in its weights."""
    model = copy.deepcopy(model)
    for name, layer in list(tuner_layers(model)):
        rule, base = rule_of(layer), layer.get_base_layer()
        assert rule is not None, name
        changes = [(rule.parameter, rule.weight)]
        if rule.parameter == "weight" and getattr(base, "bias", None) is not None:
            changes.append(("bias", rule.bias))
        for parameter, change in changes:
            getattr(base, parameter).data = change(getattr(base, parameter).detach()).contiguous()
    return model.unload()


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def outputs(model: nn.Module, name: str) -> Tensor:
    torch.manual_seed(1)
    x = _INPUTS[name]()
    result: Tensor = model.get_submodule(name)(x.double() if x.is_floating_point() else x)
    return result


def errors(name: str) -> dict[str, float]:
    """Relative distance of each layer's outputs with the formula in its weight from those of PEFT's forward."""
    model = adapted(name)
    plain, changed = Layers().double(), by_rule(model)
    names = {n.split(".base_layer")[0].removeprefix("base_model.model.") for n, _ in tuner_layers(model)}
    found = {}
    for n in names:
        wanted = outputs(model.base_model.model, n)
        found[n] = distance(outputs(changed, n), wanted)
        assert distance(outputs(plain, n), wanted) > 0.01, "the adapter does nothing"
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_by_formula_give_the_outputs_of_the_adapted_layer(name: str) -> None:
    found = errors(name)
    assert found and max(found.values()) < 1e-12, found


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_formula_gives_the_weights_of_pefts_merge(name: str) -> None:
    model = adapted(name)
    changed = by_rule(model).state_dict()
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    assert changed.keys() == merged.keys()
    for key, value in merged.items():
        assert distance(changed[key], value) < 1e-12, key


def no_scale(down: Tensor, up: Tensor, scale: float) -> Tensor:
    return up @ down


FAULTS: dict[str, tuple[str, str, Callable[..., Tensor]]] = {
    "scaling lost": ("lora", "low_rank", no_scale),
    "experts swapped": (
        "parameters",
        "expert_low_rank",
        lambda *a, true=formulas.expert_low_rank: true(*a)[[1, 0, 2]],
    ),
    "factor of experts transposed": (
        "parameters",
        "expert_low_rank",
        lambda down, up, n, scale: torch.einsum(
            "nr,rk->nk", up, down
        ).expand(n, -1, -1) * scale,
    ),
    "magnitude forgotten": ("dora", "dora", lambda weight, update, magnitude: weight + update),
    "norm of the other side": (
        "dora",
        "dora",
        lambda w, d, m: m[:, None] / (w + d).norm() * (w + d),
    ),
    "values forgotten": ("adalora", "singular", lambda down, values, up, scale: scale * up @ down),
    "one scale forgotten": ("vera", "vera", lambda down, up, d, b: up @ (d[:, None] * down)),
    "sum for product": ("loha", "loha", lambda first, second, scale: scale * (first + second)),
    "modes swapped": (
        "loha-effective",
        "tucker",
        lambda core, outs, ins, true=formulas.tucker: true(core.transpose(0, 1), outs, ins),
    ),
    "factors swapped": ("lokr", "lokr", lambda one, two, scale: torch.kron(two.flatten(1), one) * scale),
    "inverse rotation": ("oft", "cayley", lambda q, true=formulas.cayley: true(-q)),
    "series cut": ("oft-series", "cayley_series", lambda q, n, true=formulas.cayley_series: true(q, n - 1)),
    "not projected": ("coft", "within", lambda skewed, radius: skewed),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_formula_is_seen_in_every_layer(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, function, wrong = FAULTS[fault]
    monkeypatch.setattr(formulas, function, wrong)
    found = errors(name)
    if function in ("expert_low_rank", "tucker"):
        found = {n: e for n, e in found.items() if n not in ("linear", "point")}  # layers that do not use it
    assert min(found.values()) > 1e-4, found


@pytest.mark.parametrize("name", ["lora", "dora", "parameters", "ia3-inputs", "loha", "lokr", "oft", "vera", "adalora"])
def test_rules_do_not_keep_the_weights_in_memory(name: str) -> None:
    model = adapted(name)
    rules = [rule_of(layer) for _, layer in tuner_layers(model)]
    weights = [weakref.ref(p) for n, p in model.named_parameters() if "base_layer" in n and n.endswith("weight")]
    assert rules and weights
    del model
    gc.collect()
    assert not any(weight() is not None for weight in weights)


def test_layers_without_a_formula_have_no_rule() -> None:
    for config in (
        peft.LoraConfig(target_modules=["grouped"], r=2),  # PEFT does not merge it
        peft.LoKrConfig(target_modules=["line"], r=9),  # PEFT trains another product
        peft.HiraConfig(target_modules=["linear"], r=2),
        peft.OFTConfig(target_modules=["linear"], oft_block_size=4, num_cayley_neumann_terms=2),
    ):
        (layer,) = [layer for _, layer in tuner_layers(peft.get_peft_model(Layers(), config))]
        assert rule_of(layer) is None
        assert rule_of(layer, "another") is None

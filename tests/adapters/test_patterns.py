"""Settings for some of the adapted modules: rank, alpha, dropout and learning rate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftlab
from peftlab.adapters import Pattern, inject, rate_factors, save_adapter
from peftlab.errors import Interrupted, RecipeError
from peftlab.training.optimizers import make_optimizer
from peftlab.training.progress import SilentProgress
from tests.run_examples import Stopper, recipe, write_data

IDS = torch.arange(3, 27).reshape(2, 12)
PATTERNS = (
    Pattern(["q_proj"], rank=2, alpha=6, lr=3e-3),
    Pattern(r".*mlp\.up_proj", layers=[1], dropout=0.5),
)


@pytest.fixture
def base(tiny: Callable[..., Any]) -> Any:
    return tiny("tiny:llama", adapter=False)


def lora(base: Any, patterns: Any = PATTERNS, **options: Any) -> Any:
    torch.manual_seed(0)
    return inject(base, "lora", peft_type="CAUSAL_LM", patterns=patterns, **{"rank": 4, "alpha": 8, **options})


def test_patterns_set_rank_scaling_and_dropout_where_they_match(base: Any) -> None:
    layers = {n: m for n, m in lora(base).get_base_model().named_modules() if hasattr(m, "lora_A")}
    for name, layer in layers.items():
        rank = 2 if name.endswith("q_proj") else 4
        assert layer.lora_A["default"].out_features == rank, name
        assert layer.scaling["default"] == (6 / 2 if rank == 2 else 8 / 4), name
        dropout = layer.lora_dropout["default"]
        assert (getattr(dropout, "p", 0.0) == 0.5) is (name == "model.layers.1.mlp.up_proj"), name


def test_pattern_dropout_acts_in_training_only(base: Any) -> None:
    model = lora(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        model.eval()
        assert torch.equal(model(IDS).logits, model(IDS).logits)
        model.train()
        assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_adapter_with_patterns_opens_in_plain_peft(base: Any, tmp_path: Path) -> None:
    untouched = copy.deepcopy(base)
    model = lora(base).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        wanted = model(IDS).logits
        save_adapter(model, tmp_path)
        plain = peft.PeftModel.from_pretrained(untouched, tmp_path).eval()
        torch.testing.assert_close(plain(IDS).logits, wanted, rtol=1e-5, atol=1e-5)


def test_loha_has_patterns_of_rank(base: Any) -> None:
    model = inject(base, "loha", peft_type="CAUSAL_LM", rank=4, alpha=4, patterns=[Pattern(["q_proj"], rank=2)])
    ranks = {n.split(".")[-3]: p.shape[1] for n, p in model.named_parameters() if "hada_w1_a" in n}
    assert ranks["q_proj"] == 2 and ranks["v_proj"] == 4


@pytest.mark.parametrize(
    ("method", "patterns", "message", "key"),
    [
        ("lora", [Pattern(["q_proj"], rank=2), Pattern(["q_proj", "v_proj"], rank=3)],
         "model.layers.0.self_attn.q_proj matches this pattern and pattern 0", "adapter.patterns.1.targets"),
        ("lora", [Pattern(["qproj"], rank=2)], "matches none of the 14 adapted modules", "adapter.patterns.0.targets"),
        ("lora", [Pattern(["q_proj"], rank=2, layers=[7])], "there is no block 7", "adapter.patterns.0.layers"),
        ("vera", [Pattern(["q_proj"], rank=2)], "vera has one rank for all modules", "adapter.patterns.0.rank"),
        ("loha", [Pattern(["q_proj"], dropout=0.5)], "loha has one dropout for all modules", "adapter.patterns.0.dropout"),
    ],
)  # fmt: skip
def test_wrong_pattern_is_refused(base: Any, method: str, patterns: Any, message: str, key: str) -> None:
    with pytest.raises(RecipeError) as error:
        inject(base, method, peft_type="CAUSAL_LM", rank=4, patterns=patterns)
    assert message in str(error.value)
    assert error.value.key == key


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_first_step_of_each_parameter_is_its_own_rate(base: Any, ratio: float) -> None:
    """AdamW's first step is the rate times the sign of the gradient: an independent reading of the rates."""
    model = lora(base)
    lr = 1e-3
    optimizer = make_optimizer(
        model, "adamw", lr=lr, factors=rate_factors(model, lr, ratio), betas=(0.9, 0.999), weight_decay=0.0
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = (3e-3 if ".q_proj." in name else lr) * (ratio if ".lora_B." in name else 1)
            torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, rate), rtol=1e-3, atol=1e-7)


def test_groups_of_rates_keep_vectors_from_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = make_optimizer(
        model, "adamw", lr=1.0, factors={"1.weight": 2.0, "1.bias": 2.0}, betas=(0.9, 0.999), weight_decay=0.5
    )
    found = {(g["factor"], p.dim(), g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == {(1.0, 2, 0.5), (1.0, 1, 0.0), (2.0, 2, 0.5), (2.0, 1, 0.0)}


def test_run_with_rates_follows_its_schedule_and_resumes_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    adapter = {"patterns": [{"targets": ["q_proj"], "rank": 2, "lr": 1e-3}, {"targets": ["up_proj"], "dropout": 0.5}]}
    train = {"loraplus_lr_ratio": 4, "max_steps": 6}

    def document(folder: str, **run: Any) -> dict[str, Any]:
        return recipe(adapter=adapter, train=train, run={"dir": folder, **run})

    peftlab.train(document("run"), progress=SilentProgress())
    with pytest.raises(Interrupted):
        peftlab.train(document("other", save_every=2), progress=Stopper(at=3))
    peftlab.train("other", resume=True, progress=SilentProgress())
    plain = recipe(adapter={"patterns": adapter["patterns"]}, train={"max_steps": 6}, run={"dir": "plain"})
    peftlab.train(plain, progress=SilentProgress())
    files = [Path(name, "adapter/adapter_model.safetensors").read_bytes() for name in ("run", "other", "plain")]
    assert files[0] == files[1] != files[2]

"""Settings for some of the adapted modules: rank, alpha, dropout and learning rate."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import peftlab
from peftlab.adapters import Pattern, inject, rate_factors, save_adapter
from peftlab.adapters.fused import set_kernels
from peftlab.adapters.patterns import assigned
from peftlab.errors import Interrupted, RecipeError
from peftlab.training import loop, optimizers
from peftlab.training.loop import LoopSettings
from peftlab.training.optimizers import make_optimizer
from peftlab.training.progress import SilentProgress
from tests.run_examples import Stopper, recipe, write_data
from tests.training.test_loop import Bench

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


def randomized(model: Any) -> Any:
    """The model with factors B that are not 0, so that every setting of a layer shows in the outputs."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


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


def differs(ours: Any, plain: Any, tolerance: float = 1e-5) -> float:
    """The largest difference of two lists of tensors, in units of ``tolerance`` times the largest value of each."""
    return max(float((a - b).abs().max() / (tolerance * b.abs().max())) for a, b in zip(ours, plain, strict=True))


def outputs_and_gradients(model: Any, kernels: str) -> list[Any]:
    set_kernels(model, kernels)
    model.zero_grad(set_to_none=True)
    logits = model(IDS).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_fused_layers_with_patterns_equal_pefts_own(base: Any, options: dict[str, Any]) -> None:
    model = randomized(lora(base, **options)).eval()
    layers = [m for m in model.modules() if hasattr(m, "slow_reason")]
    fused, plain = (outputs_and_gradients(model, kernels) for kernels in ("auto", "reference"))
    set_kernels(model, "auto")
    assert len(layers) == 14 and all(layer.slow_reason() is None for layer in layers)
    # float32, whose sums have another order.
    assert differs(fused, plain) < 1
    broken = model.get_base_model().model.layers[0].self_attn.q_proj
    broken.scaling["default"] = 8 / 4  # that of the modules without a pattern
    assert differs(outputs_and_gradients(model, "auto"), plain) > 100


def dropped(base: Any) -> dict[str, tuple[float, float]]:
    """Share of inputs that each layer drops in training, and the factor on those that it keeps."""
    patterns = (*PATTERNS, Pattern(["k_proj"], dropout=0.0))
    model = lora(base, patterns, dropout=0.25).train()
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            down = layer.lora_A["default"].weight
            seen = layer.lora_dropout["default"](torch.ones(400, down.shape[1]))
            found[name] = (float((seen == 0).float().mean()), float(seen.max()))
    return found


@pytest.mark.parametrize("fault", [False, True])
def test_dropout_of_a_pattern_is_in_its_modules_only(base: Any, fault: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault:
        module = importlib.import_module("peftlab.adapters.inject")  # the function has its name in the package
        monkeypatch.setattr(module, "set_dropout", lambda model, of_module: None)
    wrong = set()
    for name, (share, factor) in dropped(base).items():
        wanted = 0.5 if name == "model.layers.1.mlp.up_proj" else 0.0 if name.endswith("k_proj") else 0.25
        # 25,600 draws: four standard deviations are 0.0125.
        if abs(share - wanted) > 0.0125 or factor != pytest.approx(1 / (1 - wanted)):
            wrong.add(name.rsplit(".", 1)[-1])
    assert wrong == ({"up_proj", "k_proj"} if fault else set())


@pytest.mark.parametrize(
    "options",
    [
        {"rslora": True},
        {"dora": True},
        {"init_lora_weights": "pissa"},
        {"targets": ["embed_tokens", "q_proj", "up_proj"], "modules_to_save": ["norm"]},
    ],
    ids=str,
)
def test_adapter_with_patterns_of_other_kinds_opens_in_plain_peft(
    base: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    untouched = copy.deepcopy(base)
    model = randomized(lora(base, **options)).eval()
    with torch.no_grad():
        wanted = model(IDS).logits
        save_adapter(model, tmp_path)
        plain = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path).eval()
        assert differs([plain(IDS).logits], [wanted]) < 1
        # The fault that this finds: a file that has lost its patterns.
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        config["alpha_pattern"] = {}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        plain = peft.PeftModel.from_pretrained(untouched, tmp_path).eval()
        assert differs([plain(IDS).logits], [wanted]) > 10


def test_pattern_is_stronger_than_the_ranks_of_peft(base: Any) -> None:
    """PEFT takes the first name that matches, so q_proj in front of the full names hid the pattern."""
    model = lora(base, [Pattern(["q_proj"], rank=2, layers=[1])], rank_pattern={"q_proj": 3, "k_proj": 1})
    ranks = {n: m.r["default"] for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert [ranks[f"model.layers.{i}.self_attn.{n}_proj"] for n in "qkv" for i in (0, 1)] == [3, 2, 1, 1, 4, 4]


@pytest.mark.parametrize("layers", [[-1], "-1:", [1]])
def test_layers_of_a_pattern_count_the_blocks_of_the_model(base: Any, layers: Any) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    found = assigned(base, names, [Pattern(["q_proj"], rank=2, layers=layers)])
    assert list(found) == names[1:]
    with pytest.raises(RecipeError, match="matches none of the 1 adapted modules"):
        assigned(base, names[:1], [Pattern(["q_proj"], rank=2, layers=layers)])


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
        ("vera", [Pattern(["q_proj"], rank=2)], "vera takes no rank for single modules", "adapter.patterns.0.rank"),
        ("loha", [Pattern(["q_proj"], dropout=0.5)], "loha takes no dropout for single modules", "adapter.patterns.0.dropout"),
        ("vera", [Pattern(["k_proj"], lr=1.0), Pattern(["q_proj"], rank=2)],
         "vera takes no rank for single modules", "adapter.patterns.1.rank"),
        # PEFT has a rank_pattern for these two, which is another thing: the ranks that it found, or those that it keeps.
        ("adalora", [Pattern(["q_proj"], rank=2)], "adalora takes no rank for single modules", "adapter.patterns.0.rank"),
        ("osf", [Pattern(["q_proj"], rank=2)], "osf takes no rank for single modules", "adapter.patterns.0.rank"),
        ("adalora", [Pattern(["q_proj"], alpha=2)], "adalora takes no alpha for single modules", "adapter.patterns.0.alpha"),
        ("hira", [Pattern(["q_proj"], alpha=2)], "hira takes no alpha for single modules", "adapter.patterns.0.alpha"),
        ("supertuning", [Pattern(["q_proj"], dropout=0.5)], "supertuning takes no dropout", "adapter.patterns.0.dropout"),
        ("lora", [Pattern(["k_proj"], lr=1.0), Pattern(["q_proj"], rank=65)],
         "expected at most 64, the smaller side", "adapter.patterns.1.rank"),
        ("lora", [Pattern(r".*layers\.0.*q_proj", rank=2, layers=[1])], "matches none of the 14", "adapter.patterns.0.targets"),
    ],
)  # fmt: skip
def test_wrong_pattern_is_refused(base: Any, method: str, patterns: Any, message: str, key: str) -> None:
    rank = {} if method in ("osf", "supertuning") else {"rank": 4}
    with pytest.raises(RecipeError) as error:
        inject(base, method, peft_type="CAUSAL_LM", patterns=patterns, **rank)
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


def first_step_errors(bench: Bench, *, decay: float) -> dict[str, float]:
    """Relative error of the first step of the real loop, by parameter: against AdamW's first step, by hand, at its own rate."""
    lr, ratio = 1e-3, 16.0
    settings = LoopSettings(
        lr=lr,
        loraplus_lr_ratio=ratio,
        schedule="constant",
        warmup=1,
        max_grad_norm=0.0,
        optimizer_options={"betas": (0.9, 0.999), "weight_decay": decay},
    )
    training = bench.loop(settings, max_steps=1)
    before, signs = bench.weights(), dict[str, Any]()

    def take(*_: Any) -> None:
        signs.update({n: p.grad / (p.grad.abs() + 1e-8) for n, p in bench.model.named_parameters() if p.requires_grad})

    hook = register_optimizer_step_pre_hook(take)
    try:
        training.run()
    finally:
        hook.remove()
    errors = {}
    for name, after in bench.weights().items():
        peak = (3e-3 if ".q_proj." in name else lr) * (ratio if ".lora_B." in name else 1.0)
        rate = peak / 2  # the only step is the first of a warm-up of one
        wanted = -rate * (signs[name] + (decay * before[name] if before[name].dim() > 1 else 0.0))
        # A new weight is rounded to float32, which is 1e-7 of the weight.
        errors[name] = float((after - before[name] - wanted).abs().max() / (wanted.abs().max() + 1e-4))
    return errors


@pytest.mark.parametrize("fault", ["", "rates", "decay"])
def test_first_step_of_the_loop_is_at_each_parameters_rate(
    fault: str, tiny: Any, tokenizer_of: Any, accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(name: str) -> Any:
        return randomized(lora(tiny(name, adapter=False), modules_to_save=["norm"]))

    if fault == "rates":
        monkeypatch.setattr(loop, "rate_factors", lambda model, lr, ratio: {})
    if fault == "decay":
        monkeypatch.setattr(optimizers, "_decayed", lambda trained, decay: [{"params": trained, "weight_decay": decay}])
    errors = first_step_errors(Bench(model, tokenizer_of("tiny:llama"), accelerator, tmp_path), decay=0.5)
    wrong = {name for name, error in errors.items() if error > 1e-3}
    q_and_b = {name for name in errors if ".q_proj." in name or ".lora_B." in name}
    norm = {name for name in errors if "norm" in name}
    assert len(errors) == 28 + 5 and len(norm) == 5  # PEFT finds all five norms by the ending of their names
    assert wrong == {"": set(), "rates": q_and_b, "decay": norm}[fault]


def test_rates_of_patterns_and_loraplus_multiply(base: Any) -> None:
    model = lora(base, [Pattern(["q_proj"], lr=5e-4, layers=[0]), Pattern(["v_proj"], rank=2)])
    factors = rate_factors(model, 1e-3, 4.0)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    assert factors[f"{prefix}.lora_A.default.weight"] == 0.5 and factors[f"{prefix}.lora_B.default.weight"] == 2.0
    assert len(factors) == 14 + 1  # every B, and one A
    assert set(factors.values()) == {0.5, 2.0, 4.0}
    assert rate_factors(lora(copy.deepcopy(model.unload()), ()), 1e-3) == {}


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

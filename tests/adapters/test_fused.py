"""Fused LoRA layers are PEFT's layers with another forward: same numbers, same files, each fallback reported."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftlab.adapters import inject, load_adapter, planned_modules, save_adapter
from peftlab.adapters.fused import FusedLora, fused_classes, fusion_report, set_kernels

IDS = torch.arange(2, 50).view(4, 12)
STORAGES: dict[str, dict[str, Any]] = {
    "none": {},
    "nf4": {"quantize": "nf4"},
    "nf4-flat": {"quantize": "nf4", "double_quant": False},
    "int8": {"quantize": "int8"},
}


def fused_layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, FusedLora)}


def loss_and_gradients(model: Any, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    loss = model(input_ids=ids, labels=ids).loss
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def assert_same(fast: Any, reference: Any, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(fast[0], reference[0], rtol=rtol, atol=0)
    assert fast[1].keys() == reference[1].keys()
    for name, wanted in reference[1].items():
        assert wanted.any(), f"{name}: a zero gradient proves nothing"
        torch.testing.assert_close(
            fast[1][name], wanted, rtol=10 * rtol, atol=rtol * float(wanted.abs().max()), msg=name
        )


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_fused_training_equals_pefts_forward(tiny: Callable[..., Any], storage: str, dropout: float) -> None:
    model = tiny("tiny:llama", dropout=dropout, **STORAGES[storage]).train()
    fast = loss_and_gradients(model)
    report = fusion_report(model)
    assert len(report.fused) == 14
    assert not report.slow
    set_kernels(model, "compared")  # PEFT's forward, under dropout with the masks of the fused forward
    assert_same(fast, loss_and_gradients(model))
    if not dropout:
        set_kernels(model, "reference")
        assert_same(fast, loss_and_gradients(model))


@pytest.mark.parametrize("options", [{"rslora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_fused_layers_stay_fused_with_other_settings(tiny: Callable[..., Any], options: dict[str, Any]) -> None:
    model = tiny("tiny:llama", **options).train()
    assert len(fusion_report(model).fused) == 14
    fast = loss_and_gradients(model)
    set_kernels(model, "reference")
    assert_same(fast, loss_and_gradients(model))


def test_fused_layer_gives_a_trained_bias_its_gradient(tiny: Callable[..., Any]) -> None:
    model = tiny("tiny:bert", bias="lora_only").train()
    biases = [n for n, p in model.named_parameters() if n.endswith("base_layer.bias") and p.requires_grad]
    assert biases

    def run() -> Any:
        torch.manual_seed(0)
        loss = model(input_ids=IDS, labels=torch.tensor([0, 1, 0, 1])).loss
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n}
        return loss.detach(), dict(
            zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=True), strict=True)
        )

    for module in model.modules():  # the model's hidden dropout draws from the same generator in both runs
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fast = run()
    set_kernels(model, "reference")
    reference = run()
    torch.testing.assert_close(fast[0], reference[0])
    for name in biases:
        torch.testing.assert_close(fast[1][name], reference[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_fused_layers_in_bfloat16_and_autocast_are_as_exact_as_peft(tiny: Callable[..., Any]) -> None:
    model = tiny("tiny:llama", dtype="bfloat16").train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, "PEFT keeps float32 masters"
    truth_model = copy.deepcopy(model).float()
    set_kernels(truth_model, "reference")
    truth = loss_and_gradients(truth_model)
    fast = loss_and_gradients(model)
    assert len(fusion_report(model).fused) == 14
    assert all(g.dtype == torch.float32 for g in fast[1].values())
    set_kernels(model, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        reference = loss_and_gradients(model)
        set_kernels(model, "auto")
        cast = loss_and_gradients(model)
    for result in (fast, cast):
        for name, wanted in truth[1].items():
            error, allowed = ((x - wanted).norm() / wanted.norm() for x in (result[1][name], reference[1][name]))
            assert error <= 1.1 * allowed + 0.01, f"{name}: {error:.4f}, PEFT's own {allowed:.4f}"


def test_fused_comparison_catches_a_lost_scaling(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("tiny:llama").train()
    set_kernels(model, "reference")
    reference = loss_and_gradients(model)
    set_kernels(model, "auto")
    layer = next(iter(fused_layers(model).values()))
    monkeypatch.setitem(layer.scaling, "default", 1.0)
    with pytest.raises(AssertionError):
        assert_same(loss_and_gradients(model), reference)


def test_fused_adapter_files_load_in_peft_and_back(tiny: Callable[..., Any], tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny("tiny:llama").eval()
    save_adapter(model, tmp_path / "a")
    assert "custom" not in (tmp_path / "a" / "adapter_config.json").read_text()
    plain = PeftModel.from_pretrained(tiny("tiny:llama", adapter=False), str(tmp_path / "a")).eval()
    assert not fused_layers(plain)
    ours = load_adapter(tiny("tiny:llama", adapter=False), tmp_path / "a").eval()
    assert len(fused_layers(ours)) == 14
    with torch.no_grad():
        want = plain(input_ids=IDS).logits
        torch.testing.assert_close(ours(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5)
    plain.save_pretrained(str(tmp_path / "b"))
    back = load_adapter(tiny("tiny:llama", adapter=False), tmp_path / "b").eval()
    with torch.no_grad():
        assert torch.equal(back(input_ids=IDS).logits, ours(input_ids=IDS).logits)


def test_fused_layers_merge_and_unmerge(tiny: Callable[..., Any]) -> None:
    model = tiny("tiny:llama").eval()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        model.merge_adapter()
        assert set(fusion_report(model).slow.values()) == {"no adapter is active"}
        torch.testing.assert_close(model(input_ids=IDS).logits, want, rtol=1e-3, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, want, rtol=1e-3, atol=1e-4)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, want, rtol=1e-3, atol=1e-4)
    assert not fused_layers(merged)


def test_fused_layers_hot_swap_adapters(tiny: Callable[..., Any], tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    other = tiny("tiny:llama", seed=1).eval()
    save_adapter(other, tmp_path)
    model = tiny("tiny:llama", seed=0).eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
        after = model(input_ids=IDS).logits
        torch.testing.assert_close(after, other(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-3)


def test_fused_model_without_adapters_is_the_base_model(tiny: Callable[..., Any]) -> None:
    model = tiny("tiny:llama").eval()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, tiny("tiny:llama", adapter=False)(input_ids=IDS).logits)


def test_fusion_report_says_why_a_layer_is_not_fused(tiny: Callable[..., Any]) -> None:
    from peft import LoraConfig

    dora = tiny("tiny:llama", dora=True).train()
    assert set(fusion_report(dora).slow.values()) == {"it is a variant of LoRA (Dora)"}
    assert loss_and_gradients(dora)[0].isfinite()

    embedded = tiny("tiny:llama", targets=["q_proj", "embed_tokens"])
    report = fusion_report(embedded)
    assert report.slow == {"base_model.model.model.embed_tokens": "Embedding has no fused form"}
    assert str(report) == (
        "2 of 3 adapted modules run fused; 1 through PEFT, because Embedding has no fused form "
        "(base_model.model.model.embed_tokens)"
    )

    two = tiny("tiny:llama").eval()
    two.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        alone = two(input_ids=IDS).logits
        two.base_model.set_adapter(["default", "second"])
        both = two(input_ids=IDS).logits
    assert set(fusion_report(two).slow.values()) == {"2 adapters are active at once"}
    assert not torch.allclose(alone, both, atol=1e-4)

    hooked = tiny("tiny:llama", targets=["q_proj"])
    first = next(iter(fused_layers(hooked).values()))
    seen: list[int] = []
    first.base_layer.register_forward_hook(lambda *_: seen.append(1))
    hooked(input_ids=IDS)
    assert seen, "a hook inside the layer still runs"
    assert "a hook is registered inside it" in fusion_report(hooked).slow.values()

    trained = tiny("tiny:llama", targets=["q_proj"])
    next(iter(fused_layers(trained).values())).base_layer.weight.requires_grad_(True)
    assert "its base weight is trained" in fusion_report(trained).slow.values()

    mixed = tiny("tiny:llama", targets=["q_proj"], dtype="bfloat16")
    layer = next(iter(fused_layers(mixed).values()))
    assert layer.slow_reason(torch.ones(1, 64)) == "its input is torch.float32, its weight torch.bfloat16"


def test_fused_classes_leave_other_libraries_linears_to_peft() -> None:
    """torchao, GPTQ and others subclass nn.Linear or put tensor subclasses into it."""

    class Quantized(nn.Linear):
        pass

    class Packed(nn.Parameter):
        pass

    plain = nn.Linear(4, 4)
    key = list(fused_classes())[-1]
    assert isinstance(plain, key)
    assert not isinstance(Quantized(4, 4), key)
    plain.weight = Packed(torch.ones(4, 4))
    assert not isinstance(plain, key)
    assert not isinstance(nn.Embedding(4, 4), key)


def test_fused_classes_leave_bare_parameters_to_peft(tiny: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model

    from peftlab.adapters.fused import register

    base = tiny("tiny:llama", adapter=False)
    model = get_peft_model(base, register(LoraConfig(target_modules=[], target_parameters=["q_proj.weight"])))
    assert not fused_layers(model)
    assert "lora.ParamWrapper" in repr(model)


def test_fused_model_prints_like_pefts(tiny: Callable[..., Any]) -> None:
    assert "(q_proj): lora.Linear(" in repr(tiny("tiny:llama"))
    assert "(q_proj): lora.Linear4bit(" in repr(tiny("tiny:llama", quantize="nf4"))


@pytest.mark.parametrize("storage", ["none", "nf4"])
def test_fused_model_survives_pickle(tiny: Callable[..., Any], storage: str) -> None:
    model = tiny("tiny:llama", **STORAGES[storage]).eval()
    again = pickle.loads(pickle.dumps(model))
    assert len(fused_layers(again)) == len(fused_layers(model)) > 0
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_fused_layers_run_batches_of_mixed_adapters(tiny: Callable[..., Any]) -> None:
    from peft import LoraConfig

    model = tiny("tiny:llama").eval()
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["default", "second", "__base__", "default"]).logits
        for name, row in (("default", 0), ("second", 1)):
            model.set_adapter(name)
            torch.testing.assert_close(model(input_ids=IDS).logits[row], mixed[row], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fused_layer_replays_dropout_masks_in_activation_checkpointing(
    tiny: Callable[..., Any], dropout: float
) -> None:
    layer = next(iter(fused_layers(tiny("tiny:llama", dropout=dropout).train()).values()))
    x = torch.randn(6, layer.in_features, requires_grad=True)
    inputs = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    results = []
    for run in (layer, lambda value: checkpoint(layer, value, use_reentrant=False)):
        torch.manual_seed(3)
        y = run(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), inputs)])
    for plain, replayed in zip(*results, strict=True):
        assert torch.equal(plain, replayed)


def test_fused_dropout_is_off_outside_training(tiny: Callable[..., Any]) -> None:
    model = tiny("tiny:llama", dropout=0.5).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_fused_inference_builds_no_graph(tiny: Callable[..., Any]) -> None:
    layer = next(iter(fused_layers(tiny("tiny:llama").eval()).values()))
    with torch.no_grad():
        assert layer(torch.randn(3, layer.in_features)).grad_fn is None


@pytest.mark.parametrize("storage", ["none", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_fused_layer_compiles_into_one_graph(tiny: Callable[..., Any], storage: str, dropout: float) -> None:
    layer = next(iter(fused_layers(tiny("tiny:llama", dropout=dropout, **STORAGES[storage]).train()).values()))
    x = torch.randn(6, layer.in_features, requires_grad=True)
    inputs = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    torch.manual_seed(3)
    eager = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    output = compiled(x)
    torch.testing.assert_close(output, eager)
    for got, want in zip(
        torch.autograd.grad(output.sum(), inputs), torch.autograd.grad(eager.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("tiny:llama", "all-linear"),
        ("tiny:llama", r".*layers\.1\..*_proj"),
        ("tiny:llama", ["q_proj", "0.mlp.up_proj", "embed_tokens"]),
        ("tiny:bert", "all-linear"),
        ("tiny:bert", ["query", "output.dense"]),
    ],
)
def test_planned_modules_are_the_adapted_modules(tiny: Callable[..., Any], name: str, targets: Any) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    base, peft_type = tiny(name, adapter=False), "CAUSAL_LM" if name == "tiny:llama" else "SEQ_CLS"
    planned = planned_modules(base, peft_type=peft_type, targets=targets)
    model = inject(base, "lora", peft_type=peft_type, rank=2, alpha=4, targets=targets)
    adapted = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert set(planned) == adapted
    assert planned


def test_set_kernels_refuses_an_unknown_mode(tiny: Callable[..., Any]) -> None:
    known = "auto, triton, cpu-bf16, cpu-int8, reference, compared"
    with pytest.raises(ValueError, match=f"expected kernels as one of {known}, found 'fast'"):
        set_kernels(tiny("tiny:llama"), "fast")


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["none", "nf4", "int8"])
def test_fused_training_of_a_real_model_equals_pefts_for_twenty_steps(tmp_path: Path, storage: str) -> None:
    """Compares losses and trained updates B A of SmolLM2. AdamW turns rounding of near-zero gradients into whole steps."""
    import peftlab
    from peftlab.training.metrics_log import read_metrics
    from peftlab.training.progress import SilentProgress

    # All layers, at a rate that does not enlarge rounding: the recipe's own would.
    shared = [
        "train.max_steps=20", "train.batch_tokens=160", "train.lr=1.0e-3", "train.accumulate=1", "adapter.targets=all-linear",
        "data.max_length=150", "data.eval_rows=10", "eval.before=false", "eval.prompts=[]", "run.merge=none",
        f"model.quantize={storage}",
    ]  # fmt: skip
    losses, updates = {}, {}
    for kernels in ("auto", "reference"):
        folder = tmp_path / kernels
        run = peftlab.train(
            "quickstart", [*shared, f"run.kernels={kernels}", f"run.dir={folder}"], progress=SilentProgress()
        )
        assert run.summary["parity"]["num_fused"] == (210 if kernels == "auto" else 0)
        losses[kernels] = [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
        tensors = load_file(str(folder / "adapter" / "adapter_model.safetensors"))
        updates[kernels] = [tensors[n.replace("lora_A", "lora_B")] @ tensors[n] for n in tensors if "lora_A" in n]
    assert len(losses["auto"]) == 20
    assert losses["auto"][-1] < 0.8 * losses["auto"][0], "nothing was learned, so nothing is compared"
    # A loss near zero is the difference of two numbers near 20, each rounded by up to 2.4e-6.
    torch.testing.assert_close(torch.tensor(losses["auto"]), torch.tensor(losses["reference"]), rtol=1e-3, atol=5e-6)
    gap = sum(float((a - b).square().sum()) for a, b in zip(updates["auto"], updates["reference"], strict=True))
    size = sum(float(b.square().sum()) for b in updates["reference"])
    assert (gap / size) ** 0.5 < 0.02

"""The parity gate: what it accepts, how it names each injected fault, and that it does not change the run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peftlab_kernels import runtime
from peftlab_kernels.lora_linear import base as base_module
from peftlab_kernels.lora_linear import cpu_products
from peftlab_kernels.lora_linear import plan as plan_module

import peftlab
from peftlab import ops
from peftlab.adapters.inject import inject
from peftlab.assembly import fit as fit_module
from peftlab.assembly import prepare as prepare_module
from peftlab.errors import RecipeError, VerificationError
from peftlab.tasks import causal_lm, seq_cls
from peftlab.tasks.causal_lm import CausalLM
from peftlab.tasks.seq_cls import SequenceClassification
from peftlab.training import parity
from peftlab.training.progress import SilentProgress

RIGHT_LORA_LINEAR = ops.lora_linear


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [f"{word} {i},{kind}" for i in range(8) for word, kind in (("red", "colour"), ("a cat", "animal"))]
    (tmp_path / "data.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    return tmp_path


def recipe(task: str = "causal_lm", **changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"train": "data.csv", "eval_rows": 4}
    if task == "causal_lm":
        data["template"] = {"user": "{text}", "assistant": "{label}"}
    return {
        "task": task,
        "model": {"name": "tiny:llama" if task == "causal_lm" else "tiny:bert", **changes.get("model", {})},
        "data": data,
        "adapter": {"rank": 4, "alpha": 8, **changes.get("adapter", {})},
        "train": {"max_steps": 2, "batch_size": 8},
        "eval": {"before": False},
        "run": {"dir": "run", **changes.get("run", {})},
    }


@pytest.mark.parametrize(
    ("task", "kernels", "quantize"),
    [
        ("causal_lm", "cpu-bf16", "none"),
        ("causal_lm", "cpu-bf16", "nf4"),
        ("causal_lm", "cpu-int8", "int8"),
        ("seq_cls", "cpu-int8", "int8"),  # its head has no int8 weights
    ],
)
def test_parity_tells_rounded_operands_from_faults(
    here: Path, monkeypatch: pytest.MonkeyPatch, any_processor: None, task: str, kernels: str, quantize: str
) -> None:
    """The training path is compared in float32, then with its rounding. Evaluation uses the rounding too."""
    changes = {"task": task, "model": {"quantize": quantize}}
    exact = train(**changes).summary["after"]
    run = train(**changes, run={"kernels": kernels, "dir": "rounded"})
    report = run.summary["parity"]
    assert report["worst_cosine"] > 0.9999 and report["rounded"]["worst_cosine"] > 0.9
    assert report["num_fused"] == report["num_adapted"]
    assert run.summary["after"]["loss"] == pytest.approx(exact["loss"], rel=2e-2)

    def doubled(y_MN: Any, x_MK: Any, base: Any, operands: str) -> None:
        y_MN.add_(2 * x_MK @ base_module.as_float(base, x_MK.dtype, backend="torch").t())

    monkeypatch.setattr(cpu_products, "add_product", doubled)
    with pytest.raises(VerificationError, match=r"differs between|is .* on the training path"):
        train(**changes, run={"kernels": kernels, "dir": "faulty"})


def test_parity_tells_plans_that_round_no_rows_from_faults(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, bitsandbytes' layers round rows of x to 8 bits in training; here a patch forces it. The training path
    is compared with rounded rows as well, and then as it trains, perhaps without the rounding."""
    from bitsandbytes.autograd import _functions as bnb

    monkeypatch.setattr(bnb, "MatMul8bitFp", bnb.MatMul8bitLt)
    # Two layers hide what 32 layers show.
    monkeypatch.setitem(parity.TOLERANCES, torch.float32, parity.Tolerance(loss=1e-5, cosine=0.99999, norm=1e-3))
    changes: dict[str, Any] = {"model": {"quantize": "int8"}}
    with pytest.raises(VerificationError, match=r"differs between|is .* on the training path"):
        train(**changes, run={"dir": "not-told"})
    monkeypatch.setattr(parity, "int8_rounds_rows", lambda model: True)
    report = train(**changes).summary["parity"]
    assert report["worst_cosine"] > 0.99999 and report["rounded"] is None
    assert 0.5 < report["unrounded"]["worst_cosine"] < report["worst_cosine"]
    assert "without bitsandbytes' rounding to 8 bits loss" in str(parity.ParityReport(**report))

    with ops.forced_plan(ops.Plan("library", "split")):
        assert train(**changes, run={"dir": "rounded"}).summary["parity"]["unrounded"] is None, (
            "nothing else to compare"
        )

    def doubled(x: Any, base: Any, *args: Any, scale: float, **options: Any) -> Any:
        exact = not plan_module._int8_by_library
        return RIGHT_LORA_LINEAR(x, base, *args, scale=3 * scale if exact else scale, **options)

    monkeypatch.setattr(ops, "lora_linear", doubled)
    with pytest.raises(
        VerificationError, match=r"and the same path with bitsandbytes' 8-bit rows|on the same path with"
    ):
        train(**changes, run={"dir": "faulty"})


def test_parity_run_with_rounded_operands_loads_without_the_units(
    here: Path, monkeypatch: pytest.MonkeyPatch, any_processor: None
) -> None:
    run = train(task="seq_cls", run={"kernels": "cpu-bf16"})
    for module in (ops, runtime):
        monkeypatch.setattr(module, "operands_problem", lambda backend: "the processor has none of AMX")
    assert len(list(peftlab.predict(run.folder, ["red 1"]))) == 1
    with pytest.raises(RecipeError, match=r"cpu-bf16 cannot run here: the processor has none of AMX; use auto"):
        train(task="seq_cls", run={"kernels": "cpu-bf16", "dir": "other"})
    assert not (here / "other").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"kernels": "cpu-int8"}}, "cpu-int8 multiplies weights stored in int8; set model.quantize: int8"),
        ({"run": {"kernels": "cpu-bf16"}, "adapter": {"dora": True}}, "DoRA does not run fused; set auto"),
        ({"run": {"kernels": "cpu-bf16"}, "model": {"dtype": "bfloat16"}}, "is for float32; remove train.precision"),
    ],
)
def test_parity_refuses_rounded_operands_without_effect(here: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        train(**changes)


def test_parity_refuses_rounded_operands_in_full_fine_tuning(here: Path) -> None:
    whole = recipe(run={"kernels": "cpu-bf16"}) | {"adapter": {"method": "none"}}
    with pytest.raises(RecipeError, match="without an adapter no weight is frozen; set auto"):
        peftlab.train(whole, progress=SilentProgress())


def train(**changes: Any) -> Any:
    return peftlab.train(recipe(**changes), progress=SilentProgress())


@pytest.mark.parametrize("task", ["causal_lm", "seq_cls"])
@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_parity_report_is_in_the_run_folder(here: Path, task: str, quantize: str, dropout: float) -> None:
    train(task=task, model={"quantize": quantize}, adapter={"dropout": dropout})
    report = json.loads((here / "run" / "run.json").read_text())["parity"]
    assert report["num_planned"] == report["num_adapted"] == report["num_fused"] > 0
    assert report["loss_fast"] == pytest.approx(report["loss_reference"], rel=1e-4)
    assert report["worst_cosine"] > 0.9999
    assert report["worst_norm_ratio"] == pytest.approx(1, abs=1e-3)
    assert report["num_zero_gradients"] == 0, "B is woken for the comparison, so A has a gradient too"
    assert report["slow"] == {}
    assert report["seconds"] < 30


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_parity_report_lists_pefts_own_path(here: Path, dropout: float) -> None:
    """PEFT's path draws its own masks, on both sides of the comparison."""
    train(run={"kernels": "reference"}, adapter={"dropout": dropout})
    report = json.loads((here / "run" / "run.json").read_text())["parity"]
    assert report["num_fused"] == 0
    assert set(report["slow"].values()) == {"run.kernels=reference"}


def test_parity_gate_does_not_change_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(adapter={"dropout": 0.1})
    gated = (here / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    fake = dataclasses.make_dataclass("Report", ["idle"])([])
    monkeypatch.setattr("peftlab.assembly.fit.check_parity", lambda *_, **__: fake)
    peftlab.train(recipe(adapter={"dropout": 0.1}, run={"dir": "other"}), progress=SilentProgress())
    assert (here / "other" / "adapter" / "adapter_model.safetensors").read_bytes() == gated


def lost_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "lora_linear", lambda *a, **k: RIGHT_LORA_LINEAR(*a, **{**k, "scale": 1.0}))


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(grad)


def zeroed_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def broken(x: Any, base: Any, A: Any, B: Any, **options: Any) -> Any:
        calls.append(1)
        return RIGHT_LORA_LINEAR(x, base, _ZeroGradient.apply(A) if len(calls) % 14 == 3 else A, B, **options)

    monkeypatch.setattr(ops, "lora_linear", broken)


def module_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(*args: Any, **options: Any) -> Any:
        model = inject(*args, **options)
        attention = model.base_model.model.model.layers[1].self_attn
        attention.o_proj = attention.o_proj.base_layer
        return model

    monkeypatch.setattr(prepare_module, "inject", add)


def mask_too_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    def collate(examples: Any, **options: Any) -> Any:
        wide = [dataclasses.replace(e, trained=np.ones(len(e), dtype=bool)) for e in examples]
        return right(wide, **options)

    right = causal_lm.collate
    monkeypatch.setattr(causal_lm, "collate", collate)


def padding_attended(monkeypatch: pytest.MonkeyPatch) -> None:
    # It finds this fault too, and runs rows of different length separately.
    monkeypatch.setattr(fit_module, "check_padding", lambda *_, **__: None)
    for module in (causal_lm, seq_cls):
        right = module.collate

        def unmasked(*args: Any, _right: Any = right, **options: Any) -> Any:
            batch = _right(*args, **options)
            return dataclasses.replace(batch, inputs={"input_ids": batch.input_ids})

        monkeypatch.setattr(module, "collate", unmasked)


def dropout_lost_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftlab_kernels.lora_linear import passes

    right = passes.down_backward
    monkeypatch.setattr(
        passes,
        "down_backward",
        lambda x, A, dS, mask, *rest, **k: right(x, A, dS, mask.flip(0) if mask is not None else None, *rest, **k),
    )


def head_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CausalLM._selected
    monkeypatch.setattr(
        CausalLM, "_selected", lambda self, model, batch: (lambda h, t: (h, t.roll(1)))(*right(self, model, batch))
    )


def weights_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SequenceClassification.loss_sum
    monkeypatch.setattr(SequenceClassification, "loss_sum", lambda self, model, batch: 1.05 * right(self, model, batch))


FAULTS: dict[Callable[..., None], tuple[str, str]] = {
    lost_scaling: ("causal_lm", r"the loss of the first micro-batch is .* adapters"),
    zeroed_gradient: ("causal_lm", r"gradient of model\.layers\.0\.self_attn\.v_proj\.lora_A.* 0 against .* non-zero"),
    module_left_out: ("causal_lm", r"model\.layers\.1\.self_attn\.o_proj should be adapted but is not \(13 of 14"),
    mask_too_wide: ("causal_lm", r"the loss of the first micro-batch is .* mask, labels.*data\.csv:\d+"),
    padding_attended: ("seq_cls", r"the gradient of bert\..* differs"),
    dropout_lost_in_backward: ("causal_lm", r"the gradient of model\.layers\.\d\..*lora_A\.default\.weight differs"),
    head_shifted: ("causal_lm", r"the loss of the first micro-batch is .* head of the training path"),
    weights_ignored: ("seq_cls", r"the loss of the first micro-batch is"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_parity_names_each_fault_and_stops_the_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None]
) -> None:
    task, message = FAULTS[fault]
    fault(monkeypatch)
    with pytest.raises(VerificationError, match=message):
        train(task=task, adapter={"dropout": 0.3})
    assert not (here / "run").exists(), "nothing was trained, so nothing is kept"


def test_parity_sample_ends_a_long_row_at_its_last_trained_token() -> None:
    from peftlab.tasks import Example

    trained = np.zeros(1000, dtype=bool)
    trained[600:700] = True
    long = Example(np.arange(1000, dtype=np.int32), 0, 100.0, trained=trained)
    (cut,) = parity._sample([long], 256)
    assert cut.ids[-1] == 699
    assert len(cut) == 256
    assert cut.weight == cut.trained.sum() == 100
    short = Example(np.arange(60, dtype=np.int32), 1, 60.0, trained=np.ones(60, dtype=bool))
    assert len(parity._sample([short] * 10, 256)) == 4

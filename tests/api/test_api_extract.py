"""A LoRA extracted from two checkpoints, against dense decompositions and the outputs of the fine-tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from run_examples import recipe, write_data
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import peftlab
from peftlab.errors import ArtifactError, RecipeError, VerificationError
from peftlab.models import find_pretrained, load_model
from peftlab.training.progress import SilentProgress

QUIET: dict[str, Any] = {"progress": SilentProgress()}
IDS = torch.arange(4, 20)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def _saved(model: Any, *, rank: int = 2, norms: bool = False) -> Any:
    """Writes ``base``, and ``tuned`` with an update of ``rank`` in each linear layer of the body; returns the tuned model."""
    model.save_pretrained("base")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if (
            parameter.dim() == 2
            and "embed" not in name
            and "lm_head" not in name
            and ".wt" not in name
            and ".wp" not in name
        ):
            left = torch.randn(parameter.shape[0], rank, generator=generator)
            parameter.data += 0.03 * left @ torch.randn(rank, parameter.shape[1], generator=generator)
        elif norms and "norm" in name:
            parameter.data += 0.1
    model.save_pretrained("tuned")
    return model


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def llama(**options: Any) -> Any:
    return _saved(load_model(find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device="cpu"), **options)


def test_extract_adapter_recovers_an_update_of_its_rank() -> None:
    tuned = llama()
    report = peftlab.extract_adapter("base", "tuned", "lora", rank=2, **QUIET)
    assert report["error"] < 1e-4
    assert report["rest"] == []
    assert {m["rank"] for m in report["modules"]} == {2}
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "lora")
    torch.testing.assert_close(logits(plain), logits(tuned), rtol=1e-4, atol=1e-4)


def test_extract_adapter_states_what_a_smaller_rank_loses() -> None:
    """An error that is not squared before it is summed turns this red."""
    tuned = llama(rank=5)
    report = peftlab.extract_adapter("base", "tuned", "lora", rank=3, **QUIET)
    before = dict(AutoModelForCausalLM.from_pretrained("base").named_parameters())
    lost = whole = 0.0
    for module in report["modules"]:
        name = f"{module['name']}.weight"
        change = dict(tuned.named_parameters())[name].detach() - before[name].detach()
        squares = np.square(np.linalg.svd(change.double().numpy(), compute_uv=False))
        assert module["error"] == pytest.approx((squares[3:].sum() / squares.sum()) ** 0.5, rel=1e-4)
        lost, whole = lost + squares[3:].sum(), whole + squares.sum()
    assert report["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)


def test_extract_adapter_reads_conv1d_of_gpt2() -> None:
    """Conv1D stores [in, out]: without the transposition, plain PEFT cannot load the file."""
    torch.manual_seed(0)
    tuned = _saved(GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2)))
    report = peftlab.extract_adapter("base", "tuned", "lora", rank=2, **QUIET)
    assert len(report["modules"]) == 8
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "lora")
    torch.testing.assert_close(logits(plain), logits(tuned), rtol=1e-4, atol=1e-4)


def test_extract_adapter_names_or_saves_the_rest() -> None:
    tuned = llama(norms=True)
    report = peftlab.extract_adapter("base", "tuned", "lost", rank=2, **QUIET)
    assert report["rest"] and all("norm" in name for name in report["rest"])
    assert not report["rest_saved"]
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "lost")
    assert float((logits(plain) - logits(tuned)).abs().max()) > 1e-3
    report = peftlab.extract_adapter("base", "tuned", "kept", rank=2, save_rest=True, **QUIET)
    assert report["rest_saved"] and report["in_full"] > 0
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "kept")
    torch.testing.assert_close(logits(plain), logits(tuned), rtol=1e-4, atol=1e-4)


def test_extract_adapter_of_a_fully_trained_run(trained: Any) -> None:
    """Every bias and norm and the head differ, so only all of them together give the outputs."""
    document = recipe("seq_cls", train={"lr": 1e-3})
    document["adapter"] = {"method": "none"}
    folder = trained(document, write_data)
    again = {**document, "data": {**document["data"], "train": str(folder / "data.csv")}}
    options = {"rank": 64, "recipe": again, **QUIET}
    report = peftlab.extract_adapter("tiny:bert", folder / "run", "lora", save_rest=True, **options)
    assert report["logits"]["kl_mean"] < 1e-6
    assert report["metrics"]["before"] == pytest.approx(report["metrics"]["after"], abs=1e-5)
    assert peftlab.evaluate("lora", **QUIET)["metrics"] == pytest.approx(report["metrics"]["after"])
    with pytest.raises(VerificationError, match=r"--save-rest: .* other parameters differ"):
        peftlab.extract_adapter("tiny:bert", folder / "run", "other", tolerance=1e-7, **options)
    assert not Path("other").exists()


def test_extract_adapter_refuses_mistakes() -> None:
    llama()
    with pytest.raises(ArtifactError, match="no linear layer differs"):
        peftlab.extract_adapter("base", "base", "lora", rank=2, **QUIET)
    with pytest.raises(ArtifactError, match="are of different models"):
        peftlab.extract_adapter("tiny:bert", "tuned", "lora", rank=2, **QUIET)
    with pytest.raises(RecipeError, match="--rank of at least 1, found 0"):
        peftlab.extract_adapter("base", "tuned", "lora", rank=0, **QUIET)
    with pytest.raises(RecipeError, match="no such model file or folder"):
        peftlab.extract_adapter("base", "./nope", "lora", rank=2, **QUIET)
    with pytest.raises(RecipeError, match="tuned exists"):
        peftlab.extract_adapter("base", "tuned", "tuned", rank=2, **QUIET)
    assert sorted(p.name for p in Path().iterdir()) == ["base", "tuned"]

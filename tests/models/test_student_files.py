"""Students as files, and the checks of a cut before any weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn

from peftlab.errors import ArtifactError, RecipeError, ResourceError
from peftlab.models import find_pretrained, load_model, load_tokenizer
from peftlab.models.student import (
    StudentCut,
    check_cut,
    cut_layers,
    evenly_spaced,
    make_student,
    write_student,
)
from peftlab.models.student import write as write_module

IDS = torch.randint(3, 260, (4, 9), generator=torch.Generator().manual_seed(0))


def _outputs(model: nn.Module) -> Iterator[Tensor]:
    yield model(input_ids=IDS).logits.flatten(0, 1)


def _make(folder: Path, cut: StudentCut, name: str = "tiny:llama", **options: Any) -> dict[str, Any]:
    pretrained = find_pretrained(name)
    options = {
        "auto_class": "AutoModelForCausalLM",
        "tokenizer": load_tokenizer(pretrained),
        "outputs": _outputs,
        **options,
    }
    return make_student(pretrained, cut, folder, **options)


@pytest.mark.parametrize(
    ("num_layers", "keep", "expected"),
    [
        (6, 3, (0, 2, 5)),
        (12, 6, (0, 2, 4, 6, 8, 11)),
        (30, 24, (*range(4), *range(5, 9), *range(10, 14), *range(15, 19), *range(20, 24), 25, 26, 27, 29)),
        (4, 1, (0,)),
        (5, 2, (0, 4)),
        (3, 3, (0, 1, 2)),
    ],
)
def test_evenly_spaced_gives_the_layers_listed_by_hand(num_layers: int, keep: int, expected: tuple[int, ...]) -> None:
    assert evenly_spaced(num_layers, keep) == expected


def test_evenly_spaced_layers_are_distinct_and_include_both_ends() -> None:
    for num_layers in range(2, 40):
        for keep in range(2, num_layers + 1):
            layers = evenly_spaced(num_layers, keep)
            assert len(set(layers)) == keep and layers[0] == 0 and layers[-1] == num_layers - 1


def test_student_is_a_plain_checkpoint_of_the_teachers_layer(tmp_path: Path) -> None:
    notes = _make(tmp_path / "student", StudentCut(layers=(1,)))
    teacher = load_model(find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device="cpu")
    cut_layers(teacher, [1])
    student = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        assert torch.equal(student(input_ids=IDS).logits, teacher(input_ids=IDS).logits)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer("cut")["input_ids"] == load_tokenizer(find_pretrained("tiny:llama"))("cut")["input_ids"]
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "student" / "model.safetensors")
    assert notes == json.loads((tmp_path / "student" / "student.json").read_text())
    assert (notes["layers"], notes["num_layers_before"], notes["name"]) == ([1], 2, "tiny:llama")
    assert notes["parameters"] == student.num_parameters() < notes["parameters_before"]
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    # The student is a model like any other: peftlab finds it, loads it and cuts it again.
    again = find_pretrained(str(tmp_path / "student"))
    narrower = {"auto_class": "AutoModelForCausalLM", "tokenizer": None, "outputs": _outputs}
    make_student(again, StudentCut(hidden_size=48), tmp_path / "narrow", **narrower)
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path / "narrow").config.hidden_size == 48


def test_notes_hold_importance_and_widths(tmp_path: Path) -> None:
    cut = StudentCut(num_layers=1, by="importance", num_heads=2, intermediate_size=96)
    notes = _make(tmp_path / "student", cut, sample="abc")
    (round_,) = notes["importance"]["rounds"]
    assert [layer for layer, _ in round_] == [0, 1] and notes["layers"] == notes["importance"]["kept"]
    assert notes["importance"]["num_positions"] == notes["widths"]["num_positions"] == IDS.numel()
    assert (notes["widths"]["before"]["num_heads"], notes["widths"]["after"]["num_heads"]) == (4, 2)
    assert len(notes["widths"]["heads"]) == 1  # of the layer that is kept
    assert notes["request"]["sample"] == "abc"
    student = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert (student.config.num_attention_heads, student.config.intermediate_size, student.config.head_dim) == (
        2,
        96,
        16,
    )


def test_classifier_keeps_its_head(tmp_path: Path) -> None:
    labels = {"auto_class": "AutoModelForSequenceClassification", "num_labels": 3}
    _make(tmp_path / "student", StudentCut(num_layers=1, by="first"), "tiny:bert", **labels)
    teacher = load_model(find_pretrained("tiny:bert"), device="cpu", **labels)
    student = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert torch.equal(student.classifier.weight, teacher.classifier.weight) and student.config.num_labels == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_dtype_is_kept(dtype: str, tmp_path: Path) -> None:
    teacher = load_model(find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device="cpu", dtype=dtype)
    teacher.save_pretrained(tmp_path / "teacher")
    load_tokenizer(find_pretrained("tiny:llama")).save_pretrained(tmp_path / "teacher")
    _make(tmp_path / "student", StudentCut(num_layers=1, by="importance"), str(tmp_path / "teacher"))
    weights = load_file(tmp_path / "student" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}


def test_make_student_reuses_a_student_of_the_same_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = StudentCut(num_layers=1, by="importance")
    notes = _make(tmp_path / "student", cut, sample="a")
    with monkeypatch.context() as patch:
        patch.setattr(write_module, "load_model", lambda *_, **__: pytest.fail("loaded again"))
        assert _make(tmp_path / "student", cut, sample="a") == notes
    for other, options in (
        (cut, {"sample": "b"}),
        (StudentCut(num_layers=1), {}),
        (cut, {"sample": "a", "num_labels": 4}),
    ):
        with pytest.raises(RecipeError, match="contains a student with another cut"):
            _make(tmp_path / "student", other, **options)
    # The sample does not matter to a cut that is not measured.
    _make(tmp_path / "even", StudentCut(num_layers=1), sample="a")
    _make(tmp_path / "even", StudentCut(num_layers=1), sample="b")


def test_make_student_refuses_other_folders(tmp_path: Path) -> None:
    cut = StudentCut(num_layers=1)
    (tmp_path / "mine").mkdir()
    with pytest.raises(RecipeError, match="already exists and contains no student"):
        _make(tmp_path / "mine", cut)
    _make(tmp_path / "student", cut)
    (tmp_path / "student" / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"config\.json or weights are missing"):
        _make(tmp_path / "student", cut)
    (tmp_path / "student" / "student.json").write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        _make(tmp_path / "student", cut)


def test_write_student_writes_a_whole_student_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device="cpu")

    class FullDisk:
        def save_pretrained(self, folder: Path) -> None:
            assert (folder / "model.safetensors").is_file()
            raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match="No space left on device"):
        write_student(model, FullDisk(), tmp_path / "student", notes={})
    assert list(tmp_path.iterdir()) == []

    def killed(partial: Path, folder: Path) -> None:
        assert {"config.json", "model.safetensors", "student.json"} <= {p.name for p in partial.iterdir()}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write_module.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_student(model, None, tmp_path / "student", notes={})
    assert list(tmp_path.iterdir()) == []
    write_student(model, None, tmp_path / "student", notes={"a": 1})
    with pytest.raises(RecipeError, match="already exists"):
        write_student(model, None, tmp_path / "student", notes={})
    assert json.loads((tmp_path / "student" / "student.json").read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("cut", "key", "expected"),
    [
        (StudentCut(), "", "expected something to cut"),
        (StudentCut(layers=(0,), num_layers=1), ".num_layers", "exclude each other"),
        (StudentCut(layers=(0, 2)), ".layers", "from 0 to 1 in ascending order, found 2: the model has 2 layers"),
        (StudentCut(layers=(0, 0)), ".layers", "found 0 more than once"),
        (StudentCut(layers=(0, 1)), ".layers", "the model has 2 layers, and all are kept: nothing is cut"),
        (StudentCut(num_layers=3), ".num_layers", "expected 1 to 2 layers, found 3"),
        (StudentCut(num_layers=0, by="importance"), ".num_layers", "expected 1 to 2 layers, found 0"),
        (StudentCut(layers=(0,), by="first"), ".by", "by has no effect without num_layers"),
        (StudentCut(num_layers=1, search="once"), ".search", "search has no effect without by=importance"),
        (StudentCut(hidden_size=48, part="encoder"), ".part", "part has no effect without layers"),
        (StudentCut(num_layers=1, part="encoder"), ".part", "it has one stack of layers"),
        (StudentCut(hidden_size=64), "", "these are already the model's sizes: nothing is cut"),
        (StudentCut(num_layers=1, hidden_size=96), ".hidden_size", "from 1 to the model's 64, found 96"),
        (StudentCut(num_heads=3), ".num_heads", "a multiple of the 2 key/value heads"),
    ],
)
def test_make_student_refuses_an_impossible_cut_before_loading_weights(
    cut: StudentCut, key: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_module, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(RecipeError) as caught:
        _make(tmp_path / "student", cut)
    assert expected in str(caught.value) and caught.value.key == f"distill.student_init{key}"
    assert list(tmp_path.iterdir()) == []


def test_check_cut_refuses_a_misplaced_layer_without_weights() -> None:
    config = tf.ModernBertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        skeleton = tf.ModernBertModel(config)
    with pytest.raises(RecipeError, match=r"layer 2 of ModernBertModel has attn_norm.weight .* cannot become layer 0"):
        check_cut(StudentCut(layers=(2, 3)), skeleton)


def test_check_cut_refuses_quantized_weights(tmp_path: Path) -> None:
    pretrained = find_pretrained("tiny:llama")
    model = load_model(pretrained, auto_class="AutoModelForCausalLM", device="cpu", quantize="nf4")
    with pytest.raises(RecipeError, match="cut from unquantized weights") as caught:
        check_cut(StudentCut(num_layers=1), model)
    assert caught.value.key == "distill.student_init"

"""Sequence to sequence from recipe to results: figures, languages, quantized weights, answers of a teacher, messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import peftlab
from peftlab.errors import ArtifactError, DataError, Interrupted, RecipeError
from peftlab.experiments import taught_answers
from peftlab.training.progress import SilentProgress
from tests.family_examples import TRANSLATORS, language_tokenizer, make_config, make_model, write_family
from tests.run_examples import Stopper

WORDS = {"save": "sichern", "open": "offen", "close": "zu", "page": "Seite"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pairs = [(f"{a} {b}", f"{WORDS[a]} {WORDS[b]}") for a in WORDS for b in WORDS]
    rows = [{"source": source, "target": target} for source, target in pairs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(**sections: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "task": "seq2seq",
        "model": {"name": "tiny:t5"},
        "data": {"train": "rows.jsonl", "eval_rows": 4},
        "train": {"max_steps": 4, "batch_size": 4},
        "eval": {"before": False, "max_new_tokens": 6},
        "run": {"dir": "run"},
    }
    return {**document, **{name: {**document.get(name, {}), **values} for name, values in sections.items()}}


def train(document: dict[str, Any], *overrides: str, **options: Any) -> Any:
    return peftlab.train(document, overrides, **{"progress": SilentProgress(), **options})


def test_run_has_the_metrics_of_its_texts_and_their_signatures() -> None:
    run = train(recipe(eval={"every": 2}))
    assert {"loss", "perplexity", "token_accuracy", "exact_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL"} == set(
        run.summary["after"]
    )
    assert run.summary["signatures"]["chrf"].startswith("nrefs:1|case:mixed")
    log = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    meanwhile = next(line["eval"] for line in log if line.get("eval") and not line.get("final"))
    assert "loss" in meanwhile and "chrf" not in meanwhile  # they take too long in the middle of training
    again = peftlab.evaluate("run", progress=SilentProgress())
    assert again["metrics"] == pytest.approx(run.summary["after"])
    assert again["signatures"] == run.summary["signatures"]


def test_best_step_may_be_chosen_by_a_metric_of_texts() -> None:
    run = train(recipe(eval={"every": 2, "best": "chrf"}))
    assert run.summary["training"]["best_step"] in (2, 4)


def test_predictions_are_texts_with_as_many_beams_as_asked() -> None:
    train(recipe())
    greedy = list(peftlab.predict("run", ["save page", ""], progress=SilentProgress()))
    assert isinstance(greedy[0]["text"], str) and greedy[1]["text"] is None
    wide = list(peftlab.predict("run", ["save page"], beams=4, progress=SilentProgress()))
    assert isinstance(wide[0]["text"], str)
    (long,) = peftlab.predict("run", [{"source": "a" * 600}], progress=SilentProgress())
    assert long["note"] == "cut to 512 of 600 tokens"


def test_beams_of_a_task_without_them_are_refused() -> None:
    (Path("texts.jsonl")).write_text('{"text": "a b"}\n' * 8)
    train({**recipe(), "task": "causal_lm", "model": {"name": "tiny:llama"}, "data": {"train": "texts.jsonl"}})
    with pytest.raises(RecipeError, match="has no effect for task: causal_lm"):
        list(peftlab.predict("run", ["a"], beams=2, progress=SilentProgress()))


def test_quantized_weights_train_and_merge() -> None:
    run = train(recipe(model={"quantize": "nf4"}, run={"merge": "dequantized"}))
    assert run.summary["merge"]["verified"]


def test_languages_are_kept_in_the_run(here: Path) -> None:
    """mBART: the target's language starts the decoder in training, evaluation and prediction."""
    tokenizer = language_tokenizer("mbart")
    config = make_config("MBartConfig", TRANSLATORS, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    make_model(config, "AutoModelForSeq2SeqLM").save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("ab.jsonl").write_text('{"source": "ab", "target": "ba"}\n{"source": "aab", "target": "baa"}\n' * 4)
    data = {"train": "ab.jsonl", "eval_rows": 2, "source_language": "en_XX", "target_language": "de_DE"}
    document = recipe(model={"name": "model"}, data=data, run={"merge": "original"})
    run = train(document)
    assert run.summary["merge"]["verified"]
    assert peftlab.evaluate("run", progress=SilentProgress())["metrics"] == pytest.approx(run.summary["after"])
    seen = []
    import transformers

    generate = transformers.MBartForConditionalGeneration.generate

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["decoder_start_token_id"])
        return generate(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.MBartForConditionalGeneration, "generate", record)
        list(peftlab.predict("run", ["ab"], progress=SilentProgress()))
    assert seen == [tokenizer.convert_tokens_to_ids("de_DE")]


TEACHER = recipe(adapter={"method": "none"}, train={"max_steps": 25, "lr": 5e-3}, run={"dir": "teacher"})


@pytest.mark.usefixtures("short_timing")
def test_student_learns_from_the_answers_of_its_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = train(TEACHER).folder
    distill = {"teacher": str(teacher), "answers": "teacher", "hard_weight": 1.0, "headline": "chrf"}
    document = recipe(distill=distill, train={"max_steps": 2})
    with pytest.raises(Interrupted):
        peftlab.distill(document, progress=Stopper(at=1))
    written = Path("run/answers/rows.jsonl").read_bytes()
    monkeypatch.setattr(taught_answers, "_written", lambda *_: pytest.fail("written again"))
    run = peftlab.distill("run", resume=True, progress=SilentProgress())
    assert run.summary["status"] == "finished"
    assert run.summary["card"]["metrics"][0]["name"] == "chrf"
    assert Path("run/answers/rows.jsonl").read_bytes() == written
    lines = [json.loads(line) for line in written.decode().splitlines()]
    assert len(lines) == 12
    wanted = list(peftlab.predict("teacher", [line["prompt"] for line in lines], progress=SilentProgress()))
    assert [line["answer"].strip() for line in lines] == [result["text"] for result in wanted]


@pytest.mark.usefixtures("short_timing")
def test_student_learns_the_probabilities_of_its_teacher() -> None:
    """With a cache as without one; the labels have no weight."""
    teacher = train(TEACHER).folder
    distances = []
    for steps, more in ((1, {}), (40, {}), (40, {"cache": "cache", "targets": {"fill": "hidden"}})):
        distill = {"teacher": str(teacher), "baseline": False, "headline": "kl", **more}
        document = recipe(adapter={"method": "none"}, distill=distill, train={"max_steps": steps, "lr": 5e-3})
        card = peftlab.distill(document, replace=True, progress=SilentProgress()).summary["card"]
        assert card["metrics"][0]["name"] == "kl"
        distances.append(card["metrics"][0]["student"]["value"])
    start, taught, cached = distances
    assert taught < 0.2 * start
    assert cached == pytest.approx(taught, rel=0.1)


def test_student_of_this_task_does_not_write_its_own_rows() -> None:
    distill = {"teacher": "tiny:t5", "cache": "cache", "on_policy": {"phases": 2}}
    with pytest.raises(RecipeError, match=r"distill\.on_policy: has no effect for task: seq2seq; remove it"):
        peftlab.distill(recipe(distill=distill), progress=SilentProgress())


@pytest.mark.usefixtures("short_timing")
def test_unfinished_answers_are_continued_and_those_of_others_refused(here: Path) -> None:
    teacher = train(TEACHER).folder
    document = recipe(
        distill={"teacher": str(teacher), "answers": "teacher", "baseline": False}, train={"max_steps": 1}
    )
    whole = peftlab.distill(document, progress=SilentProgress())
    text = (whole.folder / "answers/rows.jsonl").read_text()
    about = (whole.folder / "answers/answers.json").read_text()
    from peftlab.assembly import Assembly
    from peftlab.recipe import load_recipe

    assembly = Assembly(load_recipe(document), transfer=True)
    part = here / "part"
    part.mkdir()
    (part / "answers.json").write_text(about)
    (part / "rows.jsonl").write_text(text[: len(text) // 2])  # cut inside a line
    taught = taught_answers.answered_examples(assembly, part, SilentProgress())
    assert (part / "rows.jsonl").read_text() == text
    assert len(taught.train.examples) <= 12
    (part / "answers.json").write_text(about.replace('"max_new_tokens": 6', '"max_new_tokens": 7'))
    with pytest.raises(ArtifactError, match="come from another teacher, other rows or other settings"):
        taught_answers.answered_examples(assembly, part, SilentProgress())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"columns": {"target": "tarrget"}}}, r"no column 'tarrget'.*did you mean 'target'"),
        ({"data": {"max_target_length": 4}}, "more target tokens than the limit of 4"),
        ({"data": {"max_length": 4}}, "more tokens than the limit of 4"),
    ],
)
def test_bad_rows_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        train(recipe(**sections))


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        ("ProphetNetConfig", {}, "prophetnet predicts several tokens at each position"),
        (
            "T5Config",
            {"decoder_start_token_id": None},
            "has no decoder_start_token_id, the token that stands before each",
        ),
    ],
)
def test_model_that_cannot_write_targets_is_refused(config: str, values: dict[str, Any], message: str) -> None:
    write_family(Path("model"), config, "seq2seq")
    if values:
        path = Path("model/config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(RecipeError, match=message):
        peftlab.check(recipe(model={"name": "model"}), progress=SilentProgress())


@pytest.mark.parametrize("name", ["tiny:bert", "tiny:llama"])
def test_model_without_a_decoder_for_sources_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="has no decoder that writes a text from another text"):
        peftlab.check(recipe(model={"name": name}), progress=SilentProgress())


def test_longer_targets_than_positions_are_refused() -> None:
    write_family(Path("model"), "LEDConfig", "seq2seq")
    with pytest.raises(RecipeError, match="the decoder of model writes at most 64 tokens, found 65"):
        train(recipe(model={"name": "model"}, data={"max_target_length": 65}))
    with pytest.raises(RecipeError, match="writes at most 64 tokens, found 100"):
        train(recipe(model={"name": "model"}, eval={"max_new_tokens": 100, "prompts": ["save"]}))

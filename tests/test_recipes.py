"""Every shipped recipe trains on a tiny model. With `slow`, it trains its real model to the figure in its header."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import peftlab
from peftlab.api.distill import distill
from peftlab.assembly import Assembly
from peftlab.data import Rows, load_rows
from peftlab.data.near_duplicates import near_duplicates
from peftlab.recipe import load_recipe, recipe_names, recipe_text
from peftlab.training.progress import SilentProgress
from tests import text_baselines, translation_baselines
from tests.masked_examples import write_bert
from tests.shape_baseline import mask_baselines

TINY = {
    "causal_lm": "tiny:llama",
    "seq2seq": "tiny:t5",
    "seq_cls": "tiny:bert",
    "token_cls": "tiny:bert",
    "embedding": "tiny:bert",
    "image_cls": "tiny:vit",
    "extractive_qa": "tiny:bert",
    "reranking": "tiny:bert",
    "masked_lm": "bert",  # a folder that the test writes: the tiny tokenizer has no mask token
    "object_detection": "tiny:detr",
    "image_segmentation": "tiny:segformer",
}
# What a newcomer types first. None of them is in the data.
SPAM = [
    "URGENT you have won a free cruise, call now",
    "Congratulations! You have been chosen for a $1000 gift card, click here to claim",
    "You won the lottery! Send your bank details to claim your prize",
    "FREE iPhone for the first 100 callers, text WIN to 80085",
    "Claim your free ringtone now, reply YES",
    "Hot singles in your area want to meet you, text back now",
    "Limited offer: 50% off all phones today only, call 0800 123 456",
    "Your account has been suspended, verify your details at http://secure-bank-login.com",
    "Earn $500 a day working from home, no experience needed, sign up now",
    "Get a cheap loan today, no credit check, reply YES",
]
HAM = [
    "Hi mum, I'll be home around six, love you",
    "Are we still meeting for lunch tomorrow?",
    "Can you pick up some milk on the way home?",
    "Happy birthday! Hope you have a great day",
    "I'm running late, the train is delayed",
    "Thanks for dinner last night, it was lovely",
    "What time does the film start?",
    "Call me when you get a chance",
    "Did you finish the homework for Monday?",
    "ok see you later",
]
DISTILLING = [name for name in recipe_names() if load_recipe(name).recipe.distill is not None]


def small(name: str) -> list[str]:
    """Overrides that make a shipped recipe take seconds, on its own data."""
    recipe = load_recipe(name).recipe
    source = part_of(recipe.data.train, 60)
    overrides = [f"model.name={TINY[recipe.task]}", "train.epochs=", "train.max_steps=2", "run.dir=run"]
    if recipe.adapter.targets != "all-linear":
        overrides += ["adapter.targets=all-linear"]  # a tiny model has other layers
    if recipe.data.format == "document":
        overrides += ["data.too_long=truncate", "data.max_length=250"]
    elif "smoke.jsonl" not in source:
        overrides += [f"data.train={source}"]
        overrides += ["data.eval_rows=12"] if recipe.data.eval_rows else []
        overrides += [f"data.eval={part_of(recipe.data.eval, 30)}"] if recipe.data.eval else []
        if "data.too_long" in recipe.spec.keys:
            # A cut target has no end to learn, and a cut prompt no answer.
            drops = recipe.spec.reads_source or recipe.data.too_long == "drop"
            overrides += ["data.too_long=drop", "data.max_length=500"] if drops else []
            overrides += [] if drops else ["data.too_long=truncate", "data.max_length=250"]
    return overrides


def part_of(source: str, count: int) -> str:
    """The first rows of a recipe's data. Of images to draw, few are drawn."""
    return re.sub(r"^shapes:\d+", "shapes:200", source.partition("#")[0]) + f"#{count}"


@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in DISTILLING])
def test_recipe_trains_on_a_tiny_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name).recipe
    if recipe.task == "masked_lm":
        write_bert(tmp_path / "bert", max_position_embeddings=512)
    run = peftlab.train(name, small(name), progress=SilentProgress())
    summary = json.loads((run.folder / "run.json").read_text())
    assert summary["status"] == "finished"
    assert summary["training"]["steps"] == 2
    if recipe.run.merge != "none":
        assert summary["merge"]["verified"]
    assert ((run.merged if recipe.run.merge != "none" else run.model) / "model.safetensors").is_file()
    prompts = recipe.eval.prompts
    assert [s["prompt"] for s in summary["samples"]] == prompts
    wanted = {"after", *(["before"] if recipe.eval.before else [])}
    assert all(wanted <= sample.keys() for sample in summary["samples"])


@pytest.mark.usefixtures("short_timing")
@pytest.mark.parametrize("name", DISTILLING)
def test_recipe_distills_on_tiny_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is the whole tiny model, trained for two steps if it needs a head. The student is one layer of it."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name).recipe
    assert recipe.distill is not None
    teacher = TINY[recipe.task]
    if recipe.spec.classifies:
        plain = ["distill=", "run.dir=teacher", *(["data.exclude={}"] if recipe.data.exclude else [])]
        teacher = str(peftlab.train(name, [*small(name), *plain], progress=SilentProgress()).folder)
    transfer = recipe.distill.transfer
    changes = [f"distill.teacher={teacher}", "distill.seeds=1"]
    changes += [f"distill.transfer={transfer.partition('#')[0]}#40"] if transfer else []
    if recipe.distill.student_init is not None and recipe.distill.student_init.weights == "copied":
        changes += ["distill.student_init={layers: [0]}"]
    run = distill(name, [*small(name), *changes], progress=SilentProgress())
    assert run.summary["status"] == "finished"
    assert run.summary["card"]["verdict"]["text"]
    assert (run.folder / "student" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_header_says_what_to_expect(name: str) -> None:
    header = [line for line in recipe_text(name).splitlines() if line.startswith("#")]
    text = " ".join(header).lower()
    for word in ("cores", "memory", "expect"):
        assert word in text, f"{name}: the header does not state {word}"


def _measured(name: str, folder: Path) -> tuple[dict[str, object], float, int]:
    """Summary, seconds and peak bytes of a recipe in its own process, as the command line runs it."""
    code = (
        "import sys, json\nfrom peftlab.cli.app import run\nstatus = run(['train', sys.argv[1], 'run.dir=run', '--json'])\n"
        "from peftlab.measuring.memory import peak_memory_bytes\n"
        "open('peak', 'w').write(str(peak_memory_bytes('cpu')))\nsys.exit(status)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", code, name],
        cwd=folder,
        env=environment,
        check=True,
        timeout=1200,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.monotonic() - started
    return json.loads((folder / "run/run.json").read_text()), seconds, int((folder / "peak").read_text())


@pytest.mark.slow
def test_quickstart_reaches_its_figures(tmp_path: Path) -> None:
    summary, seconds, peak = _measured("quickstart", tmp_path)
    before, after = summary["before"], summary["after"]
    assert isinstance(before, dict) and isinstance(after, dict)
    assert before["accuracy"] < 0.5
    assert after["f1_macro"] >= 0.95
    assert peak <= 3.0 * 2**30
    assert seconds <= 300
    spam, ham = load_recipe("quickstart").recipe.eval.choices[::-1]
    labels = [spam] * len(SPAM) + [ham] * len(HAM)
    for change, allowed in ((str, 0), (str.lower, 2), (str.upper, 2)):
        texts = [change(text) for text in SPAM + HAM]
        results = peftlab.predict(tmp_path / "run", texts)
        wrong = [text for text, label, r in zip(texts, labels, results, strict=True) if r["label"] != label]
        assert len(wrong) <= allowed, wrong


def test_messages_of_the_quickstart_are_not_in_its_data() -> None:
    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    known = {plain(text) for text in load_rows(load_recipe("quickstart").recipe.data.train).columns["text"]}
    assert not known & {plain(text) for text in SPAM + HAM}


@pytest.mark.slow
def test_sms_spam_reaches_its_figures(tmp_path: Path) -> None:
    summary, seconds, _ = _measured("sms-spam", tmp_path)
    after = summary["after"]
    assert isinstance(after, dict)
    assert after["accuracy"] >= 0.98
    assert after["f1_macro"] >= 0.95
    assert seconds <= 180


@pytest.mark.slow
def test_news_entities_beat_a_list_of_entities(tmp_path: Path) -> None:
    from bench.studies.silver_entities import baseline

    summary, seconds, _ = _measured("news-entities", tmp_path)
    after = summary["after"]
    assert isinstance(after, dict)
    assert after["entity_f1"] >= max(0.57, baseline()["f1"] + 0.03)
    assert seconds <= 400


@pytest.mark.slow
def test_shape_masks_beat_a_colour_threshold(tmp_path: Path) -> None:
    summary, seconds, _ = _measured("shape-masks", tmp_path)
    data, after = load_recipe("shape-masks").recipe.data, summary["after"]
    assert isinstance(after, dict) and data.eval is not None
    without = mask_baselines(load_rows(data.train), load_rows(data.eval))
    assert without["ground"] == pytest.approx(0.221, abs=0.001)
    assert without["threshold"] == pytest.approx(0.353, abs=0.001)
    assert after["iou_macro"] >= 0.8 > 2 * without["threshold"]
    assert seconds <= 600


@pytest.mark.slow
def test_film_sentiment_and_dialog_improve(tmp_path: Path) -> None:
    for name, metric in (("film-sentiment", "accuracy"), ("dialog", "loss")):
        folder = tmp_path / name
        folder.mkdir()
        summary, _, _ = _measured(name, folder)
        before, after = summary["before"], summary["after"]
        assert isinstance(before, dict) and isinstance(after, dict)
        gain = after[metric] - before[metric]
        assert gain > 0.2 if metric == "accuracy" else gain < -0.5


@pytest.mark.slow
def test_digits_reach_their_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student reads digits that it has never seen. It learns more from 100 images, or 1,200, than from 100 labels."""
    monkeypatch.chdir(tmp_path)
    teacher = peftlab.train("digits-teacher", progress=SilentProgress())
    assert teacher.summary["after"]["accuracy"] >= 0.95
    seeds = distill("digits-missing-class", progress=SilentProgress()).summary["card"]["seeds"]
    assert len(seeds) == 5
    assert all(seed["student"] >= 0.75 and seed["baseline"] <= 0.02 for seed in seeds)
    assert sum(seed["student"] for seed in seeds) / 5 >= 0.85
    for name, least in (("digits-few-labels", 0.02), ("digits-unlabelled", 0.05)):
        card = distill(name, progress=SilentProgress()).summary["card"]
        assert card["metrics"][0]["gain"]["value"] >= least
        assert card["verdict"]["outcome"] == "helped"


@pytest.mark.slow
def test_minilm_student_reaches_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    card = distill("minilm-student", progress=SilentProgress()).summary["card"]
    rows = {row["name"]: row for row in card["metrics"]}
    assert rows["spearman"]["student"]["value"] >= 0.82 and rows["spearman"]["cut"]["value"] < 0.65
    assert rows["neighbour_recall"]["student"]["value"] >= 0.55
    assert card["ratios"]["latency_ms"] <= 1 / 1.8


@pytest.mark.slow
def test_quickstart_repeats_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["train.max_steps=3", "train.epochs=", "data.eval_rows=20", "run.merge=none", "eval.prompts=[]"]
    first = peftlab.train("quickstart", overrides, progress=SilentProgress())
    second = peftlab.train(first.folder / "recipe.lock.yaml", progress=SilentProgress())
    name = "adapter/adapter_model.safetensors"
    assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


@pytest.mark.slow
def test_docstring_questions_beats_its_baseline(tmp_path: Path) -> None:
    recipe = load_recipe("docstring-questions").recipe
    assert recipe.data.eval is not None
    simple = text_baselines.frequent_answers(load_rows(recipe.data.train), load_rows(recipe.data.eval, key="data.eval"))
    assert simple["none_exact"] == pytest.approx(0.535) and simple["frequent_f1"] == pytest.approx(0.3529, abs=1e-3)
    summary, _, _ = _measured("docstring-questions", tmp_path)
    after = summary["after"]
    assert isinstance(after, dict)
    assert after["squad_f1"] > max(simple.values())


@pytest.mark.slow
def test_docstring_reranking_beats_its_baselines(tmp_path: Path) -> None:
    train, held_out = _parts("docstring-reranking")
    simple = [
        text_baselines.tfidf_order(train, held_out),
        text_baselines.blind_order(train, held_out),
        text_baselines.minilm_order(held_out),
    ]
    summary, _, _ = _measured("docstring-reranking", tmp_path)
    after = summary["after"]
    assert isinstance(after, dict)
    assert after["mrr"] >= max(order["mrr"] for order in simple) + 0.03


@pytest.mark.slow
def test_word_feelings_beat_their_baselines(tmp_path: Path) -> None:
    letters = text_baselines.tfidf_labels(*_parts("word-feelings"), column="feelings")
    vectors = text_baselines.minilm_labels(*_parts("word-feelings"), column="feelings")
    summary, _, _ = _measured("word-feelings", tmp_path)
    after = summary["after"]
    assert isinstance(after, dict)
    for metric, average in (("labels_f1_micro", "micro"), ("labels_f1_macro", "macro")):
        assert after[metric] > vectors[average] > letters[average] + 0.1


def _parts(name: str) -> tuple[Rows, Rows]:
    data = load_recipe(name).recipe.data
    assert data.eval is not None
    return load_rows(data.train), load_rows(data.eval, key="data.eval")


def _short_parts(name: str) -> tuple[Rows, Rows]:
    """Without the held-out rows that the recipe drops because they are too long."""
    data, encoded = (assembly := Assembly(load_recipe(name))).data, assembly.held_out
    return data.train, data.eval.select(sorted(e.row for e in encoded.examples))


@pytest.mark.slow
def test_docstring_summaries_beats_its_baseline(tmp_path: Path) -> None:
    _, held_out = _short_parts("docstring-summaries")
    lead = translation_baselines.first_sentences(held_out.columns["body"])
    simple = translation_baselines.scores(lead, held_out.columns["summary"])
    summary, _, _ = _measured("docstring-summaries", tmp_path)
    before, after = summary["before"], summary["after"]
    assert isinstance(before, dict) and isinstance(after, dict)
    for metric in ("rouge1", "rougeL"):
        assert after[metric] > max(simple[metric], before[metric])


def test_held_out_docstrings_of_the_summaries_are_new() -> None:
    train, held_out = _parts("docstring-summaries")
    for column in ("summary", "body"):
        assert not near_duplicates(held_out.columns[column], train.columns[column]).nnz


@pytest.mark.slow
def test_django_french_beats_its_baselines(tmp_path: Path) -> None:
    train, held_out = _short_parts("django-french")
    texts, references = held_out.columns["target"], held_out.columns["source"]
    pairs = train.columns["target"], train.columns["source"]
    answers = [texts, translation_baselines.nearest(*pairs, texts), translation_baselines.word_by_word(*pairs, texts)]
    simple = [translation_baselines.scores(a, references) for a in answers]
    summary, _, _ = _measured("django-french", tmp_path)
    after = summary["after"]
    assert isinstance(after, dict)
    for metric in ("chrf", "bleu"):
        assert after[metric] > max(of_one[metric] for of_one in simple)

"""Metrics, compared with values by hand, naive implementations and scikit-learn."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score

from peftlab.errors import DataError, RecipeError
from peftlab.evaluation import metrics
from peftlab.evaluation.metrics import check_metrics, default_metrics, higher_is_better
from peftlab.evaluation.modules import class_statistic, row_statistics
from peftlab.evaluation.scorer import Scorer
from peftlab.evaluation.text_scores import answer_rows
from peftlab.specs.metrics import METRICS, class_slugs, family_of
from peftlab.specs.tasks import TASKS

NAMES = ["ham", "spam", "other"]
REFERENCES = [0, 0, 0, 0, 1, 1, 1, 2]
PREDICTIONS = [0, 0, 0, 1, 1, 1, 0, 1]


def columns_of(predictions: list[int], references: list[int]) -> dict[str, list[int]]:
    return {"predictions": predictions, "references": references}


def tokens(nll_sum: float, num_tokens: int, num_correct: int) -> dict[str, float]:
    return {"nll_sum": nll_sum, "num_scored": num_tokens, "num_tokens": num_tokens, "num_correct": num_correct}


def _score_classes(names: list[str], predictions: list[int], references: list[int]) -> dict[str, float]:
    scorer = Scorer(names, class_names=NAMES)
    scorer.add(columns_of(predictions, references))
    return scorer.compute()


def test_class_metrics_match_the_values_counted_by_hand() -> None:
    values = _score_classes(["accuracy", "precision", "recall", "f1"], PREDICTIONS, REFERENCES)
    # ham: 3 right of 4 predicted, 4 true; spam: 2 right of 4 predicted, 3 true; other: never predicted, 1 true.
    assert values == pytest.approx(
        {
            "accuracy": 5 / 8,
            "precision_macro": (3 / 4 + 2 / 4 + 0) / 3,
            "recall_macro": (3 / 4 + 2 / 3 + 0) / 3,
            "f1_macro": (6 / 8 + 4 / 7 + 0) / 3,
            "precision_ham": 3 / 4,
            "precision_spam": 2 / 4,
            "precision_other": 0.0,
            "recall_ham": 3 / 4,
            "recall_spam": 2 / 3,
            "recall_other": 0.0,
            "f1_ham": 6 / 8,
            "f1_spam": 4 / 7,
            "f1_other": 0.0,
        }
    )
    assert list(values)[:4] == ["accuracy", "precision_macro", "recall_macro", "f1_macro"]
    assert all(type(value) is float for value in values.values())


def test_class_metrics_match_scikit_learn_called_directly() -> None:
    rng = np.random.default_rng(0)
    references, predictions = rng.integers(0, 3, 200).tolist(), rng.integers(0, 3, 200).tolist()
    values = _score_classes(["precision", "recall", "f1"], predictions, references)
    for name, function in [("precision", precision_score), ("recall", recall_score), ("f1", f1_score)]:
        assert values[f"{name}_macro"] == function(references, predictions, average="macro")
        assert [values[f"{name}_{c}"] for c in NAMES] == function(references, predictions, average=None).tolist()


def test_class_metrics_macro_average_ignores_a_class_that_never_occurs() -> None:
    values = _score_classes(["f1"], [0, 1, 1], [0, 1, 1])
    assert values == {"f1_macro": 1.0, "f1_ham": 1.0, "f1_spam": 1.0, "f1_other": None}


def test_class_metrics_of_a_class_without_rows_are_none_even_if_it_is_predicted() -> None:
    values = _score_classes(["precision", "recall", "f1"], [0, 1, 2], [0, 1, 1])
    assert [values[f"{family}_other"] for family in ("precision", "recall", "f1")] == [None, None, None]
    assert values["recall_spam"] == 0.5
    assert values["f1_macro"] == pytest.approx((1 + 2 / 3 + 0) / 3)  # scikit-learn's rule: a predicted class counts


def _naive_macro_f1(predictions: list[int], references: list[int]) -> float:
    scores = []
    for c in set(predictions) | set(references):
        hits = sum(p == c and r == c for p, r in zip(predictions, references, strict=True))
        scores.append(2 * hits / (predictions.count(c) + references.count(c)))
    return sum(scores) / len(scores)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60), st.integers(1, 9))
def test_class_metrics_in_chunks_match_a_naive_implementation(pairs: list[tuple[int, int]], chunk: int) -> None:
    predictions, references = [p for p, _ in pairs], [r for _, r in pairs]
    scorer = Scorer(["accuracy", "f1_macro"], class_names=NAMES)
    for i in range(0, len(pairs), chunk):
        scorer.add(columns_of(predictions[i : i + chunk], references[i : i + chunk]))
    values = scorer.compute()
    assert list(values) == ["accuracy", "f1_macro"]
    assert values["accuracy"] == pytest.approx(sum(p == r for p, r in pairs) / len(pairs))
    assert values["f1_macro"] == pytest.approx(_naive_macro_f1(predictions, references))
    assert values == _score_classes(["accuracy", "f1_macro"], predictions, references)


def test_confusion_counts_by_reference_and_prediction() -> None:
    values = _score_classes(["confusion"], PREDICTIONS, REFERENCES)
    assert len(values) == 9
    assert {name: value for name, value in values.items() if value} == {
        "confusion_ham_as_ham": 3.0,
        "confusion_ham_as_spam": 1.0,
        "confusion_spam_as_ham": 1.0,
        "confusion_spam_as_spam": 2.0,
        "confusion_other_as_spam": 1.0,
    }


def test_token_metrics_weigh_batches_by_their_tokens() -> None:
    scorer = Scorer(["loss", "perplexity", "token_accuracy"])
    scorer.add(tokens(2.0, 1, 0))
    scorer.add(tokens(4.0, 5, 3))
    scorer.add(tokens(0.0, 0, 0))
    assert scorer.compute() == {"loss": 1.0, "perplexity": pytest.approx(math.e), "token_accuracy": 0.5}


def test_perplexity_beyond_float64_is_inf_and_nan_stays_nan() -> None:
    scorer = Scorer(["perplexity"])
    scorer.add(tokens(1e6, 10, 0))
    assert scorer.compute() == {"perplexity": math.inf}
    scorer.add(tokens(math.nan, 10, 0))
    assert math.isnan(scorer.compute()["perplexity"])


def test_exact_match_counts_rows_or_compares_texts(tmp_path: Path) -> None:
    scorer = Scorer(["exact_match"])
    scorer.add({"rows_right": [True, False], "rows": [True, True]})
    scorer.add({"rows_right": [True, True], "rows": [True, True]})
    assert scorer.compute() == {"exact_match": 0.75}

    from peftlab.evaluation.modules import load_metric

    module = load_metric("exact_match")(keep_in_memory=True, cache_dir=str(tmp_path))
    texts = module.compute(predictions=["4", "yes", "no "], references=["4", "yes", "no"])
    assert texts == {"exact_match": pytest.approx(2 / 3)}


def test_scorers_alive_together_keep_their_own_rows_and_compute_repeatedly() -> None:
    first, second = Scorer(["accuracy"], class_names=NAMES), Scorer(["accuracy"], class_names=NAMES)
    first.add(columns_of([0, 1], [0, 1]))
    second.add(columns_of([0, 1], [1, 0]))
    state = np.random.get_state()[1].copy()
    assert (first.compute(), second.compute()) == ({"accuracy": 1.0}, {"accuracy": 0.0})
    second.add(columns_of([2, 2], [2, 2]))
    assert (first.compute(), second.compute()) == ({"accuracy": 1.0}, {"accuracy": 0.5})
    assert np.array_equal(np.random.get_state()[1], state)


def test_class_slugs_makes_distinct_flat_names() -> None:
    assert class_slugs(["World News", "World_News", "macro", "a/b"]) == [
        "World_News",
        "World_News_1",
        "macro_2",
        "a/b",
    ]


def test_scorer_add_refuses_what_is_not_a_class() -> None:
    scorer = Scorer(["f1"], class_names=NAMES)
    with pytest.raises(ValueError, match=r"0\.\.2, found \[-1, 3\]"):
        scorer.add(columns_of([0, 3], [0, -1]))
    with pytest.raises(ValueError, match="found 1, 2"):
        scorer.add(columns_of([0], [0, 1]))


@pytest.mark.parametrize("name", ["loss", "exact_match", "f1"])
def test_scorer_without_rows_is_an_error(name: str) -> None:
    with pytest.raises(DataError, match="found none"):
        Scorer([name], class_names=NAMES).compute()


def test_scorer_add_refuses_a_batch_without_a_needed_column() -> None:
    with pytest.raises(ValueError, match="but references is missing"):
        Scorer(["accuracy"], class_names=NAMES).add({"predictions": [0]})


def test_scorer_checks_per_class_names() -> None:
    with pytest.raises(RecipeError, match="unknown metric 'f1_spma', did you mean 'f1_spam'") as caught:
        Scorer(["f1_spma"], class_names=NAMES)
    assert caught.value.key == "eval.metrics"
    with pytest.raises(RecipeError, match="'f1_spam' needs classes"):
        Scorer(["f1_spam"])


@pytest.mark.parametrize(
    ("names", "task", "has_choices", "message"),
    [
        (["acuracy"], "seq_cls", False, "unknown metric 'acuracy', did you mean 'accuracy'"),
        (["acuracy"], "causal_lm", False, "unknown metric 'acuracy', did you mean 'accuracy'"),
        (["perplexity"], "seq_cls", False, "'perplexity' does not apply to task: seq_cls"),
        (["f1_macro"], "causal_lm", False, "'f1_macro' needs eval.choices"),
        (["zzz", "qqq"], "seq_cls", False, "'zzz'; unknown metric 'qqq'; metrics for task seq_cls: loss, accuracy"),
        ([], "seq_cls", False, "the list is empty"),
    ],
)
def test_check_metrics_refuses_wrong_names(names: list[str], task: str, has_choices: bool, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        check_metrics(names, TASKS[task], has_choices)
    assert caught.value.key == "eval.metrics"


def test_check_metrics_knows_classes_once_they_are_given() -> None:
    check_metrics(["f1", "f1_macro", "f1_spma"], TASKS["seq_cls"], False)
    check_metrics(["f1_spam"], TASKS["causal_lm"], True, class_names=NAMES)
    with pytest.raises(RecipeError, match="did you mean 'f1_spam'"):
        check_metrics(["f1_spma"], TASKS["seq_cls"], False, class_names=NAMES)


def test_default_metrics_are_valid_and_cover_the_task() -> None:
    assert default_metrics(TASKS["seq_cls"], False) == ["loss", "accuracy", "precision", "recall", "f1"]
    assert default_metrics(TASKS["causal_lm"], False) == ["loss", "perplexity", "token_accuracy", "exact_match"]
    check_metrics(["chrf", "bleu", "rougeL", "placeholders"], TASKS["causal_lm"], False)  # if named
    assert default_metrics(TASKS["causal_lm"], True)[4:] == ["accuracy", "precision", "recall", "f1"]
    for task, has_choices in [(TASKS["seq_cls"], False), (TASKS["causal_lm"], False), (TASKS["causal_lm"], True)]:
        check_metrics(default_metrics(task, has_choices), task, has_choices)


def test_higher_is_better_and_headline_by_metric() -> None:
    assert [higher_is_better(n) for n in ("loss", "perplexity", "f1", "f1_spam")] == [False, False, True, True]
    assert [family_of(n).headline for n in ("loss", "f1", "f1_spam")] == ["loss", "f1_macro", "f1_macro"]
    for name, message in [("confusion", "no best value"), ("los", "did you mean 'loss'")]:
        with pytest.raises(RecipeError, match=message) as caught:
            higher_is_better(name)
        assert caught.value.key == "eval.best"


def test_check_metrics_imports_nothing_heavy() -> None:
    program = """
        import sys
        from peftlab.evaluation.metrics import check_metrics, default_metrics
        from peftlab.specs.tasks import TASKS
        check_metrics(default_metrics(TASKS["seq_cls"], False), TASKS["seq_cls"], False)
        print(sorted({"evaluate", "sklearn", "torch", "datasets", "numpy"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_scorer_offline_writes_nothing_and_modules_load_by_path(tmp_path: Path) -> None:
    program = """
        import pathlib, socket, sys
        def no_network(*args, **kwargs):
            raise AssertionError("network used")
        socket.socket.connect = socket.getaddrinfo = no_network
        home, modules = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
        from peftlab.evaluation.scorer import Scorer
        from peftlab.specs.metrics import METRICS
        scorer = Scorer(["accuracy", "loss"], class_names=["a", "b"])
        scorer.add({"nll_sum": 1.0, "num_scored": 2, "predictions": [0, 1], "references": [0, 0]})
        assert scorer.compute() == {"accuracy": 0.5, "loss": 0.5}
        written = [p for p in home.rglob("*") if p.is_file()]
        assert not written, written
        import evaluate
        names = sorted(p.stem for p in modules.glob("[a-z]*.py"))
        computed = [spec.name for spec in METRICS.values() if spec.needs]
        assert set(names) >= {name.lower() for name in computed}, names
        numbers, sets, boxes = [0, 1], [[0, 1], [1, 1]], [[[0, 0.9, 0, 0, 4, 4]]]
        columns = {
            "references": [0, 0], "nll_sum": [1.0], "num_scored": [2], "num_tokens": [2], "num_correct": [1], "row_starts": [1, 1],
            "predicted_labels": sets, "true_labels": sets, "label_probabilities": [[0.1, 0.9], [0.6, 0.7]],
            "answers": ["a b", "c"], "reference_texts": ["a b", "d"], "gains": [[1.0]], "ideal_gains": [[1.0]],
            "found_answers": [{"row": 0, "text": "a cat", "score": 1.0, "null_score": 0.0}], "right_answers": [["cat"]],
            "found": boxes, "objects": [[[0, 0, 0, 4, 4]]], "found_at": [1, 2], "first_relevant": [1, 2],
            "pixels_right": sets, "pixels_predicted": sets, "pixels_true": sets,
        }
        for name in computed:
            spec = METRICS[name]
            arguments = {key: columns.get(column, numbers) for key, column in spec.needs.items()}
            if spec.averaged or name == "confusion":
                arguments["class_names"] = ["a", "b"]
            if spec.of_entities:
                arguments["class_names"] = ["O", "B-a", "I-a"]
            module = evaluate.load(str(modules / f"{name.lower()}.py"), keep_in_memory=True)
            print(name, module.name, module.compute(**arguments))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), str(Path(metrics.__file__).parent / "modules")],
        capture_output=True,
        text=True,
        cwd=Path(metrics.__file__).parents[2],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == sum(bool(spec.needs) for spec in METRICS.values())
    assert "f1 f1 {'f1_macro': 0.3333333333333333, 'f1_a': 0.6666666666666666, 'f1_b': None}" in lines
    assert "confusion confusion {'confusion': [[1, 1], [0, 0]]}" in lines


# Those of entities, pixels and boxes: test_entity_metrics.py, test_pixel_metrics.py, test_map.py.
OF_ROWS = [
    n
    for n, spec in METRICS.items()
    if spec.needs and spec.rows not in ((), ("vectors",)) and spec.on_card and not spec.of_entities
    if not {"objects", "pixels_true"} & set(spec.rows)
]


@pytest.mark.parametrize("name", OF_ROWS)
def test_row_statistics_equal_the_value_of_the_evaluation(name: str) -> None:
    """Compares two implementations: scikit-learn over all rows, and a sum over rows that may be drawn repeatedly."""
    rng = np.random.default_rng(1)
    predicted, true = rng.integers(0, 3, 50), rng.integers(0, 3, 50)
    tokens_, correct, nll = rng.integers(1, 9, 50), rng.integers(0, 2, 50), rng.random(50) * 5
    texts, others = ([" ".join(rng.choice(["the", "a", "cat", "sits"], 6)) for _ in range(50)] for _ in range(2))
    scorer = Scorer([METRICS[name].headline], class_names=NAMES)
    scorer.add(
        {
            "nll_sum": float(nll.sum()),
            "num_scored": int(tokens_.sum()),
            "num_tokens": int(tokens_.sum()),
            "num_correct": int(correct.sum()),
            "rows_right": (correct == tokens_).tolist(),
            "rows": [True] * 50,
            "predictions": predicted.tolist(),
            "references": true.tolist(),
            "predicted_numbers": nll.tolist(),
            "true_numbers": true.tolist(),
            "found_answers": [
                {"row": i, "text": f"a {p}", "score": 1, "null_score": 0} for i, p in enumerate(predicted)
            ],
            "right_answers": [[f"{t} 0"] for t in true],
            "answers": texts,
            "reference_texts": others,
        }
    )
    columns = {"nll": nll, "positions": tokens_, "tokens": tokens_, "correct_tokens": correct}
    columns |= {"predicted_class": predicted, "true_class": true, "correct_classes": predicted == true}
    columns |= {
        "answer_exact": np.zeros(50),
        "class_positions": np.ones(50),
        "predicted_numbers": nll,
        "true_numbers": true,
    }
    columns |= {"answer_f1": np.where((predicted == true) | (predicted == 0), 2 / 3, 0)}
    columns |= answer_rows(texts, others)
    statistic = row_statistics({k: v.astype(np.float64) for k, v in columns.items()})[METRICS[name].headline]
    assert statistic(np.ones((1, 50))) == pytest.approx([scorer.compute()[METRICS[name].headline]], abs=1e-12)
    if METRICS[name].of_classes:
        counts = np.ones((1, 50))
        counts[0, predicted == true] = 2  # code that ignores how often a row was drawn gives the same value
        assert statistic(counts) != pytest.approx(statistic(np.ones((1, 50))))


@pytest.mark.parametrize("family", ["precision", "recall", "f1"])
def test_class_statistic_equals_the_value_of_the_evaluation(family: str) -> None:
    rng = np.random.default_rng(2)
    predicted, true = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    values = _score_classes([family], predicted.tolist(), true.tolist())
    rows = {"predicted_class": predicted.astype(np.float64), "true_class": true.astype(np.float64)}
    for index, name in enumerate(NAMES):
        statistic, num = class_statistic(family, rows, index)
        assert statistic(np.ones((1, 60))) == pytest.approx([values[f"{family}_{name}"]])
        assert num == int(((predicted if family == "precision" else true) == index).sum())

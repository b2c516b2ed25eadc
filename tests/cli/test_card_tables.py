"""The printed report card fits 80 columns, is complete without colours, and explains itself."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from typing import Any

import card_examples as examples
import pytest
from rich.console import Console

from peftlab.cli.card_tables import show_card
from peftlab.cli.output import Output
from peftlab.evaluation.card import make_card
from peftlab.runs import finite

RUNS: list[Callable[[], Any]] = [
    examples.classification,
    examples.language_model,
    examples.embedding,
    lambda: examples.classification(1, baseline=None),
]


def _printed(figures: Any, *, width: int = 80, colours: bool = False, verbose: bool = True) -> str:
    """The printed card, read back from JSON as from a run folder."""
    card = json.loads(json.dumps(finite(make_card(figures)), allow_nan=False))
    out = Output(verbose=verbose)
    out.stdout = io.StringIO()
    out._console = Console(file=out.stdout, width=width, force_terminal=colours, highlight=False, emoji=False)
    show_card(out, card)
    return out.stdout.getvalue()


def _row(printed: str, label: str) -> list[str]:
    line = next(line for line in printed.splitlines() if line.startswith(label))
    return re.split(r" {2,}", line.strip())


@pytest.mark.parametrize("figures", RUNS)
@pytest.mark.parametrize("width", [80, 100])
def test_card_tables_keep_to_the_width_and_cut_nothing(figures: Callable[[], Any], width: int) -> None:
    printed = _printed(figures(), width=width)
    assert max(len(line) for line in printed.splitlines()) <= width
    assert (
        "\x1b" not in printed
        and "..." not in printed
        and "\u2026" not in printed
        and "None" not in printed
        and "nan" not in printed
    )
    assert all(line == line.rstrip() for line in printed.splitlines())


def test_card_tables_of_classification_over_five_seeds() -> None:
    printed = _printed(examples.classification())
    lines = printed.splitlines()
    assert _row(printed, "metric") == ["metric", "teacher", "labels alone", "distilled", "kept"]
    assert _row(printed, "accuracy") == ["accuracy", "0.741", "0.472", "0.695", "93.7 %"]
    place = next(i for i, line in enumerate(lines) if line.startswith("accuracy"))
    assert lines[place + 1].split() == ["0.719-0.763", "0.460-0.484", "0.683-0.707", "92.2-95.3", "%"]
    # Value and interval are right-aligned.
    assert (
        len(lines[place]) == len(lines[place + 1])
        and lines[place].index("0.741") + 5 == lines[place + 1].index("0.719") + 11
    )
    assert _row(printed, "parameters") == ["parameters", "10.6 M", "5.3 M", "5.3 M", "0.50x"]
    assert _row(printed, "tokens/s") == ["tokens/s", "27,198", "57,528", "57,528", "2.12x"]
    assert _row(printed, "steps") == ["steps", "-", "300", "300"]
    assert "95 % interval over 5 seeds, all on the same 1,500 held-out rows" in printed
    assert lines[0].startswith("Distillation helped: accuracy 0.695 against 0.472 for the same student trained")
    assert [line.split()[:3] for line in lines[-5:]] == [[str(s), "0.741", f"{b:.3f}"] for s, b in zip(
        range(17, 22), (0.484, 0.478, 0.472, 0.466, 0.460), strict=True)]  # fmt: skip
    assert lines[-5].endswith("+19.9 points")


@pytest.mark.parametrize("figures", RUNS)
def test_card_tables_without_verbose_fit_a_screen(figures: Callable[[], Any]) -> None:
    short, whole = _printed(figures(), verbose=False).splitlines(), _printed(figures())
    assert len(short) <= 28 and max(map(len, short)) <= 80
    assert short[0] == whole.splitlines()[0], "the verdict comes first"
    assert short[-1].startswith("-v") and len(short) < len(whole.splitlines())


def test_card_tables_of_a_language_model_with_one_seed() -> None:
    printed = _printed(examples.language_model(), width=100)
    assert _row(printed, "metric") == ["metric", "teacher", "untrained", "labels alone", "distilled", "kept"]
    assert _row(printed, "KL to teacher") == ["KL to teacher", "-", "1.194", "0.346", "0.200", "-"]
    assert _row(printed, "perplexity") == ["perplexity", "14.92", "1,629", "20.49", "18.73", "1.26x"]
    # The loss repeats the perplexity, so it is not printed. One seed has no table of seeds.
    assert "\nloss" not in printed and "seed  " not in printed
    assert "divergence of its probabilities from the teacher's, in nats; 0 is equal" in printed
    assert "0.328-0.366" in printed and "95 % interval over the 1,500 held-out rows" in printed


def test_card_tables_drop_the_untrained_student_for_large_numbers() -> None:
    figures = examples.language_model()
    for name in ("teacher", "baseline", "student", "cut"):
        side: Any = figures["seeds"][0][name]  # type: ignore[literal-required]
        side["metrics"]["perplexity"] |= {"value": 12_345.0, "low": 12_000.0, "high": 13_000.0}
    line = next(line for line in _printed(figures).splitlines() if "12,000" in line)
    assert line.split() == ["12,000-13,000", "12,000-13,000", "12,000-13,000", "1.25-1.27x"]
    assert "untrained" not in _printed(figures) and "untrained" in _printed(figures, width=100)


def test_card_tables_of_an_embedding_model_have_no_empty_columns() -> None:
    printed = _printed(examples.embedding())
    assert _row(printed, "metric") == ["metric", "untrained", "distilled"]
    assert _row(printed, "Spearman") == ["Spearman", "0.573", "0.845"]
    assert "kept" not in printed and "labels alone  " not in printed


@pytest.mark.parametrize(
    ("student", "style"),
    [(0.695, "\x1b[1;32mDistillation helped\x1b[0m:"), (0.40, "\x1b[1;31mDistillation did not help")],
)
def test_card_tables_colours_follow_the_verdict_and_add_nothing(student: float, style: str) -> None:
    figures = examples.classification(student=student)
    coloured = _printed(figures, colours=True)
    assert style in coloured
    assert ("\x1b[31m" in coloured) == (student < 0.472)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert [line.rstrip() for line in plain.splitlines()] == _printed(figures).splitlines()


def test_card_tables_print_inf_and_negative_intervals() -> None:
    figures = examples.embedding()
    seed = figures["seeds"][0]
    seed["student"]["metrics"]["spearman"] |= {"value": 0.01, "low": -0.02, "high": 0.04}
    seed["student"]["metrics"]["kl"] = {"value": float("inf"), "low": None, "high": None, "over": "rows", "n": 1500}
    printed = _printed(figures)
    assert "-0.0200 to 0.0400" in printed
    assert _row(printed, "KL to teacher") == ["KL to teacher", "-", "inf"]


def test_card_tables_print_a_diverged_student_from_run_json() -> None:
    """run.json stores infinite numbers as text."""
    figures = examples.classification(2)
    infinite = {"value": float("inf"), "low": float("inf"), "high": float("inf"), "over": "rows", "n": 1500}
    for seed in figures["seeds"]:
        seed["student"]["metrics"]["kl"] = seed["paired"]["gain"]["kl"] = infinite
    printed = _printed({**figures, "headline": "kl"})
    assert _row(printed, "KL to teacher") == ["KL to teacher", "-", "0.922", "inf", "-"]
    assert "Distillation did not help, the student is worse for it: KL to the teacher inf against 0.922" in " ".join(
        printed.split()
    )
    assert _row(printed, "  18")[-2:] == ["inf", "+inf"]


def test_card_tables_print_notes_under_the_verdict() -> None:
    figures = examples.classification()
    for seed in figures["seeds"]:
        seed["baseline"]["steps"] = 200
    printed = _printed(figures)
    assert "Not the same budget: the student had 300 steps, the baseline 200." in printed.splitlines()


def test_card_tables_without_costs_have_no_cost_table() -> None:
    figures = examples.classification(1)
    for name in ("teacher", "student", "baseline"):
        side: Any = figures["seeds"][0][name]  # type: ignore[literal-required]
        for key in set(side) - {"metrics"}:
            del side[key]
    assert "cost" not in _printed(figures)


def test_card_tables_of_a_slow_model_and_a_metric_that_is_always_zero() -> None:
    """Prints seconds instead of thousands of milliseconds, no share of zero, and unbroken words in labels."""
    figures = examples.language_model()
    seed = figures["seeds"][0]
    for name in ("teacher", "student", "baseline"):
        side: Any = seed[name]  # type: ignore[literal-required]
        side |= {"latency_ms": 3081.4, "latency_low_ms": 960.7, "latency_high_ms": 3162.1}
        side["metrics"]["exact_match"] = {"value": 0.0, "low": 0.0, "high": 0.01, "over": "rows", "n": 1500}
    seed["student"]["latency_low_ms"] = 2960.7
    seed["paired"]["kept"]["exact_match"] = {
        "value": float("nan"),
        "low": None,
        "high": None,
        "over": "rows",
        "n": 1500,
    }
    printed = _printed(figures)
    assert "3.08 s" in printed and "2.96-3.16 s" in printed and "960.7 ms-3.16 s" in printed
    assert _row(printed, "exact match")[-1] == "-" and "nan" not in printed
    assert "parameters" in printed

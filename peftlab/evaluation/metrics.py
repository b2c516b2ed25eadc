"""Which metrics exist, which a recipe may ask for, and the Scorer that computes them from streamed counts.

A metric is a family (``f1``) that gives one or more flat values (``f1_macro``, ``f1_spam``). The numbers come from the
``evaluate`` modules in ``peftlab/evaluation/modules``; importing those takes seconds, so only ``Scorer.compute`` does.
"""

from __future__ import annotations

import difflib
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftlab.errors import DataError, RecipeError

Stream = Literal["classes", "tokens", "rows"]


@dataclass(frozen=True)
class MetricSpec:
    """One family of metrics.

    Attributes:
        tasks: the values of the recipe's ``task`` it applies to.
        stream: which ``Scorer.add_*`` feeds it; "classes" needs class names (causal_lm: eval.choices).
        inputs: the arguments of its ``evaluate`` module.
        higher_is_better: None where values have no order.
        averaged: it gives NAME_macro and one NAME_CLASS per class instead of NAME.
    """

    name: str
    tasks: tuple[str, ...]
    stream: Stream
    inputs: tuple[str, ...]
    higher_is_better: bool | None = True
    averaged: bool = False


_LM = ("causal_lm",)
_CLASSES = ("causal_lm", "seq_cls", "image_cls")
_NLL = ("nll_sum", "num_tokens")
_PAIRS = ("predictions", "references")

METRICS: dict[str, MetricSpec] = {
    spec.name: spec
    for spec in (
        MetricSpec("loss", _CLASSES, "tokens", _NLL, higher_is_better=False),
        MetricSpec("perplexity", _LM, "tokens", _NLL, higher_is_better=False),
        MetricSpec("token_accuracy", _LM, "tokens", ("num_correct", "num_tokens")),
        MetricSpec("exact_match", _LM, "rows", _PAIRS),
        MetricSpec("accuracy", _CLASSES, "classes", _PAIRS),
        MetricSpec("precision", _CLASSES, "classes", _PAIRS, averaged=True),
        MetricSpec("recall", _CLASSES, "classes", _PAIRS, averaged=True),
        MetricSpec("f1", _CLASSES, "classes", _PAIRS, averaged=True),
        MetricSpec("confusion", _CLASSES, "classes", _PAIRS, higher_is_better=None),
    )
}


def class_slugs(class_names: Sequence[str]) -> list[str]:
    """The class names as they appear in flat metric names: white space becomes ``_``, all else stays.

    A name that would collide with an earlier one, or with ``macro``, gets its class index appended.
    """
    slugs = ["macro"]
    for index, name in enumerate(class_names):
        slug = "_".join(name.split())
        while slug in slugs:
            slug = f"{slug}_{index}"
        slugs.append(slug)
    return slugs[1:]


def default_metrics(task_kind: str, has_choices: bool) -> list[str]:
    """The families a task is scored with when the recipe names none: all that apply, without the confusion counts."""
    return [name for name in _available(task_kind, has_choices) if name != "confusion"]


def check_metrics(
    names: Sequence[str], task_kind: str, has_choices: bool, *, class_names: Sequence[str] | None = None
) -> None:
    """Checks the recipe's ``eval.metrics``; imports nothing heavy.

    Args:
        names: families ("f1") or flat values ("f1_macro", "f1_spam").
        task_kind: the recipe's ``task``.
        has_choices: whether eval.choices is given (causal_lm only).
        class_names: without them any NAME_CLASS of a per-class family passes here; ``Scorer`` checks it again.

    Raises:
        RecipeError: key eval.metrics, with all wrong names at once.
    """
    available = _available(task_kind, has_choices)
    slugs = None if class_names is None else class_slugs(class_names)
    problems = [] if names else ["no metric is named"]
    for name in names:
        family = _family(name, slugs)
        if family is None:
            problems.append(_unknown(name, _available(task_kind, True), slugs))
        elif task_kind not in METRICS[family].tasks:
            problems.append(f"{name!r} does not apply to task: {task_kind}")
        elif family not in available:
            problems.append(f"{name!r} needs eval.choices, the possible completions")
    if problems:
        valid = f"metrics for task {task_kind}: {', '.join(_spelled_out(available))}"
        raise RecipeError(f"{'; '.join(problems)}; {valid}", key="eval.metrics")


def flat_names(names: Sequence[str], class_names: Sequence[str] | None) -> list[str]:
    """The flat values with an order that ``Scorer.compute`` gives for ``names``: what eval.best can be."""
    flat = []
    for name in names:
        if name not in METRICS:
            flat.append(name)
        elif METRICS[name].averaged:
            flat += [f"{name}_macro", *(f"{name}_{slug}" for slug in class_slugs(class_names or []))]
        elif METRICS[name].higher_is_better is not None:
            flat.append(name)
    return flat


def headline(name: str) -> str:
    """The flat value a family is judged by: ``f1`` gives ``f1_macro``; a flat name gives itself."""
    return f"{name}_macro" if name in METRICS and METRICS[name].averaged else name


def higher_is_better(name: str) -> bool:
    """Whether a family or flat value is better when it is larger.

    Raises:
        RecipeError: key eval.best; unknown, or without an order (confusion).
    """
    family = _family(name, None)
    if family is None:
        raise RecipeError(_unknown(name, list(METRICS), None), key="eval.best")
    better = METRICS[family].higher_is_better
    if better is None:
        raise RecipeError(f"{name!r} has no best value; name one number, such as accuracy or f1_macro", key="eval.best")
    return better


class Scorer:
    """Collects counts batch by batch and computes the flat metric values.

    Keeps per batch three numbers, per scored row one bool or two class indices, and nothing of logits or vocabulary
    size. Writes no files and shares no state, so several may live at once.

    Args:
        names: families or flat values; only these are returned.
        class_names: one per class index; needed by the metrics of the stream "classes".

    Attributes:
        streams: the streams that must be fed before ``compute``.

    Raises:
        RecipeError: key eval.metrics; unknown name, or class metrics without class names.
    """

    def __init__(self, names: Sequence[str], *, class_names: Sequence[str] | None = None) -> None:
        self._slugs = class_slugs(class_names or [])
        self._families: dict[str, str] = {}
        for name in names:
            family = _family(name, self._slugs or None)
            if family is None:
                raise RecipeError(_unknown(name, list(METRICS), self._slugs), key="eval.metrics")
            if METRICS[family].stream == "classes" and not self._slugs:
                raise RecipeError(f"{name!r} needs classes (causal_lm: eval.choices)", key="eval.metrics")
            self._families[name] = family
        self.streams: frozenset[Stream] = frozenset(METRICS[f].stream for f in self._families.values())
        self._nll_sum = array("d")
        self._num_tokens = array("q")
        self._num_correct = array("q")
        self._exact = array("b")
        self._predictions = array("q")
        self._references = array("q")

    def add_tokens(self, nll_sum: float, num_tokens: int, num_correct: int) -> None:
        """Adds one batch.

        Args:
            nll_sum: sum of the negative log-likelihoods in nats, summed in float64.
            num_tokens: scored tokens; for a classifier, rows.
            num_correct: tokens whose most likely prediction is right.
        """
        self._nll_sum.append(nll_sum)
        self._num_tokens.append(num_tokens)
        self._num_correct.append(num_correct)

    def add_rows(self, exact: Sequence[bool]) -> None:
        """Adds rows; ``exact`` says of each whether all its scored tokens are right."""
        self._exact.extend(bool(row) for row in exact)

    def add_classes(self, predictions: Sequence[int], references: Sequence[int]) -> None:
        """Adds rows as class indices into class_names.

        Raises:
            ValueError: the lengths differ or an index is not a class.
        """
        if len(predictions) != len(references):
            raise ValueError(f"expected as many predictions as references, found {len(predictions)}, {len(references)}")
        outside = {int(i) for i in (*predictions, *references)} - set(range(len(self._slugs)))
        if outside:
            raise ValueError(f"expected class indices in 0..{len(self._slugs) - 1}, found {sorted(outside)}")
        self._predictions.extend(int(i) for i in predictions)
        self._references.extend(int(i) for i in references)

    def compute(self) -> dict[str, float]:
        """The values asked for, by flat name: first one per family, in the order of names, then those per class.

        A precision, recall or F1 without rows to divide by is 0.0; the macro average is over the classes that occur in
        predictions or references. ``confusion`` gives ``confusion_R_as_P``, the rows of class R predicted as P.
        Values may be ``nan`` or ``inf`` (perplexity beyond float64): JSON writers must handle them.

        Raises:
            DataError: a stream that is needed got no tokens or rows.
        """
        from peftlab.evaluation.modules import MODULES

        columns = self._columns()
        values: dict[str, float] = {}
        # The modules create their cache folder even when they keep everything in memory.
        with tempfile.TemporaryDirectory(prefix="peftlab-metrics-") as scratch:
            for family in dict.fromkeys(self._families.values()):
                spec = METRICS[family]
                arguments: dict[str, Any] = {key: columns[spec.stream][key] for key in spec.inputs}
                if spec.averaged or family == "confusion":
                    arguments["class_names"] = self._slugs
                module = MODULES[family](keep_in_memory=True, cache_dir=scratch, seed=0)
                computed: dict[str, Any] = module.compute(**arguments)
                flat = self._flat_confusion(computed[family]) if family == "confusion" else computed
                values |= {v: number for v, number in flat.items() if family in self._families or v in self._families}
        headlines = {headline(family) for family in METRICS}
        return dict(sorted(values.items(), key=lambda item: item[0] not in headlines))

    def _columns(self) -> dict[Stream, dict[str, list[Any]]]:
        """The inputs of the modules, per stream."""
        sizes: dict[Stream, int] = {
            "tokens": sum(self._num_tokens),
            "rows": len(self._exact),
            "classes": len(self._references),
        }
        for stream in sorted(self.streams):
            if sizes[stream] == 0:
                raise DataError(f"expected {stream} to score, found none: the evaluation data has no rows to score")
        return {
            "tokens": {
                "nll_sum": self._nll_sum.tolist(),
                "num_tokens": self._num_tokens.tolist(),
                "num_correct": self._num_correct.tolist(),
            },
            "rows": {"predictions": self._exact.tolist(), "references": [1] * len(self._exact)},
            "classes": {"predictions": self._predictions.tolist(), "references": self._references.tolist()},
        }

    def _flat_confusion(self, matrix: list[list[int]]) -> dict[str, float]:
        return {
            f"confusion_{reference}_as_{prediction}": float(count)
            for reference, row in zip(self._slugs, matrix, strict=True)
            for prediction, count in zip(self._slugs, row, strict=True)
        }


def _available(task_kind: str, has_choices: bool) -> list[str]:
    has_classes = has_choices or task_kind != "causal_lm"
    return [n for n, s in METRICS.items() if task_kind in s.tasks and (s.stream != "classes" or has_classes)]


def _family(name: str, slugs: Sequence[str] | None) -> str | None:
    """The family of a family name or flat value; slugs None: any class name is believed."""
    if name in METRICS:
        return name
    for spec in METRICS.values():
        class_name = name.removeprefix(f"{spec.name}_")
        is_class = bool(class_name) if slugs is None else class_name in ("macro", *slugs)
        if spec.averaged and class_name != name and is_class:
            return spec.name
    return None


def _spelled_out(families: Iterable[str], slugs: Sequence[str] = ("CLASS",)) -> list[str]:
    names = []
    for family in families:
        names.append(family)
        if METRICS[family].averaged:
            names += [f"{family}_{slug}" for slug in ("macro", *slugs)]
    return names


def _unknown(name: str, families: Sequence[str], slugs: Sequence[str] | None) -> str:
    nearest = difflib.get_close_matches(name, _spelled_out(families, slugs or ()), n=1)
    return f"unknown metric {name!r}" + (f", did you mean {nearest[0]!r}?" if nearest else "")

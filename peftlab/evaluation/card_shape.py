"""The types of the student report card and of its input. All are plain JSON."""

from __future__ import annotations

from typing import Literal, NotRequired, Required, TypedDict

from peftlab.measuring.intervals import IntervalDict

Outcome = Literal["helped", "no_difference", "did_not_help", "not_compared", "undecided"]
Ratio = Literal["share", "times"]
# The models on the card. "baseline": the same student, trained on the labels alone with the same budget. "cut": the
# student before its training.
WHO = ("teacher", "cut", "baseline", "student")


class Costs(TypedDict, total=False):
    """The costs of one model, without those that were not measured.

    num_parameters: of the whole model; num_trained: parameters with a gradient. file_bytes: of the saved weights.
    latency_ms, latency_low_ms, latency_high_ms: median and quartiles of one forward pass. tokens_per_s: at the median.
    speed: speed relative to the teacher, which has 1.
    peak_memory_bytes, seconds, steps: of its training in this run; missing for a teacher that was not trained in it.
    """

    num_parameters: int
    num_trained: int
    file_bytes: int
    latency_ms: float
    latency_low_ms: float
    latency_high_ms: float
    tokens_per_s: float | None
    speed: IntervalDict
    peak_memory_bytes: int
    seconds: float
    steps: int


class Side(Costs, total=False):
    """One model of one seed: its costs, and its metrics by flat name (see ``card_metrics``)."""

    metrics: Required[dict[str, IntervalDict]]


class Paired(TypedDict):
    """Differences and ratios on the same rows, by metric; from ``card.paired``.

    gain: student - baseline. lead: teacher - baseline. progress: student - cut. kept: student / teacher.
    """

    gain: dict[str, IntervalDict]
    lead: dict[str, IntervalDict]
    progress: dict[str, IntervalDict]
    kept: dict[str, IntervalDict]


class Seed(TypedDict):
    """Everything measured with one seed."""

    seed: int
    teacher: Side
    student: Side
    baseline: NotRequired[Side]
    cut: NotRequired[Side]
    paired: Paired


class Figures(TypedDict):
    """The input of ``card.make_card``.

    headline: flat name of the verdict's metric. num_rows: held-out rows, the same for all models.
    no_baseline: why there is no baseline, such as "distill.baseline: false". timed_on: batch and device of the latencies.
    """

    headline: str
    num_rows: int
    seeds: list[Seed]
    no_baseline: NotRequired[str]
    timed_on: NotRequired[str]


class MetricRow(TypedDict):
    """One metric of all models; with several seeds the means, see ``card.make_card``.

    label, note: for people; the note may be "". in_points: show differences as percentage points. kept_as: "share" if
    student / teacher is a share kept, "times" if lower is better, None if the teacher has no value.
    """

    name: str
    label: str
    note: str
    higher_is_better: bool
    in_points: bool
    teacher: IntervalDict | None
    cut: IntervalDict | None
    baseline: IntervalDict | None
    student: IntervalDict | None
    gain: IntervalDict | None
    lead: IntervalDict | None
    progress: IntervalDict | None
    kept: IntervalDict | None
    kept_as: Ratio | None


class SeedLine(TypedDict):
    """The headline metric of one seed. better: whether the student beats the baseline."""

    seed: int
    teacher: float | None
    cut: float | None
    baseline: float | None
    student: float | None
    gain: float | None
    better: bool | None


class Verdict(TypedDict):
    outcome: Outcome
    text: str


class Card(TypedDict):
    """The report card.

    metrics: the headline first. costs: by ``WHO``, means over seeds. ratios: student / teacher of each cost both have.
    notes: caveats of the figures.
    """

    headline: str
    num_rows: int
    num_seeds: int
    metrics: list[MetricRow]
    costs: dict[str, Costs]
    ratios: dict[str, float]
    timed_on: str | None
    seeds: list[SeedLine]
    verdict: Verdict
    notes: list[str]

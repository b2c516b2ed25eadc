"""How the metrics of a report card are called, which direction is better, and what they mean in one line."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from peftlab.evaluation.card_shape import Ratio
from peftlab.evaluation.metrics import higher_is_better


@dataclass(frozen=True)
class CardMetric:
    """See ``card_shape.MetricRow`` for the attributes. lowest, highest: no value can be beyond."""

    label: str
    higher_is_better: bool
    in_points: bool = False
    kept_as: Ratio | None = None
    note: str = ""
    lowest: float = 0.0
    highest: float = math.inf


_ALIKE = "1 is equal"
# In the order of the card. Those without a kept_as compare with the teacher, or are no task metric.
_KNOWN: dict[str, CardMetric] = {
    "accuracy": CardMetric("accuracy", True, True, "share", "share of the rows answered right"),
    "f1_macro": CardMetric("macro F1", True, True, "share", "F1 averaged over classes, rare ones counting as much"),
    "exact_match": CardMetric("exact match", True, True, "share", "share of the rows with every token right"),
    "perplexity": CardMetric(
        "perplexity", False, kept_as="times", note="as unsure as a free choice among so many tokens; lower is better"
    ),
    "token_accuracy": CardMetric("token accuracy", True, True, "share", "share of the tokens that were the top guess"),
    "loss": CardMetric("loss", False, note="its surprise at what is right, in nats; lower is better"),
    "spearman": CardMetric(
        "Spearman",
        True,
        note=f"whether pairs of texts are as similar, in order, as for the teacher; {_ALIKE}",
        lowest=-1.0,
        highest=1.0,
    ),
    "neighbour_recall": CardMetric(
        "top-10 recall", True, True, note="share of the teacher's ten nearest texts that it finds too"
    ),
    "cosine": CardMetric(
        "cosine", True, note=f"of its vector of a text with the teacher's; {_ALIKE}", lowest=-1.0, highest=1.0
    ),
    "agreement": CardMetric("agreement", True, True, note="how often its top answer is the teacher's, right or wrong"),
    "kl": CardMetric(
        "KL to teacher", False, note="how far its probabilities are from the teacher's, in nats; 0 is equal"
    ),
    "ece": CardMetric(
        "ECE", False, note="how far its confidence is from how often it is right; 0 is honest", highest=1.0
    ),
    "adaptive_ece": CardMetric(
        "adaptive ECE", False, note="ECE with as many answers in every bin; 0 is honest", highest=1.0
    ),
    "brier": CardMetric("Brier score", False, note="squared error of its probabilities; 0 is best", highest=2.0),
}


def card_metric(name: str) -> CardMetric:
    """What a card says about a flat metric name. Raises: RecipeError when neither the card nor METRICS knows it."""
    about = _KNOWN.get(name) or CardMetric(name.replace("_", " "), higher_is_better(name), True, "share")
    return replace(about, highest=1.0) if about.in_points else about


def in_order(names: set[str], headline: str) -> list[str]:
    """The headline, the known ones in the card's order, the others by name."""
    known = [name for name in _KNOWN if name in names and name != headline]
    return [headline, *known, *sorted(names - set(known) - {headline})]

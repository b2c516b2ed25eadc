"""The shipped metrics as ``evaluate`` modules; each file also loads by path with ``evaluate.load``, without a hub."""

from __future__ import annotations

import evaluate

from peftlab.evaluate.modules.accuracy import Accuracy
from peftlab.evaluate.modules.confusion import Confusion
from peftlab.evaluate.modules.exact_match import ExactMatch
from peftlab.evaluate.modules.f1 import F1
from peftlab.evaluate.modules.loss import Loss
from peftlab.evaluate.modules.perplexity import Perplexity
from peftlab.evaluate.modules.precision import Precision
from peftlab.evaluate.modules.recall import Recall
from peftlab.evaluate.modules.token_accuracy import TokenAccuracy

MODULES: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "precision": Precision,
    "recall": Recall,
    "f1": F1,
    "confusion": Confusion,
    "loss": Loss,
    "perplexity": Perplexity,
    "token_accuracy": TokenAccuracy,
    "exact_match": ExactMatch,
}

"""The shipped metrics as ``evaluate`` modules; each file also loads by path with ``evaluate.load``, without a hub."""

from __future__ import annotations

import evaluate

from peftlab.evaluation.modules.accuracy import Accuracy
from peftlab.evaluation.modules.confusion import Confusion
from peftlab.evaluation.modules.exact_match import ExactMatch
from peftlab.evaluation.modules.f1 import F1
from peftlab.evaluation.modules.loss import Loss
from peftlab.evaluation.modules.perplexity import Perplexity
from peftlab.evaluation.modules.precision import Precision
from peftlab.evaluation.modules.recall import Recall
from peftlab.evaluation.modules.token_accuracy import TokenAccuracy

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

"""Distillation losses and targets: pure functions, without models, data and recipes."""

from peftlab.distillation.features import INNER_ATTENTION, INNER_HIDDEN, VECTOR_LOSSES, relation_kl
from peftlab.distillation.gradients import GradientReport, gradient_report
from peftlab.distillation.losses import cross_entropy, divergence, sparse_divergence
from peftlab.distillation.objective import (
    Objective,
    VectorObjective,
    as_teacher,
    combine,
    num_targets,
    select,
    select_targets,
)
from peftlab.distillation.targets import SparseTarget
from peftlab.distillation.uld import UldObjective, aligned_answers
from peftlab.distillation.vocabulary import compare, fingerprint, require_same, shared_width

__all__ = [
    "GradientReport",
    "INNER_ATTENTION",
    "INNER_HIDDEN",
    "Objective",
    "SparseTarget",
    "UldObjective",
    "VECTOR_LOSSES",
    "VectorObjective",
    "aligned_answers",
    "as_teacher",
    "combine",
    "compare",
    "cross_entropy",
    "divergence",
    "fingerprint",
    "gradient_report",
    "num_targets",
    "relation_kl",
    "require_same",
    "select",
    "select_targets",
    "shared_width",
    "sparse_divergence",
]

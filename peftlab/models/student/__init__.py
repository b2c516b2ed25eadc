"""Students cut from their teacher: fewer or narrower layers, written as plain transformers checkpoints."""

from peftlab.models.student.cut import StudentCut, check_cut, evenly_spaced
from peftlab.models.student.families import Sizes, Widths
from peftlab.models.student.fresh import fresh_skeleton
from peftlab.models.student.importance import (
    Distance,
    Importance,
    Outputs,
    cosine_distance,
    kl_divergence,
    layers_by_importance,
)
from peftlab.models.student.stack import cut_layers, find_stack, only_layers
from peftlab.models.student.width import WidthCut, cut_width
from peftlab.models.student.write import NOTES_NAME, make_student, write_student

__all__ = [
    "Distance",
    "Importance",
    "NOTES_NAME",
    "Outputs",
    "Sizes",
    "StudentCut",
    "WidthCut",
    "Widths",
    "check_cut",
    "cosine_distance",
    "cut_layers",
    "cut_width",
    "evenly_spaced",
    "find_stack",
    "fresh_skeleton",
    "kl_divergence",
    "layers_by_importance",
    "make_student",
    "only_layers",
    "write_student",
]

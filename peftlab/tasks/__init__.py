"""Tasks: one file each, behind the protocol in ``base``."""

from peftlab.tasks.base import Batch, Encoded, Example, OutputHead, Outputs, Preview, Scores, Task, collate_packed
from peftlab.tasks.causal_lm import CausalLM
from peftlab.tasks.seq_cls import SequenceClassification

__all__ = [
    "Batch",
    "CausalLM",
    "Encoded",
    "Example",
    "OutputHead",
    "Outputs",
    "Preview",
    "Scores",
    "SequenceClassification",
    "Task",
    "collate_packed",
]

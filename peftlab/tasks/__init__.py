"""Tasks: one file each, behind the protocol in ``base``."""

from peftlab.tasks.base import Batch, Encoded, Example, OutputHead, Outputs, Preview, Scores, Task, collate_packed
from peftlab.tasks.causal_lm import CausalLM
from peftlab.tasks.embedding import POOLINGS, Embedding
from peftlab.tasks.image_cls import ImageClassification
from peftlab.tasks.labels import Labels
from peftlab.tasks.seq_cls import SequenceClassification

__all__ = [
    "Batch",
    "CausalLM",
    "Embedding",
    "Encoded",
    "Example",
    "ImageClassification",
    "Labels",
    "POOLINGS",
    "OutputHead",
    "Outputs",
    "Preview",
    "Scores",
    "SequenceClassification",
    "Task",
    "collate_packed",
]

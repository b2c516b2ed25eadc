"""Data: from the sources that a recipe names to rows, their classes, the held-out part, and batches."""

from peftlab.data.batching import BatchPlan, eval_batches, fit_length
from peftlab.data.labels import class_names, read_labels
from peftlab.data.packing import pack
from peftlab.data.rows import Rows
from peftlab.data.sources import load_rows
from peftlab.data.split import split_rows

__all__ = [
    "BatchPlan",
    "Rows",
    "class_names",
    "eval_batches",
    "fit_length",
    "load_rows",
    "pack",
    "read_labels",
    "split_rows",
]

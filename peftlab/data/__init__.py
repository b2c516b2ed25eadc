"""Data: loads rows from the sources that a recipe names, reads labels, splits, tokenizes and batches."""

from peftlab.data.annotated import Annotated, Annotations
from peftlab.data.augment import Augmentation, Change
from peftlab.data.batching import BatchPlan, block_bounds, eval_batches, fit_lengths
from peftlab.data.boxes import Objects, read_objects
from peftlab.data.findings import Finding, check_ids, find, require
from peftlab.data.images import Image, read_images, size_text
from peftlab.data.labels import class_names, label_text, nearest_label, read_labels
from peftlab.data.ledger import Ledger
from peftlab.data.mask_ledger import MaskLedger
from peftlab.data.masks import Mask, PixelClasses, find_pixel_classes, read_masks
from peftlab.data.numbers import read_numbers, read_scores
from peftlab.data.packing import pack, packing_figures
from peftlab.data.question_ledger import QuestionLedger
from peftlab.data.questions import Question, Questions
from peftlab.data.rows import Rows
from peftlab.data.sources import load_rows, split_per_class
from peftlab.data.split import balanced_rows, rows_per_class, split_groups, split_rows
from peftlab.data.tokens import Tokens, answered, pieces, tokenize

__all__ = [
    "Augmentation",
    "Annotated",
    "Annotations",
    "BatchPlan",
    "Change",
    "Finding",
    "Image",
    "Ledger",
    "Mask",
    "MaskLedger",
    "Question",
    "QuestionLedger",
    "Questions",
    "Objects",
    "PixelClasses",
    "Rows",
    "Tokens",
    "answered",
    "balanced_rows",
    "block_bounds",
    "check_ids",
    "class_names",
    "eval_batches",
    "find",
    "find_pixel_classes",
    "fit_lengths",
    "label_text",
    "load_rows",
    "nearest_label",
    "pack",
    "packing_figures",
    "pieces",
    "read_images",
    "read_labels",
    "read_masks",
    "read_numbers",
    "read_scores",
    "read_objects",
    "require",
    "rows_per_class",
    "size_text",
    "split_groups",
    "split_per_class",
    "split_rows",
    "tokenize",
]

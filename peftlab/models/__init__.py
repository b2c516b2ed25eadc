"""Backbones: finding, loading, quantizing."""

from peftlab.models.bnb import import_bitsandbytes
from peftlab.models.images import ImageReader, load_image_reader
from peftlab.models.load import (
    Pretrained,
    find_pretrained,
    label_names,
    load_model,
    load_skeleton,
    load_tokenizer,
    model_max_length,
    num_parameters,
    quiet,
    resolve_dtype,
    resolve_precision,
    tokenizer_fingerprint,
)
from peftlab.models.save import save_plain
from peftlab.models.sentences import SentenceFiles, SentenceWriter, sentence_files

__all__ = [
    "ImageReader",
    "Pretrained",
    "SentenceFiles",
    "SentenceWriter",
    "find_pretrained",
    "import_bitsandbytes",
    "label_names",
    "load_image_reader",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "model_max_length",
    "num_parameters",
    "quiet",
    "resolve_dtype",
    "resolve_precision",
    "save_plain",
    "sentence_files",
    "tokenizer_fingerprint",
]

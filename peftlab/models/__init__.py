"""Finds, loads and quantizes backbones."""

from peftlab.models.bnb import import_bitsandbytes
from peftlab.models.config import check_stored, label_names, load_skeleton, stored_as
from peftlab.models.dtypes import resolve_dtype, resolve_precision
from peftlab.models.image_reader import ImageReader, load_image_reader
from peftlab.models.load import base_model, load_model, new_weights, num_parameters
from peftlab.models.load_errors import quiet
from peftlab.models.pretrained import Pretrained, find_pretrained
from peftlab.models.save import save_plain
from peftlab.models.sentences import SentenceFiles, SentenceWriter, sentence_files
from peftlab.models.tokenizer import load_tokenizer, model_max_length, tokenizer_fingerprint

__all__ = [
    "ImageReader",
    "Pretrained",
    "SentenceFiles",
    "SentenceWriter",
    "base_model",
    "find_pretrained",
    "import_bitsandbytes",
    "check_stored",
    "label_names",
    "load_image_reader",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "model_max_length",
    "new_weights",
    "num_parameters",
    "quiet",
    "resolve_dtype",
    "resolve_precision",
    "save_plain",
    "sentence_files",
    "stored_as",
    "tokenizer_fingerprint",
]

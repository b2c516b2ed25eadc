"""Finds, loads and quantizes backbones."""

from peftlab.models.bnb import import_bitsandbytes, misreads_nf4
from peftlab.models.config import (
    check_stored,
    decoder_start,
    end_ids,
    has_class,
    is_causal,
    label_names,
    linear_widths,
    load_config,
    load_skeleton,
    reads_later_tokens,
    starts_with_last,
    stored_as,
    token_types,
)
from peftlab.models.dtypes import resolve_dtype, resolve_precision
from peftlab.models.image_reader import ImageReader, load_image_reader, reads_grids, runs_on_zeros
from peftlab.models.load import base_model, load_model, new_weights, num_parameters
from peftlab.models.load_errors import quiet
from peftlab.models.new_tokens import add_tokens, start_rows, token_rows
from peftlab.models.padding import padding_of, reconcile, reconciled_ids, vocabulary_rows
from peftlab.models.pretrained import Pretrained, find_pretrained, stacked_on
from peftlab.models.save import save_plain
from peftlab.models.sentences import SentenceFiles, SentenceWriter, sentence_files
from peftlab.models.tokenizer import (
    UNLIMITED,
    length_limit,
    load_tokenizer,
    model_max_length,
    target_limit,
    tokenizer_fingerprint,
)

__all__ = [
    "UNLIMITED",
    "ImageReader",
    "Pretrained",
    "SentenceFiles",
    "SentenceWriter",
    "add_tokens",
    "base_model",
    "check_stored",
    "decoder_start",
    "end_ids",
    "find_pretrained",
    "import_bitsandbytes",
    "label_names",
    "length_limit",
    "linear_widths",
    "load_config",
    "load_image_reader",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "misreads_nf4",
    "model_max_length",
    "new_weights",
    "num_parameters",
    "padding_of",
    "quiet",
    "has_class",
    "is_causal",
    "reads_grids",
    "reads_later_tokens",
    "reconcile",
    "reconciled_ids",
    "resolve_dtype",
    "resolve_precision",
    "save_plain",
    "sentence_files",
    "stacked_on",
    "start_rows",
    "starts_with_last",
    "stored_as",
    "token_rows",
    "target_limit",
    "token_types",
    "tokenizer_fingerprint",
    "runs_on_zeros",
    "vocabulary_rows",
]

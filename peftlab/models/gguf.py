"""GGUF files, converted once to a safetensors folder in the cache."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peftlab.errors import ArtifactError, RecipeError, ResourceError
from peftlab.paths import cache_root

# Part of the folder name: increased when the conversion changes, so that old folders are not reused.
_CONVERSION = 1


def converted_folder(gguf: Path, fingerprint: str) -> Path:
    """The safetensors folder (float32 weights, config, tokenizer, chat template) of a GGUF file, converted if missing.

    The quantized blocks are dequantized exactly. The folder is published by one rename, so a killed conversion leaves no
    partial model.

    Raises: ArtifactError if the file is damaged, RecipeError for an architecture that transformers cannot read.
    """
    folder = cache_root() / "gguf" / f"{gguf.stem}-{fingerprint[:16]}-v{_CONVERSION}"
    if (folder / "config.json").is_file():
        return folder
    with gguf.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ArtifactError(f"{gguf} does not start with the GGUF magic bytes; download it again", key="model.name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        _convert(gguf, partial)
        try:
            os.replace(partial, folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster; its folder is equal
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its tqdm bar cannot be switched off
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
            loaded: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    except OSError as error:
        if error.errno is not None:
            raise ResourceError(f"cannot read {gguf} or write to {folder.parent}: {error}", key="model.name") from error
        raise ArtifactError(f"{gguf} cannot be read as a model: {error}", key="model.name") from error
    except NotImplementedError as error:
        raise RecipeError(f"{gguf}: {error}", key="model.name") from error
    except Exception as error:  # the reader indexes into the file, so a damaged one raises almost anything
        raise ArtifactError(
            f"{gguf} is damaged or not supported: {type(error).__name__}: {error}", key="model.name"
        ) from error
    # save_pretrained refuses a model with the GGUF quantization config, although its weights are dequantized now.
    config = loaded.config
    del config.quantization_config
    loaded.hf_quantizer = None
    loaded.is_quantized = False
    config.name_or_path = ""
    loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

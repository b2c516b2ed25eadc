"""Process-wide setup: library settings, the device, and errors of recipe and disk."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from peftlab.errors import PeftlabError, RecipeError, ResourceError
from peftlab.models import import_bitsandbytes
from peftlab.ops import use_plans
from peftlab.paths import kernel_plans_file
from peftlab.recipe import LoadedRecipe


@contextlib.contextmanager
def located(loaded: LoadedRecipe | None) -> Iterator[None]:
    """Adds the recipe's file and line to errors about a recipe key, and reports a full disk clearly."""
    try:
        yield
    except PeftlabError as error:
        if loaded is None:
            raise
        raise loaded.locate(error) from error.__cause__
    except MemoryError as error:
        raise ResourceError("out of memory; use a smaller model, model.quantize=nf4, or smaller batches") from error
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise RecipeError(f"cannot write here: {error}; choose another run.dir", key="run.dir") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(f"the disk is full: {error}; free disk space or choose another run.dir") from error
    except Exception as error:
        # safetensors wraps a failed write in its own exception, with the system's text.
        if "No space left on device" not in str(error):
            raise
        raise ResourceError(f"the disk is full: {error}; free disk space or choose another run.dir") from error


def prepare_libraries(*, measured_plans: bool = True) -> None:
    """Configures the libraries before they start: a quiet tokenizer, deterministic cuBLAS, a guarded bitsandbytes, and
    the kernel plans measured on this machine.

    Raises: ArtifactError if the file of measured plans is damaged.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with contextlib.suppress(ImportError):  # only a quantized model needs it, and reports its absence
        import_bitsandbytes()
    if measured_plans:
        use_plans(_plans_here())


def _plans_here() -> Path | None:
    with contextlib.suppress(RuntimeError):  # no home folder, no cache
        file = kernel_plans_file()
        return file if os.path.exists(file) else None
    return None


def pick_device(name: str) -> str:
    """Returns ``cpu`` or ``cuda``. Raises: RecipeError if cuda is requested but missing."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("cuda was requested, but torch finds no CUDA device; see `peftlab doctor`", key="run.device")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"

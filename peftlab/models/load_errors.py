"""Silences the libraries while they load a model, and translates their errors."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from peftlab.errors import ArtifactError, PeftlabError, RecipeError, ResourceError

if TYPE_CHECKING:
    from peftlab.models.pretrained import Pretrained

_NO_SUCH_HEAD = re.compile(
    r"Unrecognized configuration class <class '.*\.(\w+)Config'> for this kind of AutoModel: (\w+)"
)
# transformers passes the model_args of a config of timm on beside its own.
_TWICE = re.compile(r"timm_model\w*\(\) got multiple values for keyword argument ('\w+')")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides the libraries' progress bars and load reports; errors still raise."""
    from transformers.utils import logging as hf_logging

    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def load_errors(pretrained: Pretrained, what: str) -> Iterator[None]:
    """Turns the libraries' errors while they load ``what`` of a model into errors that say what to do."""
    import torch
    from safetensors import SafetensorError

    name = pretrained.source.name
    try:
        yield
    except PeftlabError:
        raise
    except SafetensorError as error:
        raise ArtifactError(
            f"the weights of {name!r} are damaged: {error}; copy them again", key="model.name"
        ) from error
    except torch.cuda.OutOfMemoryError as error:
        raise ResourceError(
            f"{name!r} does not fit into the GPU's memory; try model.quantize=nf4 or a smaller model", key="model.name"
        ) from error
    except MemoryError as error:
        raise ResourceError(f"{name!r} does not fit into memory", key="model.name") from error
    except RuntimeError as error:
        if "size" not in str(error) and "shape" not in str(error):
            raise
        raise ArtifactError(
            f"the weights of {name!r} do not fit its config.json: {str(error).strip().splitlines()[-1].strip()}",
            key="model.name",
        ) from error
    except TypeError as error:
        if (twice := _TWICE.search(str(error))) is None:
            raise
        raise RecipeError(
            f"transformers cannot open {name!r}: model_args in its config.json repeats {twice[1]}; remove it there",
            key="model.name",
        ) from error
    except (OSError, ValueError, ImportError) as error:
        if "trust_remote_code" in str(error) and not pretrained.trust_remote_code:
            raise RecipeError(
                f"{name!r} needs Python code that ships with it; read that code, then set model.trust_remote_code=true",
                key="model.name",
            ) from error
        if "safetensors" in str(error):
            raise ArtifactError(
                f"{name!r} has no safetensors weights; pickled weights can run code when loaded and are refused",
                key="model.name",
            ) from error
        if isinstance(error, ImportError) and "timm" in str(error):
            raise RecipeError(
                f"{name!r} is a model of timm, which is not installed: pip install timm torchvision", key="model.name"
            ) from error
        first = str(error).strip().splitlines()[0]
        if (found := _NO_SUCH_HEAD.search(first)) is not None:
            raise RecipeError(
                f"transformers has no {found[2]} for {found[1]} models, so {name!r} cannot do this task; use a model of another "
                "family, or another task",
                key="model.name",
            ) from error
        raise RecipeError(f"the {what} of {name!r} cannot be loaded: {first}", key="model.name") from error

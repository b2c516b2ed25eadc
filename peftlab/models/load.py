"""Backbones: resolved, loaded on the right device, frozen, optionally quantized by bitsandbytes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peftlab.errors import ArtifactError, PeftlabError, RecipeError, ResourceError
from peftlab.models.gguf import converted_folder
from peftlab.models.presets import build_preset, config_folder, preset_tokenizer
from peftlab.models.source import ModelSource, resolve_model
from peftlab.models.tiny import tiny_config, tiny_tokenizer

# The output layers stay in full precision: they are few parameters and the loss is most sensitive to them.
_NOT_QUANTIZED = ["lm_head", "embed_out", "classifier", "score", "pooler.dense"]


@dataclass(frozen=True)
class Pretrained:
    """A model on disk or on the hub, ready to be loaded: ``location`` is what ``from_pretrained`` takes, ``commit`` the hub's."""

    source: ModelSource
    location: str
    revision: str | None
    trust_remote_code: bool
    commit: str | None = None
    local_files_only: bool = True

    @property
    def fingerprint(self) -> str:
        """Of a hub model its commit, else sha256 of its weights and config, which are read then and not before."""
        return f"{self.source.path}@{self.commit}" if self.source.kind == "hub" else self.source.weights_fingerprint()

    @property
    def hub_kwargs(self) -> dict[str, Any]:
        return {
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
            "local_files_only": self.local_files_only,
        }


def find_pretrained(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Pretrained:
    """Resolves ``name``, converting a GGUF file on first use (cached).

    Raises: RecipeError (unknown), ArtifactError (pickled, damaged).
    """
    source = resolve_model(name, revision)
    if source.kind == "hub":
        return _find_on_hub(source, trust_remote_code)
    location = source.path
    if source.kind == "gguf":
        with quiet():
            location = str(converted_folder(Path(source.path), source.weights_fingerprint()))
    elif source.kind == "shape":
        location = str(config_folder(source.path, source.weights_fingerprint()))
    return Pretrained(source, location, None, trust_remote_code)


def _find_on_hub(source: ModelSource, trust_remote_code: bool) -> Pretrained:
    """Asks the hub once, with a bounded wait: ``from_pretrained`` alone would retry an absent network for a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        commit = HfApi().model_info(source.path, revision=source.revision, timeout=10).sha
    except Exception as error:  # httpx, offline mode and the hub's own errors share no base class
        cached = try_to_load_from_cache(source.path, "config.json", revision=source.revision)
        if not isinstance(cached, str):
            raise RecipeError(
                f"model {source.name!r} is neither a local folder or file, nor in the hub's cache on this machine, "
                f"and the hub did not give it: {str(error).strip().splitlines()[0]}",
                key="model.name",
            ) from error
        return Pretrained(source, source.path, source.revision, trust_remote_code, commit=Path(cached).parent.name)
    return Pretrained(source, source.path, commit, trust_remote_code, commit=commit, local_files_only=False)


def load_tokenizer(pretrained: Pretrained, *, chat_template: str | None = None) -> Any:
    """The tokenizer, with a padding token (never a new vocabulary entry) and the template file if one is given.

    Raises: RecipeError.
    """
    from transformers import AutoTokenizer

    if pretrained.source.kind == "tiny":
        tokenizer = tiny_tokenizer()
    elif pretrained.source.kind == "shape":
        tokenizer = preset_tokenizer(pretrained.source.path)
    else:
        with quiet(), load_errors(pretrained, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(pretrained.location, **pretrained.hub_kwargs)
    if not tokenizer.is_fast:
        raise RecipeError(
            f"the tokenizer of {pretrained.source.name!r} has no fast (Rust) version, which the loss mask needs",
            key="model.name",
        )
    if tokenizer.pad_token_id is None:
        # Padding is always masked out by position, so any existing token serves and the vocabulary stays as it is.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if chat_template is not None:
        path = Path(chat_template)
        if not path.is_file():
            raise RecipeError(f"no such file: {chat_template!r}", key="model.chat_template")
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} cannot be read as utf-8 text: {error}", key="model.chat_template") from None
        if not tokenizer.chat_template.strip():
            raise RecipeError(f"{path} is empty; expected a Jinja chat template", key="model.chat_template")
    return tokenizer


def model_max_length(pretrained: Pretrained, tokenizer: Any) -> int:
    """The longest input in tokens, by the model's position embeddings and its tokenizer."""
    positions = getattr(load_config(pretrained).get_text_config(), "max_position_embeddings", None)
    return min(int(positions or 2**31), int(min(tokenizer.model_max_length, 2**31)))


def label_names(pretrained: Pretrained) -> list[str]:
    """Class names of a classifier's config, by index; transformers' own LABEL_0, LABEL_1 where nobody named them."""
    named = load_config(pretrained).id2label
    return [str(named[i]) for i in sorted(named)]


def load_config(pretrained: Pretrained, **kwargs: Any) -> Any:
    """The model's config, with ``kwargs`` set in it. Raises: RecipeError."""
    from transformers import AutoConfig

    if pretrained.source.kind == "tiny":
        return tiny_config(pretrained.source.path, **kwargs)
    with quiet(), load_errors(pretrained, "config"):
        return AutoConfig.from_pretrained(pretrained.location, **pretrained.hub_kwargs, **kwargs)


def load_skeleton(pretrained: Pretrained, *, auto_class: str, **model_kwargs: Any) -> Any:
    """The model without weights, on the meta device: its modules and shapes. Arguments and errors as ``load_model``."""
    import torch
    import transformers

    with quiet(), load_errors(pretrained, "model"), torch.device("meta"):
        options = {"trust_remote_code": True} if pretrained.trust_remote_code else {}
        return getattr(transformers, auto_class).from_config(load_config(pretrained, **model_kwargs), **options)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over the tokenizer's own serialisation and its chat template; of an ``ImageReader`` its fingerprint."""
    if hasattr(tokenizer, "fingerprint"):
        return str(tokenizer.fingerprint)
    text = tokenizer.backend_tokenizer.to_str() + "\0" + str(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()


def resolve_dtype(name: str, device: str) -> Any:
    """torch dtype for a recipe's dtype name; ``auto`` is bfloat16 (else float16) on CUDA and float32 on the CPU."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def resolve_precision(name: str, device: str) -> Any:
    """torch dtype of the matmuls: ``auto`` is bfloat16 on a GPU that has it, else float32.

    Also on CPUs with AMX: oneDNN compiles its bfloat16 kernels per shape, and in batches of ever new lengths that costs
    more than the tiles save (measured: a tiny model 30 x slower over its first 60 steps, SmolLM2-135M no faster).
    """
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.float32


def load_model(
    pretrained: Pretrained,
    *,
    auto_class: str,
    device: str,
    quantize: str = "none",
    double_quant: bool = True,
    compute_dtype: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    whole: bool = False,
    brought: Collection[str] = (),
    **model_kwargs: Any,
) -> Any:
    """The frozen backbone on ``device``, in eval mode, no parameter requiring a gradient.

    Args:
        auto_class: name of a transformers auto class, such as ``AutoModelForCausalLM``.
        quantize: ``none``, ``nf4`` or ``int8``: storage of the linear weights except output layers.
        whole: refuse a model whose task head is not in its files, instead of giving it a new one. brought: names of parameters
            that an adapter will bring, which need not be there.
        model_kwargs: passed to the config (``num_labels``, ``id2label``, ...).
    Raises: RecipeError, ArtifactError, ResourceError.
    """
    import transformers

    torch_dtype = resolve_dtype(dtype, device)
    kwargs: dict[str, Any] = {"dtype": torch_dtype, **model_kwargs}
    if attention != "auto":
        kwargs["attn_implementation"] = attention
    if quantize != "none":
        kwargs["quantization_config"] = _quantization(quantize, double_quant, resolve_precision(compute_dtype, device))
        kwargs["device_map"] = {"": device}
    auto = getattr(transformers, auto_class)
    with quiet(), load_errors(pretrained, "model"):
        if pretrained.source.kind == "tiny":
            model = _tiny_model(pretrained, auto, kwargs)
        elif pretrained.source.kind == "shape":
            model = build_preset(pretrained.source.path, auto, device=device, **kwargs)
        else:
            model, loading = auto.from_pretrained(
                pretrained.location, use_safetensors=True, output_loading_info=True, **pretrained.hub_kwargs, **kwargs
            )
            missing = set(loading["missing_keys"])
            _check_nothing_made_up(pretrained, model, missing, absent_head=missing - set(brought) if whole else set())
    if quantize == "none":
        model.to(device)
    elif quantize == "nf4":
        _keep_storage_layout(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def num_parameters(model: Any) -> int:
    """Weights of a model as they count when nothing is quantized: bitsandbytes packs two of NF4 into one byte."""
    count = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count += parameter.numel() if state is None else int(np.prod(state.shape))
    return count


def _check_nothing_made_up(pretrained: Pretrained, model: Any, missing: set[str], *, absent_head: set[str]) -> None:
    """transformers fills tensors that the files lack with random values; only a new task head may be new."""
    is_base = model.base_model is model
    if absent_head and not is_base:
        raise RecipeError(
            f"{pretrained.source.name!r} has no head for this task ({', '.join(sorted(absent_head)[:3])} would be random numbers): "
            "train it for the task first, and give the run folder or the merged model",
            key="model.name",
        )
    inner = "" if is_base else f"{model.base_model_prefix}."
    lost = sorted(name for name in missing if name.startswith(inner) and "pooler" not in name)
    if "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__:
        lost = sorted(missing)
    if lost:
        raise ArtifactError(
            f"the weights of {pretrained.source.name!r} are incomplete: {len(lost)} tensors are missing, such as {lost[0]}; "
            "copy them again",
            key="model.name",
        )


def _keep_storage_layout(model: Any) -> None:
    """Stops bitsandbytes (0.50) from repacking NF4 weights in place at the first forward in eval mode on a CPU.

    The packed layout has no backward and dequantizes to garbage, so a model that is evaluated first could then
    neither be trained nor merged.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _tiny_model(pretrained: Pretrained, auto: Any, kwargs: dict[str, Any]) -> Any:
    """A tiny model with fixed random weights; quantizing needs a checkpoint to load, so it goes through one."""
    import tempfile

    import torch
    from safetensors.torch import save_file

    load = {
        k: kwargs.pop(k) for k in ("dtype", "quantization_config", "device_map", "attn_implementation") if k in kwargs
    }
    config = tiny_config(pretrained.source.path, **kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config)
    with tempfile.TemporaryDirectory() as folder:
        # save_pretrained writes on the first rank only; each rank has a folder of its own.
        config.save_pretrained(folder)
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}  # a tied one under both names
        save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
        model = auto.from_pretrained(folder, **load)
    model.config.name_or_path = model.name_or_path = pretrained.source.path
    return model


def _quantization(quantize: str, double_quant: bool, compute_dtype: Any) -> Any:
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_NOT_QUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=_NOT_QUANTIZED,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' progress bars and load reports off the terminal; errors still raise."""
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
    """What the libraries raise while they load ``what`` of a model, as errors that say what to do."""
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
        first = str(error).strip().splitlines()[0]
        raise RecipeError(f"the {what} of {name!r} cannot be loaded: {first}", key="model.name") from error

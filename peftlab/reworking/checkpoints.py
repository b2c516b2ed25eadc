"""Reads the weights of a model file by file, one tensor at a time, under the names that its modules have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peftlab.errors import ArtifactError, RecipeError
from peftlab.models import Pretrained, find_pretrained, load_config, load_model, stored_as

# End of an architecture's name -> the auto class that builds it.
_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}


def find_checkpoint(name: str) -> Pretrained:
    """A model by name; of a run that trained all weights, its model. Raises: RecipeError, ArtifactError; for quantized files."""
    path = Path(name)
    for inner in ("model", "student"):
        if not (path / "config.json").is_file() and (path / inner / "config.json").is_file():
            name = str(path / inner)
    if (path / "adapter").is_dir() and not (path / "config.json").is_file():
        raise RecipeError(
            f"{path} is a run with an adapter already: {path / 'adapter'}; peftlab adapters show looks at it"
        )
    pretrained = find_pretrained(name)
    if (stored := stored_as(pretrained)) != "none":
        raise RecipeError(
            f"{name} is stored in {stored}; expected weights in 16 or 32 bits, whose difference is the update"
        )
    return pretrained


def auto_class_of(pretrained: Pretrained) -> str:
    """The auto class for the architecture that a model's config names."""
    names = getattr(load_config(pretrained), "architectures", None) or [""]
    return next((auto for ending, auto in _AUTO.items() if names[0].endswith(ending)), "AutoModel")


class Weights(Mapping[str, Tensor]):
    """The tensors of a model by the names of the parameters of ``skeleton``; each is read when it is asked for.

    ``unknown`` names the tensors of the files that no parameter of the skeleton has, by their own names.
    """

    def __init__(self, pretrained: Pretrained, skeleton: Any, auto_class: str) -> None:
        self._files: dict[str, tuple[Path, str]] = {}
        self._loaded: dict[str, Tensor] = {}
        self.unknown: dict[str, tuple[Path, str]] = {}
        if pretrained.source.kind in ("tiny", "shape"):  # no files: made from a seed
            model = load_model(pretrained, auto_class=auto_class, device="cpu")
            self._loaded = {name: p.detach() for name, p in model.named_parameters()}
            return
        prefix, known = f"{skeleton.base_model_prefix}.", {name for name, _ in skeleton.named_parameters()}
        for path in _files_of(pretrained):
            for key in _keys(path):
                candidates = (key, prefix + key, key.removeprefix(prefix))
                name = next((c for c in candidates if c in known), None)
                if name is None:
                    self.unknown[key] = (path, key)
                else:
                    self._files[name] = (path, key)

    def __getitem__(self, name: str) -> Tensor:
        return self._loaded[name] if name in self._loaded else _read(*self._files[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded or self._files)

    def __len__(self) -> int:
        return len(self._loaded or self._files)


def _files_of(pretrained: Pretrained) -> list[Path]:
    folder = Path(pretrained.location)
    if pretrained.source.kind == "hub":
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(
                pretrained.source.path,
                revision=pretrained.commit,
                local_files_only=pretrained.local_files_only,
                allow_patterns=["*.safetensors", "*.json"],
            )
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ArtifactError(f"expected *.safetensors in {folder}, found none; convert the weights to safetensors")
    return files


def _keys(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ArtifactError(f"{path} is damaged: {error}; copy it again") from error


def _read(path: Path, key: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
        return tensor

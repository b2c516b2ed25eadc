"""Resolves a model name: hub id, local folder, GGUF file, file inside a package, or a built-in model (tiny, shape)."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peftlab.errors import ArtifactError, RecipeError
from peftlab.models.fingerprints import weights_fingerprint
from peftlab.models.presets import PREFIX as SHAPE_PREFIX
from peftlab.models.presets import check_preset, preset_fingerprint
from peftlab.paths import PACKAGE_PREFIX, package_path

TINY = ("tiny:llama", "tiny:bert", "tiny:t5", "tiny:vit", "tiny:yolos", "tiny:detr", "tiny:segformer", "tiny:upernet")
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class ModelSource:
    """A resolved model name. ``path`` is a folder, a .gguf file, a hub id or a ``tiny:`` or ``shape:`` name."""

    kind: Literal["hub", "folder", "gguf", "tiny", "shape"]
    name: str
    path: str
    revision: str | None = None

    def weights_fingerprint(self) -> str:
        """sha256 of the weight files and config of a local model, of a tiny model's name, or of a shape's name and config."""
        if self.kind == "gguf":
            return weights_fingerprint([Path(self.path)])
        if self.kind == "folder":
            folder = Path(self.path)
            return weights_fingerprint([folder / "config.json", *sorted(folder.glob("*.safetensors"))])
        if self.kind == "shape":
            return preset_fingerprint(self.path)
        return self.path


def resolve_model(name: str, revision: str | None = None) -> ModelSource:
    """Resolves ``name`` and checks what can be checked without loading it.

    Raises: RecipeError (unknown model), ArtifactError (pickled or incomplete weights).
    """
    if name.startswith("tiny:"):
        if name not in TINY:
            raise RecipeError(f"unknown built-in model {name!r}; there are {', '.join(TINY)}", key="model.name")
        source = ModelSource("tiny", name, name)
    elif name.startswith(SHAPE_PREFIX):
        check_preset(name)
        source = ModelSource("shape", name, name)
    elif name.startswith(PACKAGE_PREFIX):
        source = _local(name, package_path(name, key="model.name", error=RecipeError))
    elif (path := Path(name).expanduser()).exists():
        source = _local(name, path)
    elif name.endswith(".gguf") or name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise RecipeError(f"no such model file or folder: {name!r}{_nearest(path)}", key="model.name")
    else:
        return ModelSource("hub", name, name, revision)
    if revision is not None:
        raise RecipeError(f"a revision needs a hub model; {name!r} is a local one", key="model.revision")
    return source


def _local(name: str, path: Path) -> ModelSource:
    if path.is_file():
        if path.suffix == ".gguf":
            return ModelSource("gguf", name, str(path.resolve()))
        if path.suffix in _PICKLED:
            raise ArtifactError(
                f"{path} is a pickled weight file, which can run code when it is loaded; convert it to safetensors",
                key="model.name",
            )
        raise RecipeError(f"expected a model folder or a .gguf file, found the file {path}", key="model.name")
    if not (path / "config.json").is_file():
        hint = "; this is a run folder: its merged model is in merged/" if (path / "recipe.lock.yaml").exists() else ""
        raise RecipeError(f"{path} is not a model folder: it has no config.json{hint}", key="model.name")
    if not list(path.glob("*.safetensors")):
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLED)
        contents = (
            f"only pickled weights ({', '.join(pickled)}), which can run code when loaded" if pickled else "no weights"
        )
        raise ArtifactError(
            f"expected *.safetensors in {path}, found {contents}; convert to safetensors", key="model.name"
        )
    return ModelSource("folder", name, str(path.resolve()))


def _nearest(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" (the folder {parent} does not exist either)"
    near = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=1, cutoff=0.5)
    return f"; did you mean {str(parent / near[0])!r}?" if near else ""

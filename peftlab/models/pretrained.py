"""A model by name, found on disk or on the hub; nothing is loaded."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.errors import RecipeError
from peftlab.models.gguf import converted_folder
from peftlab.models.load_errors import quiet
from peftlab.models.presets import config_folder
from peftlab.models.source import ModelSource, resolve_model


@dataclass(frozen=True)
class Pretrained:
    """A model on disk or on the hub, ready to be loaded.

    Attributes: location: what ``from_pretrained`` takes. commit: the hub's. made_from: of a folder in the cache, the fingerprint of
        what it was made from.
    """

    source: ModelSource
    location: str
    revision: str | None
    trust_remote_code: bool
    commit: str | None = None
    local_files_only: bool = True
    made_from: str | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """The commit of a hub model, else sha256 of weights and config, read at the first use."""
        if self.made_from is not None:
            return self.made_from
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


def stacked_on(base: Pretrained, folder: Path, *, name: str, made_from: str) -> Pretrained:
    """The model ``base`` with the adapter ``name`` in its weights, as it was written to ``folder``."""
    source = ModelSource("folder", f"{base.source.name} with {name}", str(folder))
    return Pretrained(source, str(folder), None, base.trust_remote_code, made_from=made_from)


def _find_on_hub(source: ModelSource, trust_remote_code: bool) -> Pretrained:
    """Queries the hub once, with a timeout: ``from_pretrained`` alone would retry for a minute without network."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        commit = HfApi().model_info(source.path, revision=source.revision, timeout=10).sha
    except Exception as error:  # httpx, offline mode and the hub's own errors share no base class
        cached = try_to_load_from_cache(source.path, "config.json", revision=source.revision)
        if not isinstance(cached, str):
            raise RecipeError(
                f"model {source.name!r} is neither a local folder or file, nor in the hub's cache on this machine, "
                f"and the hub did not provide it: {str(error).strip().splitlines()[0]}",
                key="model.name",
            ) from error
        return Pretrained(source, source.path, source.revision, trust_remote_code, commit=Path(cached).parent.name)
    return Pretrained(source, source.path, commit, trust_remote_code, commit=commit, local_files_only=False)

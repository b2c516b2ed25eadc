"""``adapter.start``: the saved adapter that a run continues."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftlab.adapters import (
    ADAPTER_FILES,
    WEIGHTS_FILE,
    changes_weights,
    check_adapter_files,
    check_same_adapter,
    continue_from,
    refuse_beside,
)
from peftlab.errors import ArtifactError, RecipeError
from peftlab.paths import sha256_of_files
from peftlab.recipe import adapter_folder, lock_of

if TYPE_CHECKING:
    from peftlab.assembly.assembly import Assembly

_KEY = "adapter.start"


@dataclass(frozen=True)
class Start:
    """The adapter to begin with. folder: its files, or a checkpoint's. lock: the recipe of the run that wrote it, or empty."""

    folder: Path
    lock: dict[str, Any]

    @classmethod
    def find(cls, name: str) -> Start:
        """Of ``adapter.start``. Raises: RecipeError if there is no adapter, ArtifactError if it is damaged."""
        try:
            folder = adapter_folder(name)
        except FileNotFoundError as error:
            raise RecipeError(str(error), key=_KEY) from None
        check_adapter_files(folder)
        refuse_beside(folder, "adapter.start continues an adapter of one method")
        return cls(folder, lock_of(folder))

    @property
    def fingerprint(self) -> str:
        """sha256 of the files."""
        names = [name for name in (*ADAPTER_FILES, WEIGHTS_FILE) if (self.folder / name).is_file()]
        return sha256_of_files([self.folder / name for name in names])

    def check_model(self, assembly: Assembly) -> None:
        """Raises ArtifactError if the adapter was trained on another model."""
        known = self.lock.get("lock") or {}
        expected = (known.get("fingerprints") or {}).get("model")
        if expected is not None and expected != assembly.model_fingerprint:
            under = (self.lock.get("model") or {}).get("adapter")
            hint = f"; its run has model.adapter: {under}" if under and assembly.recipe.model.adapter is None else ""
            raise ArtifactError(
                f"the adapter in {self.folder} was made for another model: it was trained on weights {expected[:12]}, and "
                f"{assembly.pretrained.source.name!r} has {assembly.model_fingerprint[:12]}{hint}",
                key=_KEY,
            )

    def check(self, config: Any, assembly: Assembly) -> None:
        """Raises RecipeError if the new adapter, of this ``config``, is another one."""
        names = ((self.lock.get("lock") or {}).get("environment") or {}).get("class_names")
        if names and assembly.spec.names_classes and assembly.classes != names:
            raise RecipeError(
                f"the adapter in {self.folder} tells apart {', '.join(names)}; found {', '.join(assembly.classes or [])}",
                key=_KEY,
            )
        try:
            check_same_adapter(config, self.folder)
        except RecipeError as error:
            raise (type(error)(f"{error}. {self.as_plain}", key=error.key) if self.as_plain else error) from None

    @property
    def as_plain(self) -> str:
        """A sentence if the run trained factors that are saved as a plain LoRA; else empty."""
        section = self.lock.get("adapter") or {}
        if not changes_weights(kind := section.get("init_lora_weights")):
            return ""
        return f"What {kind} trained is saved as a plain LoRA of twice the rank, which is what goes on"

    def load(self, model: Any) -> None:
        """Gives a freshly injected adapter these weights. Raises: ArtifactError."""
        continue_from(model, self.folder)

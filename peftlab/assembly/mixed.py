"""The adapters that X-LoRA mixes: where they are, and whether they are of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from peftlab.adapters import check_adapter_files, refuse_beside
from peftlab.assembly.stack import adapter_fingerprint
from peftlab.errors import ArtifactError, PeftlabError, RecipeError
from peftlab.recipe import adapter_folder, lock_of

if TYPE_CHECKING:
    from peftlab.assembly.assembly import Assembly

_KEY = "adapter.adapters"


def mixed_adapters(named: Mapping[str, str]) -> dict[str, Path]:
    """The folders of ``adapter.adapters``. Raises: RecipeError that lists those without an adapter, or with a damaged one."""
    folders, problems = {}, []
    for name, place in named.items():
        try:
            folders[name] = adapter_folder(place)
            check_adapter_files(folders[name])
            refuse_beside(folders[name], "X-LoRA mixes adapters of one method")
        except (FileNotFoundError, PeftlabError) as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise RecipeError("; ".join(problems), key=_KEY)
    return folders


def check_mixed(folders: Mapping[str, Path], assembly: Assembly) -> None:
    """Raises ArtifactError that lists the adapters which were trained on other weights."""
    prints = {n: ((lock_of(f).get("lock") or {}).get("fingerprints") or {}).get("model") for n, f in folders.items()}
    if not any(prints.values()):
        return  # no weights are read for nothing
    own = assembly.model_fingerprint
    if wrong := [f"{n} on weights {p[:12]}" for n, p in prints.items() if p is not None and p != own]:
        raise ArtifactError(
            f"expected adapters of {assembly.recipe.model.name!r} ({own[:12]}); found {', '.join(wrong)}", key=_KEY
        )


def mixed_fingerprint(folders: Mapping[str, Path]) -> str:
    """sha256 of the files of all adapters, in their order."""
    return hashlib.sha256("".join(adapter_fingerprint(folder) for folder in folders.values()).encode()).hexdigest()

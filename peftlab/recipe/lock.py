"""The lock file of a run: the resolved recipe with the versions and fingerprints that the run used."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from peftlab.errors import ArtifactError, PeftlabError, RecipeError, ResourceError
from peftlab.recipe.load import LoadedRecipe
from peftlab.recipe.yaml_lines import dump_yaml

_PACKAGES = (
    "peftlab",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "tokenizers",
    "datasets",
    "evaluate",
    "numpy",
    "scikit-learn",
    "triton",
)
_HEADER = """\
# Written by peftlab. `peftlab train` with this file repeats the run; every setting is explicit.
# The section `lock` holds the versions and fingerprints the run was made with, which are checked then.
"""
_LOCAL_PATHS = (
    ("model", "name"),
    ("model", "adapter"),
    ("model", "chat_template"),
    ("adapter", "start"),
    ("data", "train"),
    ("data", "eval"),
)
# Settings that do not change what a run computes; of adapters only the place may change, because their fingerprints are compared.
_FREE_ON_RESUME = {
    *("run.log", "run.save_every", "run.keep", "run.merge", "eval.prompts", "eval.max_new_tokens"),
    *("model.adapter", "adapter.start", "adapter.adapters"),
}
_DATA_REMEDY = "restore the original data file"
_REMEDIES = {
    "model": "restore the original weights, or set model.revision to their commit",
    "tokenizer": "restore the original tokenizer files, or set model.revision to their commit",
    "base adapter": "restore the adapter that model.adapter names",
    "mixed adapters": "restore those that adapter.adapters names",
    "start adapter": "restore the adapter that adapter.start names",
    "train data": _DATA_REMEDY,
    "eval data": _DATA_REMEDY,
}


def package_versions() -> dict[str, str]:
    """Version of each installed package that can change a result."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def write_lock(
    path: str | os.PathLike[str],
    loaded: LoadedRecipe,
    *,
    fingerprints: Mapping[str, str | None],
    environment: Mapping[str, Any],
) -> None:
    """Writes the lock file atomically: a reader sees the old file or the new one, never a partial one.

    Args:
        fingerprints: hash of each of model, tokenizer, train data and eval data; None if it has none.
        environment: plain values about the machine, for information; not checked.

    Raises: RecipeError (the folder cannot be written), ResourceError (the disk is full).
    """
    settings = _settings(loaded)
    versions = package_versions()
    settings["lock"] = {
        "name": loaded.name,
        "peftlab": versions.pop("peftlab", None),
        "packages": versions,
        "fingerprints": dict(fingerprints),
        "environment": dict(environment),
    }
    _write_atomically(Path(path), _HEADER + dump_yaml(settings))


def _settings(loaded: LoadedRecipe) -> dict[str, Any]:
    """Every setting by section, local paths absolute, without the run folder and the lock."""
    settings = loaded.recipe.model_dump(exclude={"lock"})
    settings["run"]["dir"] = None
    if isinstance(mixed := settings["adapter"].get("adapters"), dict):
        settings["adapter"]["adapters"] = {name: _absolute(folder) for name, folder in mixed.items()}
    for section, name in _LOCAL_PATHS:
        settings[section][name] = _absolute(settings[section][name])
    if (self_training := settings["train"]["self_training"]) is not None:
        self_training["unlabelled"] = _absolute(self_training["unlabelled"])
    distill = settings["distill"]
    if distill is not None:
        distill["transfer"] = _absolute(distill["transfer"])
        distill["cache"] = distill["cache"] and os.path.abspath(distill["cache"])
        for teacher in filter(None, [distill["teacher"], *distill["teachers"]]):
            teacher["name"], teacher["adapter"] = _absolute(teacher["name"]), _absolute(teacher["adapter"])
    return settings


def local_files(loaded: LoadedRecipe) -> dict[str, Path]:
    """Recipe key -> absolute path of each local file or folder that a recipe names; a sampling suffix stays."""
    settings = _settings(loaded)
    named = {f"{section}.{name}": settings[section][name] for section, name in _LOCAL_PATHS}
    if isinstance(mixed := settings["adapter"].get("adapters"), dict):
        named |= {f"adapter.adapters.{name}": folder for name, folder in mixed.items()}
    if (self_training := settings["train"]["self_training"]) is not None:
        named["train.self_training.unlabelled"] = self_training["unlabelled"]
    if (distill := settings["distill"]) is not None:
        named |= {f"distill.{name}": distill[name] for name in ("transfer", "cache")}
        teachers = {f"teachers.{i}": teacher for i, teacher in enumerate(distill["teachers"])}
        for key, teacher in {"teacher": distill["teacher"], **teachers}.items():
            named |= {f"distill.{key}.{name}": teacher[name] for name in ("name", "adapter")} if teacher else {}
    return {key: Path(name) for key, name in named.items() if name is not None and os.path.isabs(name)}


def check_same_settings(loaded: LoadedRecipe, stored: LoadedRecipe) -> None:
    """Raises RecipeError if a run would be resumed with settings that change what it computes."""
    now, then = _settings(loaded), _settings(stored)
    changed = [
        f"{section}.{name}"
        for section, values in then.items()
        if isinstance(values, dict)
        for name in values
        if values[name] != (now[section] or {}).get(name) and f"{section}.{name}" not in _FREE_ON_RESUME
    ]
    changed += [
        name for name in ("task", "distill") if (now[name] is None or name == "task") and now[name] != then[name]
    ]
    if changed:
        raise RecipeError(
            f"cannot resume with changed settings ({', '.join(changed)}); resume without these changes, or start a new run "
            "with --replace or another run.dir",
            key=changed[0],
        )


def check_lock(loaded: LoadedRecipe, *, fingerprints: Mapping[str, str | None], resumed: bool = False) -> list[str]:
    """Notes on package versions that differ from the lock; empty without a lock.

    Args:
        fingerprints: current ones, as for ``write_lock``. Only those known on both sides are compared.
        resumed: whether the run is resumed, not repeated.

    Raises: ArtifactError if the model, the tokenizer or the data differ from the lock.
    """
    lock = loaded.recipe.lock
    if lock is None:
        return []
    stored = _mapping(lock, "fingerprints")
    changed = [
        name for name, now in fingerprints.items() if None not in (now, stored.get(name)) and stored[name] != now
    ]
    if "base adapter" in changed:
        changed.remove("model")  # which is the base with this adapter
    if changed:
        rows = "; ".join(
            f"the {name} has changed: {_short(stored[name])} when the run was made, {_short(fingerprints[name])} now"
            for name in changed
        )
        remedies = ", ".join(dict.fromkeys(_REMEDIES.get(name, f"restore the {name}") for name in changed))
        key = f"lock.fingerprints.{changed[0]}" if len(changed) == 1 else "lock.fingerprints"
        verb, new_run = ("resume", "use --replace") if resumed else ("repeat", "add `lock=` to the command")
        raise ArtifactError(f"{rows}. To {verb} the run, {remedies}; for a new run, {new_run}", key=key)
    then, now = _mapping(lock, "packages") | {"peftlab": lock.get("peftlab")}, package_versions()
    return [
        f"{name}: {then.get(name) or 'not installed'} when the run was made, {now.get(name, 'not installed')} now"
        for name in _PACKAGES
        if then.get(name) != now.get(name)
    ]


def _mapping(lock: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = lock.get(name)
    if value is not None and not isinstance(value, dict):
        raise RecipeError(
            f"expected a mapping, found {value!r}; restore the file as the run wrote it", key=f"lock.{name}"
        )
    return value or {}


def _short(fingerprint: object) -> str:
    return str(fingerprint).removeprefix("sha256:")[:12]


def _absolute(name: str | None) -> str | None:
    """``name`` as an absolute path if it exists; a sampling suffix such as ``#500`` stays."""
    if name is None or name.startswith(("package:", "tiny:")):
        return name
    if os.path.exists(name):
        return os.path.abspath(name)
    base, _, count = name.rpartition("#")
    drawn = count.removesuffix("-per-class").isdigit()
    return f"{os.path.abspath(base)}#{count}" if drawn and os.path.exists(base) else name


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kind: type[PeftlabError] = ResourceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else RecipeError
        raise kind(f"cannot write {path}: {error.strerror}") from error

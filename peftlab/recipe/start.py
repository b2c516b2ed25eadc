"""``adapter.start``: what a recipe leaves out of its section ``adapter`` is read from the adapter that it continues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftlab.recipe.yaml_lines import parse_yaml
from peftlab.specs.method_spec import MethodSpec
from peftlab.specs.methods import METHODS

_CONFIG, _LOCK = "adapter_config.json", "recipe.lock.yaml"
# PEFT's task type of a classifier adds these to its modules_to_save itself, and names them in the file.
_ADDED_BY_PEFT = ("classifier", "score")


def adapter_folder(name: str) -> Path:
    """The folder with the adapter's files that a run, an adapter's folder or a checkpoint is. Raises: FileNotFoundError, with what
    to do, if it is none."""
    path = Path(name).expanduser()
    for folder in (path, path / "adapter"):
        if (folder / _CONFIG).is_file():
            return folder
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {name}; expected a run, or the folder of an adapter on this disk")
    if (path / _LOCK).is_file():
        raise FileNotFoundError(
            f"the run in {name} has no adapter; expected a run with one, or the folder of an adapter"
        )
    raise FileNotFoundError(f"{name} has no {_CONFIG}; expected a run, or the folder of an adapter")


def lock_of(folder: Path) -> dict[str, Any]:
    """The recipe of the run that wrote an adapter or a checkpoint, with its section ``lock``; empty without one."""
    for around in (folder, *folder.resolve().parents[:2]):
        if (around / _LOCK).is_file():
            data = parse_yaml((around / _LOCK).read_text(encoding="utf-8"), _LOCK).data
            return data if isinstance(data, dict) else {}
    return {}


def fill_from_start(data: dict[str, Any]) -> None:
    """Adds the settings of the adapter that ``data`` continues to its section ``adapter``, in place, where it has none. The recipe
    of a lock file is complete. Files that are missing or damaged are an error when they are needed."""
    section = data.get("adapter")
    if not isinstance(section, dict) or not isinstance(section.get("start"), str) or data.get("lock"):
        return
    try:
        folder = adapter_folder(section["start"])
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        spec = METHODS[str(config["peft_type"]).lower()]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if section.get("method", spec.name) == spec.name:  # of another method nothing fits, which a later check says
        for name, value in _settings(spec, config, lock_of(folder)).items():
            section.setdefault(name, value)


def _settings(spec: MethodSpec, config: Mapping[str, Any], lock: Mapping[str, Any]) -> dict[str, Any]:
    """A section ``adapter`` that describes a saved adapter: PEFT's configuration, and the tokens that its run added."""
    # A zero is off: OFT has a rank or a block size.
    names = {key: name for key, name in spec.keys.items() if config.get(name) not in (None, 0)}
    values: dict[str, Any] = {"method": spec.name} | {key: config[name] for key, name in names.items()}
    values |= {
        name: config[name]
        for name, option in spec.options.items()
        if name in config and (config[name] != option.default or name in spec.defaults) and config[name] != {}
    }
    if values.get("init_lora_weights") == "eva":
        del values["init_lora_weights"]  # it chose the ranks, which the file has, and first values
    if spec.name == "adalora":
        values.pop("rank_pattern", None)  # the ranks that it kept, of a schedule that is over
    if config.get("task_type") == "SEQ_CLS" and "modules_to_save" in values:
        values["modules_to_save"] = [n for n in values["modules_to_save"] if n not in _ADDED_BY_PEFT]
    if "layers" in spec.places and not spec.has_targets and config.get("layers"):
        values["layers"] = list(config["layers"])
    section = lock.get("adapter")
    if isinstance(section, dict) and section.get("tokens"):
        values.pop("trainable_token_indices", None)
        values["tokens"] = section["tokens"]
        if section.get("trainable_token_indices"):
            values["trainable_token_indices"] = section["trainable_token_indices"]
    return values

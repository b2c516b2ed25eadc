"""``model.adapter``: a model with a saved adapter folded into its weights, which a run then takes as its frozen base.

The fold happens once, in float32 and on the CPU, so that every device gets the same weights, and quantizing comes after it. The
result is a model folder in the cache, as of a GGUF file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftlab.adapters import ADAPTER_FILES, check_adapter_files, folders_beside, load_adapter
from peftlab.adapters.merge_check import MergeCheck
from peftlab.assembly.folding import folded, untie_if_adapted
from peftlab.errors import ArtifactError, RecipeError, ResourceError, VerificationError
from peftlab.models import Pretrained, load_config, load_model, load_tokenizer, save_plain, stacked_on
from peftlab.paths import cache_root, sha256_of_files
from peftlab.recipe import adapter_folder, load_recipe, lock_of
from peftlab.specs.methods import METHODS
from peftlab.specs.tasks import TASKS

if TYPE_CHECKING:
    from peftlab.assembly.assembly import Assembly

_KEY = "model.adapter"
# Part of the folder name: increased when the fold changes, so that old folders are not reused.
_VERSION = 1
# Settings of a recipe for its plain float32 model on the CPU.
_PLAIN: dict[str, Any] = {
    "model.quantize": "none",
    "model.double_quant": True,
    "model.compute_dtype": "auto",
    "run.device": "cpu",
    "run.kernels": "reference",
    "run.merge": "none",
    "distill": None,
}


def base_adapter(name: str) -> Path:
    """The folder of the adapter that ``model.adapter`` names. Raises: RecipeError (there is none, or its method changes no weight),
    ArtifactError (damaged)."""
    try:
        folder = adapter_folder(name)
    except FileNotFoundError as error:
        raise RecipeError(str(error), key=_KEY) from None
    check_adapter_files(folder)
    spec = METHODS.get(_config(folder)["peft_type"].lower())
    if spec is not None and spec.unmergeable:
        raise RecipeError(
            f"{spec.label} cannot be folded into the model: {spec.unmergeable}; {_instead(folder)}", key=_KEY
        )
    return folder


def _instead(folder: Path) -> str:
    """What a recipe can do with an adapter that cannot be folded."""
    return "name another adapter" if folders_beside(folder) else "adapter.start continues it"


def adapter_fingerprint(folder: Path) -> str:
    """sha256 of an adapter's files."""
    return sha256_of_files([part / name for part in (folder, *folders_beside(folder)) for name in ADAPTER_FILES])


def stacked_fingerprint(base: str, folder: Path) -> str:
    """Identifies the weights with the fingerprint ``base`` after the adapter in ``folder`` was folded in."""
    return hashlib.sha256(f"{base}\n{adapter_fingerprint(folder)}".encode()).hexdigest()


def stacked(assembly: Assembly, base: Pretrained, name: str) -> Pretrained:
    """The model ``base`` of an assembly's recipe with the adapter ``name`` in its weights, from the cache or made now.

    Raises: RecipeError, ArtifactError (another base), VerificationError if a folded layer is not the layer with its adapter.
    """
    folder = base_adapter(name)
    lock = lock_of(folder)
    first = _of_run(assembly, lock) if lock else None
    fingerprint = base.fingerprint if first is None else first.model_fingerprint
    expected = ((lock.get("lock") or {}).get("fingerprints") or {}).get("model")
    if expected is not None and expected != fingerprint:
        raise ArtifactError(
            f"the adapter in {folder} was made for another model: it was trained on weights {expected[:12]}, and "
            f"{base.source.name!r} has {fingerprint[:12]}",
            key=_KEY,
        )
    made_from = stacked_fingerprint(fingerprint, folder)
    target = cache_root() / "stacked" / f"{made_from[:32]}-v{_VERSION}"
    if not (target / "config.json").is_file():
        partial = _new_folder(target.parent)
        try:
            with torch.random.fork_rng(devices=[]):  # a run that finds the folder draws the same numbers
                _write(assembly, first, base, folder, partial / "model")
            try:
                os.replace(partial / "model", target)
            except OSError:
                if not (target / "config.json").is_file():  # else another process was faster; its folder is equal
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return stacked_on(base, target, name=name, made_from=made_from)


def _new_folder(parent: Path) -> Path:
    """An empty folder in the cache. Raises: ResourceError if the cache cannot be written."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    except OSError as error:
        raise ResourceError(
            f"the folded model is written to the cache, and {parent} cannot be written: {error.strerror}; set PEFTLAB_CACHE to "
            "a folder that can",
            key=_KEY,
        ) from error


def _of_run(assembly: Assembly, lock: dict[str, Any]) -> Assembly:
    """The assembly of the run that wrote an adapter, with the model of ``assembly``."""
    model = assembly.recipe.model
    changes = {
        "model.name": model.name,
        "model.revision": model.revision,
        "model.trust_remote_code": model.trust_remote_code,
    }
    classes = ((lock.get("lock") or {}).get("environment") or {}).get("class_names")
    return type(assembly)(load_recipe(lock).derive(_PLAIN | changes), classes=classes, reads_data=False)


def _write(assembly: Assembly, first: Assembly | None, base: Pretrained, folder: Path, target: Path) -> None:
    """Folds the adapter into the plain model and writes it with its tokenizer, as a plain transformers folder."""
    plain, files = _plain(assembly, base, folder) if first is None else (_float32(first), first.task.files)
    adapted = load_adapter(plain, folder)
    untie_if_adapted(plain)
    check = MergeCheck(adapted)
    try:
        model = folded(adapted)
    except RecipeError as error:
        raise RecipeError(
            str(error).replace("use it as an adapter, without merging", _instead(folder)), key=_KEY
        ) from error
    layers = check.error(model, torch.float32)
    if layers is not None and layers.wrong:
        raise VerificationError(
            f"{layers.wrong} layers with the adapter in {folder} folded in differ from the layers with their adapter, most "
            f"{layers.worst}: by {layers.worst_relative:.1%} of what the adapter changes",
            key=_KEY,
        )
    save_plain(model, files, target)
    # The dtype of the model's own files, which a merge of the run writes again; every load here names one.
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    if isinstance(dtype := load_config(base).dtype, torch.dtype):
        config["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _plain(assembly: Assembly, base: Pretrained, folder: Path) -> tuple[Any, Any]:
    """The float32 model for an adapter without its run, and the tokenizer: for the recipe's task, or for the adapter's own."""
    task_type, own = _config(folder).get("task_type"), assembly.spec
    other = next((spec for spec in TASKS.values() if spec.peft_type == task_type), own)
    if task_type in (None, own.peft_type) or other is own:
        same = assembly.derive(
            _PLAIN | {"model.adapter": None, "adapter": {}, "train.loraplus_lr_ratio": 1.0, "lock": None}
        )
        return _float32(same), same.task.files
    labels: dict[str, Any] = {"num_labels": count} if other.reads_whole_rows and (count := _num_labels(folder)) else {}
    model = load_model(base, auto_class=other.auto_class, device="cpu", dtype="float32", **labels)
    return model, load_tokenizer(base)


def _float32(assembly: Assembly) -> Any:
    return assembly.model(quantize="none", dtype="float32")


def _num_labels(folder: Path) -> int | None:
    """The number of classes of the head in an adapter's file; None without a head."""
    from safetensors import safe_open

    with safe_open(str(folder / ADAPTER_FILES[1]), framework="pt") as tensors:
        shapes = {n: tensors.get_slice(n).get_shape() for n in tensors.keys()}  # noqa: SIM118  (no mapping)
    heads = [
        s[0] for n, s in shapes.items() if ("classifier" in n or "score" in n) and len(s) == 2 and ".lora_" not in n
    ]
    return min(heads, default=None)


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8")))

"""The files that tell sentence-transformers how a model's hidden states become one vector."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.errors import ArtifactError, RecipeError
from peftlab.models.load_errors import load_errors, quiet
from peftlab.models.pretrained import Pretrained

MODULES = "modules.json"
_BESIDE = ("config_sentence_transformers.json", "sentence_bert_config.json")
_POOLING_KEYS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_WIDTHS = ("hidden_size", "dim", "d_model", "n_embd")  # in the configs of the families
_NAMES = {"mean": "mean", "cls": "cls", "lasttoken": "last"}


@dataclass(frozen=True)
class SentenceFiles:
    """The settings of a model folder for its vectors.

    Attributes:
        pooling: mean, cls, last, or another mode's name in its config; None if unspecified. normalize: whether vectors are
            divided by their length. max_length: longest text in tokens; None: the model's limit.
        files: name inside the folder -> path.
    """

    pooling: str | None = None
    normalize: bool = False
    max_length: int | None = None
    files: tuple[tuple[str, Path], ...] = ()

    def writer(self, tokenizer: Any, *, pooling: str) -> SentenceWriter:
        """A writer of ``tokenizer`` and these files into a model folder."""
        return SentenceWriter(tokenizer, self, pooling=pooling)


def sentence_files(pretrained: Pretrained) -> SentenceFiles:
    """The sentence-transformers files and settings of a model folder.

    Raises: ArtifactError (damaged), RecipeError for a module that is neither transformer, pooling nor normalization.
    """
    listed = _find(pretrained, MODULES)
    if listed is None:
        return SentenceFiles()
    files, pooling, normalize = [(MODULES, listed)], None, False
    for module in _json(listed):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            name = f"{module['path']}/config.json"
            path = _find(pretrained, name)
            if path is None:
                raise ArtifactError(f"{name} is missing in {pretrained.source.name!r}; copy it again", key="model.name")
            pooling = _pooling(_json(path))
            files.append((name, path))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise RecipeError(
                f"{pretrained.source.name!r} ends with a module {kind!r}, which is not supported; expected transformer, "
                "pooling and normalization",
                key="model.name",
            )
    files += [(name, path) for name in _BESIDE if (path := _find(pretrained, name)) is not None]
    settings = dict(files).get("sentence_bert_config.json")
    longest = None if settings is None else _json(settings).get("max_seq_length")
    return SentenceFiles(pooling, normalize, longest, tuple(files))


class SentenceWriter:
    """Writes tokenizer and sentence-transformers files into a model folder, with the pooling in use."""

    def __init__(self, tokenizer: Any, files: SentenceFiles, *, pooling: str) -> None:
        self._tokenizer, self._files, self._pooling = tokenizer, files, pooling

    def save_pretrained(self, folder: str | Path) -> None:
        """Args: folder: must contain the model's config.json."""
        self._tokenizer.save_pretrained(folder)
        if not self._files.files:
            self._write_own(Path(folder))
        for name, path in self._files.files:
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/config.json"):
                settings = _json(path) | {"word_embedding_dimension": _width(Path(folder))}
                if _pooling(settings) != self._pooling:
                    settings = {k: v for k, v in settings.items() if not k.startswith("pooling_mode")}
                    settings |= self._modes()
                target.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            else:
                shutil.copy(path, target)

    def _write_own(self, folder: Path) -> None:
        """The files of a model that has none: without them sentence-transformers takes the mean."""
        if (width := _width(folder)) is None:
            return
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling")])
        ]
        (folder / "1_Pooling").mkdir(exist_ok=True)
        pooling = {"word_embedding_dimension": width, **self._modes()}
        for name, content in ((MODULES, modules), ("1_Pooling/config.json", pooling)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _modes(self) -> dict[str, bool]:
        return {key: mode == self._pooling for key, mode in _POOLING_KEYS.items()}


def _width(folder: Path) -> int | None:
    """The width of the vectors of the model in ``folder``."""
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return next((settings[key] for key in _WIDTHS if key in settings), None)


def _pooling(settings: dict[str, Any]) -> str:
    """The pooling mode. Newer files name it; older ones have a flag for each mode."""
    mode = settings.get("pooling_mode")
    if isinstance(mode, str):
        return _NAMES.get(mode, mode)
    on = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    return " + ".join(_POOLING_KEYS.get(key, key.removeprefix("pooling_mode_")) for key in on)


def _find(pretrained: Pretrained, name: str) -> Path | None:
    if pretrained.source.kind in ("tiny", "shape"):
        return None
    if pretrained.source.kind != "hub":
        path = Path(pretrained.location) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    options = {k: v for k, v in pretrained.hub_kwargs.items() if k != "trust_remote_code"}
    with quiet(), load_errors(pretrained, name):
        cached = cached_file(
            pretrained.location,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **options,
        )
    return None if cached is None else Path(cached)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; copy it again", key="model.name") from error

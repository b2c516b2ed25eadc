"""The two JSON files of a cache: ``capture.json`` while it is being written, ``manifest.json`` once it is complete."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from peftlab import __version__
from peftlab.distillation.cache.files import damaged, publish, sha256
from peftlab.distillation.cache.fill import Fill
from peftlab.distillation.cache.shards import Shard
from peftlab.errors import ArtifactError

FORMAT, VERSION = "peftlab teacher cache", 1
MANIFEST, CAPTURE, TENSORS = "manifest.json", "capture.json", "tensors.safetensors"
SPLITS = ("train", "eval")
# All files that a cache may have in its folder, so that overwriting a cache touches nothing else.
OWN = re.compile(
    rf"((({'|'.join(SPLITS)})-\d{{5,}}\.(bin|index|journal))|tensors\.safetensors|capture\.json|manifest\.json)(\.partial)?"
)


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Writes ``document`` as JSON. Raises: OSError."""
    publish(path, json.dumps({"format": FORMAT, "version": VERSION, **document}, indent=1).encode())


def read(path: Path) -> dict[str, Any] | None:
    """The document in ``path``; None if the file is missing. Raises: ArtifactError if it does not belong to a cache."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise damaged(path, f"cannot be read ({error})") from error
    document = _own(document, path)
    if document.get("version") != VERSION:
        raise ArtifactError(
            f"expected version {VERSION} of the teacher cache's format in {path}, found {document.get('version')}: use the "
            "peftlab that wrote it, or run `peftlab teach --replace`"
        )
    return document


def refuse_another(path: Path) -> None:
    """Raises: ArtifactError if ``path`` is a readable file that does not belong to a cache."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return
    _own(document, path)


def _own(document: object, path: Path) -> dict[str, Any]:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtifactError(f"{path} does not belong to a teacher cache; choose another folder")
    return document


def describe_split(num_examples: int, shards: list[Shard]) -> dict[str, Any]:
    """A split's part of the manifest; bytes_per_position covers all its files, including the index."""
    sizes = [(shard.num_bytes, shard.index.stat().st_size) for shard in shards]
    num_positions, num_bytes = sum(shard.num_positions for shard in shards), sum(a + b for a, b in sizes)
    return {
        "examples": num_examples,
        "positions": num_positions,
        "bytes": num_bytes,
        "bytes_per_position": num_bytes / num_positions if num_positions else 0.0,
        "shards": [
            {
                "file": shard.path.name,
                "examples": len(shard.rows),
                "positions": shard.num_positions,
                "bytes": num_records,
                "sha256": shard.sha256,
                "index": shard.index.name,
                "index_bytes": num_index,
                "index_sha256": sha256(shard.index),
            }
            for shard, (num_records, num_index) in zip(shards, sizes, strict=True)
        ],
    }


def describe(
    folder: Path, fill: Fill, identity: Mapping[str, Any], splits: dict[str, Any], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of a cache with all its files."""
    tensors = folder / TENSORS
    return {
        "fill": fill.settings(),
        "identity": dict(identity),
        "splits": splits,
        "tensors": {"file": TENSORS, "bytes": tensors.stat().st_size, "sha256": sha256(tensors)}
        if tensors.is_file()
        else None,
        "versions": {
            "peftlab": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "safetensors": safetensors.__version__,
        },
        "extra": dict(extra),
    }

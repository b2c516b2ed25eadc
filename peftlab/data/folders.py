"""Finds what a folder holds: tables, texts or images per class, saved data sets, and their splits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from peftlab.data.images import IMAGE_ENDINGS
from peftlab.data.readers import ENDINGS, format_of, is_about, is_data_file
from peftlab.data.rows import Note
from peftlab.data.table import SPLITS, Options, choose_split, split_in_name
from peftlab.errors import DataError, listed

# Files that `datasets` and repositories write next to the data.
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# The folders of images and of masks, whose files are paired by name.
_PAIRED = ("images", "masks")
_UNLABELLED = ("unsup", "unlabeled", "unlabelled")


class Contents(NamedTuple):
    """The files of a folder to read.

    Attributes:
        kind: ``tables``; ``images`` or ``texts``: each file is one row.
        labels: the class of each file, if its subfolder names it. masks: the mask of each image, if the folder has masks; None: an
            image without one.
        split_taken: whether ``Options.split`` chose these files, and not a table in them.
    """

    files: list[Path]
    kind: str = "tables"
    labels: list[str] | None = None
    masks: list[Path | None] | None = None
    notes: tuple[Note, ...] = ()
    split_taken: bool = False


def contents_of(folder: Path, options: Options) -> Contents:
    """What to read in a folder. Raises: DataError: nothing that can be read, or an unclear split."""
    saved = _saved_splits(folder)
    if saved:
        split, notes = choose_split(saved, folder, options)
        return Contents(_saved_files(folder / split, options), notes=tuple(notes), split_taken=True)
    if (folder / "state.json").is_file():
        return Contents(_saved_files(folder, options))
    try:
        files = _visible(folder)
    except OSError as exc:
        raise DataError(
            f"the folder {folder} cannot be read: {exc.strerror}: {exc.filename}", key=options.key
        ) from None
    if options.format == "auto" and not any(_is_table(path) for path in files):
        images = [path for path in files if path.suffix.lower() in IMAGE_ENDINGS]
        if _has_masks(folder, images):
            return _of_masks(folder, images, options)
        if any(path.parent != folder for path in images):
            return _of_classes(folder, images, "images", options)
        if options.classes_from_folders:
            texts = [path for path in files if format_of(path.name) == "text"]
            if texts:
                return _of_classes(folder, texts, "texts", options)
    readable = _readable(folder, files, options)
    chosen = set(readable)
    others = [path for path in files if path not in chosen and path.name not in _ABOUT and not is_about(path.stem)]
    others = [path for path in others if path.suffix.lower() not in IMAGE_ENDINGS]  # the tables name them
    readable, notes, taken = _of_split(folder, readable, lambda path: _split_of_table(folder, path), options)
    return Contents(readable, notes=(*_others_noted(folder, others, options), *notes), split_taken=taken)


def _others_noted(folder: Path, files: list[Path], options: Options) -> list[Note]:
    """A note on files beside the data that are of another kind."""
    if not files:
        return []
    names = listed([path.relative_to(folder).as_posix() for path in files], most=3)
    what = "1 other file is" if len(files) == 1 else f"{len(files):,} other files are"
    return [Note("folder", f"{folder}: {what} not read: {names}", options.key)]


def _saved_splits(folder: Path) -> list[str]:
    """The splits of a folder that ``DatasetDict.save_to_disk`` wrote."""
    content = _json_in(folder / "dataset_dict.json")
    splits = content.get("splits") if isinstance(content, dict) else None
    return [str(split) for split in splits] if isinstance(splits, list) else []


def _saved_files(folder: Path, options: Options) -> list[Path]:
    """The files of a data set that ``Dataset.save_to_disk`` wrote; caches beside them are none."""
    state = _json_in(folder / "state.json")
    try:
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (TypeError, KeyError):
        files = []
    missing = [file for file in files if not file.is_file()]
    if not files or missing:
        what = f"the file {missing[0].name!r} of it is missing" if missing else "its state.json names no files"
        raise DataError(f"{folder} is an incomplete saved data set: {what}", key=options.key)
    return files


def _json_in(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _visible(folder: Path) -> list[Path]:
    """All files in and below ``folder``, sorted by name, without hidden ones."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _is_table(path: Path) -> bool:
    return is_data_file(path.name) and format_of(path.name) != "text" and path.name not in _ABOUT


def _of_classes(folder: Path, files: list[Path], kind: str, options: Options) -> Contents:
    """Files of which each is one row. The first subfolder is the class, or the split if all of them are splits."""
    parts = {path: path.relative_to(folder).parts[:-1] for path in files}
    depth = 0
    notes: list[Note] = []
    taken = False
    tops = {inside[0].lower() for inside in parts.values() if inside}
    if tops and tops <= set(SPLITS):
        files, notes, taken = _of_split(folder, files, lambda path: parts[path][0] if parts[path] else None, options)
        depth = 1
    classed = [path for path in files if len(parts[path]) > depth]
    labelled = [path for path in classed if parts[path][depth].lower() not in _UNLABELLED]
    if not labelled:
        return Contents(files, kind, notes=tuple(notes), split_taken=taken)
    if left := len(files) - len(labelled):
        what = "file is" if left == 1 else "files are"
        notes.append(Note("folder", f"{folder}: {left:,} {what} in no class folder, and not read", options.key))
    labels = [parts[path][depth] for path in labelled]
    return Contents(labelled, kind, labels, notes=tuple(notes), split_taken=taken)


def _has_masks(folder: Path, files: list[Path]) -> bool:
    """Whether each image is below a folder ``images`` or ``masks``, and there are both."""
    return {_kind_of(folder, path) for path in files} == set(_PAIRED)


def _kind_of(folder: Path, path: Path) -> str | None:
    """``images`` or ``masks``, from the first or second folder in the path."""
    return next((part for part in path.relative_to(folder).parts[:-1][:2] if part in _PAIRED), None)


def _of_masks(folder: Path, files: list[Path], options: Options) -> Contents:
    """``images/NAME.jpg`` with ``masks/NAME.png``, also below a folder per split, or with such folders in both."""

    def split_of(path: Path) -> str | None:
        return next((part.lower() for part in path.relative_to(folder).parts[:-1] if part.lower() in SPLITS), None)

    files, notes, taken = _of_split(folder, files, split_of, options)
    found: dict[str, dict[tuple[str, ...], Path]] = {kind: {} for kind in _PAIRED}
    for path in files:
        kind, inside = _kind_of(folder, path), list(path.relative_to(folder).parts)
        assert kind is not None
        inside.remove(kind)
        name = (*inside[:-1], path.stem)
        if (other := found[kind].setdefault(name, path)) != path:
            raise DataError(f"{other} and {path} have one name; each image needs a name of its own", key=options.key)
    images, masks = (found[kind] for kind in _PAIRED)
    if alone := [path for name, path in masks.items() if name not in images]:
        names = listed([path.relative_to(folder).as_posix() for path in alone], most=3)
        what = "1 mask has" if len(alone) == 1 else f"{len(alone):,} masks have"
        notes.append(Note("folder", f"{folder}: {what} no image, and not read: {names}", options.key))
    pairs = [masks.get(name) for name in images]
    return Contents(list(images.values()), "images", masks=pairs, notes=tuple(notes), split_taken=taken)


def _of_split(
    folder: Path, files: list[Path], split_of: Callable[[Path], str | None], options: Options
) -> tuple[list[Path], list[Note], bool]:
    """``(files, notes, whether they are those of one split)``: all files if they are not of several splits."""
    groups: dict[str, list[Path]] = {}
    for path in files:
        if split := split_of(path):
            groups.setdefault(split, []).append(path)
    if len(groups) < 2 and (options.split is None or options.split not in groups):
        return files, [], False
    split, notes = choose_split(groups, folder, options)
    if left := len(files) - sum(map(len, groups.values())):
        what = "file is" if left == 1 else "files are"
        notes.append(Note("folder", f"{folder}: {left:,} {what} in no split, and not read", options.key))
    return groups[split], notes, True


def _split_of_table(folder: Path, path: Path) -> str | None:
    """The split of a table in a folder, from a folder above it or from its name."""
    inside = path.relative_to(folder).parts[:-1]
    above = next((part.lower() for part in inside if part.lower() in SPLITS), None)
    return above or split_in_name(path.name.split(".")[0])


def _readable(folder: Path, files: list[Path], options: Options) -> list[Path]:
    """The files with a known ending, or with one of ``options.format``; all files if none has one of that."""
    files = [path for path in files if path.name not in _ABOUT]
    if options.format == "auto":
        readable = [path for path in files if is_data_file(path.name)]
        if any(map(_is_table, readable)):
            readable = [path for path in readable if _is_table(path) or not is_about(path.stem)]
    else:
        wanted = "text" if options.format == "document" else options.format
        readable = [path for path in files if format_of(path.name) == wanted] or files
    if not readable:
        endings = f"{', '.join(ENDINGS)}; images: {', '.join(IMAGE_ENDINGS)}"
        raise DataError(f"the folder {folder} has no file with a known ending: {endings}", key=options.key)
    return readable

"""Reads a recipe's rows, labels them, and splits them into training and held-out rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from peftlab.data import (
    Rows,
    balanced_rows,
    class_names,
    label_text,
    load_rows,
    read_labels,
    rows_per_class,
    split_groups,
    split_per_class,
    split_rows,
)
from peftlab.data.label_sets import label_columns
from peftlab.errors import DataError, RecipeError, listed
from peftlab.recipe import Recipe

# Rows, and whether they need a label -> why rows lack what the task needs, by index.
BlankRows = Callable[[Rows, bool], dict[int, str]]


@dataclass(frozen=True)
class DataParts:
    """Training and held-out rows, and what identifies them.

    Attributes:
        labelled: the rows that define columns and classes: those of data.train that are not held out.
        has_labels: whether ``train`` has labels; a transfer set has none.
    """

    train: Rows
    eval: Rows
    fingerprints: dict[str, str]
    labelled: Rows
    has_labels: bool = True


def data_seed(recipe: Recipe) -> int:
    """Seed of the split and of sampled rows."""
    return recipe.run.seed if recipe.data.seed is None else recipe.data.seed


def load_data(
    recipe: Recipe, *, transfer: bool = False, held_out_only: bool = False, blank_rows: BlankRows | None = None
) -> DataParts:
    """Reads the rows and splits them. Raises: DataError, RecipeError.

    Args:
        transfer: whether to train on the rows of distill.transfer, if the recipe has them.
        held_out_only: read only data.eval, which the recipe must have; its rows stand for the training rows.
        blank_rows: why rows lack what the task needs, by index, to leave them out (data.empty); None: leave out none.
    """
    data = recipe.data
    seed = data_seed(recipe)
    read = functools.partial(
        load_rows,
        format=data.format,
        encoding=data.encoding,
        column_names=data.column_names,
        delimiter=data.delimiter,
        subset=data.subset,
        seed=seed,
        classes_from_folders=uses_labels(recipe),
    )

    def read_held_out(name: str) -> Rows:
        base, per_class = split_per_class(name, key="data.eval")
        rows = read(base, key="data.eval", default_split="validation")
        rows = _without_blank(rows, blank_rows, labelled=True, key="data.eval")
        return _drawn(recipe, _with_labels(recipe, rows, all_names_used=False), per_class, key="data.eval")

    if held_out_only:
        assert data.eval is not None
        held_out = read_held_out(data.eval)
        return DataParts(held_out, held_out, {"eval data": held_out.fingerprint}, held_out)
    base, per_class = split_per_class(data.train, key="data.train")
    source = _without_blank(read(base, key="data.train"), blank_rows, labelled=True, key="data.train")
    train = _with_labels(recipe, source, all_names_used=True)
    fingerprints = {"train data": train.fingerprint}
    if data.eval is not None:
        held_out = read_held_out(data.eval)
        fingerprints |= {"eval data": held_out.fingerprint}
        parts = DataParts(_chosen(recipe, train, per_class), held_out, fingerprints, train)
        return _with_transfer(recipe, parts, read, blank_rows) if transfer else parts
    labels = read_class_labels(recipe, train) if class_role(recipe) is not None else None
    if recipe.spec.classifies:
        class_names(labels or [])
    if (role := recipe.spec.whole) is not None:
        groups = [str(v) for v in train.column(data.columns.get(role, role), key=f"data.columns.{role}")]
        kept, held = split_groups(train, groups, fraction=data.eval_fraction, num_rows=data.eval_rows, seed=seed)
    else:
        kept, held = split_rows(train, fraction=data.eval_fraction, num_rows=data.eval_rows, seed=seed, labels=labels)
    labelled = train.select(kept)
    chosen = _chosen(recipe, dataclasses.replace(labelled, left_out=train.left_out), per_class)
    parts = DataParts(chosen, train.select(held), fingerprints, labelled)
    return _with_transfer(recipe, parts, read, blank_rows) if transfer else parts


def uses_labels(recipe: Recipe) -> bool:
    """Whether rows have a class, so that a folder of texts holds one row per file."""
    template = recipe.data.template.model_dump(exclude_none=True).values() if recipe.data.template else ()
    return recipe.spec.classifies or "label" in recipe.data.columns or any("{label}" in str(part) for part in template)


def class_role(recipe: Recipe) -> str | None:
    """The role of the column that gives each row one class; None if there is none."""
    if recipe.spec.classifies or "label" in recipe.data.columns:
        return "label"
    return "rank" if "rank" in recipe.data.columns else None


def read_class_labels(recipe: Recipe, rows: Rows, *, all_names_used: bool = True) -> list[str]:
    """Returns the class name of each row, from the recipe's label column, names and bins.

    Args: all_names_used: whether each of data.label_names must occur.
    """
    data, role = recipe.data, class_role(recipe) or "label"
    if role == "label" and not recipe.spec.classifies:  # the column already holds the names
        return [str(v) for v in rows.column("label")]
    bins = (data.bins.edges, data.bins.names) if data.bins else None
    return read_labels(
        rows,
        data.columns.get(role, role),
        key=f"data.columns.{role}",
        label_names=data.label_names,
        bins=bins,
        all_names_used=all_names_used,
    )


def check_columns(recipe: Recipe, rows: Rows) -> None:
    """Raises DataError for the first of data.columns that is missing in the rows."""
    for part, named in recipe.data.columns.items():
        for name in [] if part == "label" else label_columns(named, rows.columns) if part == "labels" else [named]:
            try:
                rows.column(name)
            except DataError as error:
                raise DataError(str(error), key=f"data.columns.{part}") from None


def _without_blank(rows: Rows, blank_rows: BlankRows | None, *, labelled: bool, key: str) -> Rows:
    """Drops the rows of ``blank_rows``, and keeps their places. Raises: DataError if no row is left."""
    blank = {} if blank_rows is None else blank_rows(rows, labelled)
    if not blank:
        return rows
    left_out: dict[str, list[str]] = {}
    for i, reason in blank.items():
        left_out.setdefault(reason, []).append(rows.where(i))
    if len(blank) == len(rows):
        reasons = "; ".join(f"{len(where):,} because {reason} ({where[0]})" for reason, where in left_out.items())
        raise DataError(f"{rows.name}: data.empty=drop leaves out all {len(rows):,} rows: {reasons}", key=key)
    kept = rows.select([i for i in range(len(rows)) if i not in blank])
    return dataclasses.replace(kept, left_out=left_out)


def _with_transfer(
    recipe: Recipe, parts: DataParts, read: Callable[..., Rows], blank_rows: BlankRows | None
) -> DataParts:
    if recipe.distill is None or recipe.distill.transfer is None:
        return parts
    rows = read(recipe.distill.transfer, key="distill.transfer")
    rows = _without_blank(rows, blank_rows, labelled=False, key="distill.transfer")
    fingerprints = parts.fingerprints | {"transfer data": rows.fingerprint}
    return dataclasses.replace(parts, train=rows, fingerprints=fingerprints, has_labels=False)


def _drawn(recipe: Recipe, rows: Rows, per_class: int | None, *, key: str) -> Rows:
    """``per_class`` rows of each class; all rows for None. Raises: RecipeError without classes, DataError for too few rows."""
    if per_class is None:
        return rows
    if class_role(recipe) is None:
        raise RecipeError(
            f"#{per_class}-per-class draws rows by their class, and rows of {recipe.spec.what} have none; set "
            "data.columns.label, or draw NAME#500",
            key=key,
        )
    labels = read_class_labels(recipe, rows, all_names_used=False)
    try:
        kept = rows_per_class(labels, per_class, seed=data_seed(recipe))
    except DataError as error:
        raise DataError(f"{rows.name}: {error}", key=key) from None
    return rows.select(kept)


def _chosen(recipe: Recipe, rows: Rows, per_class: int | None) -> Rows:
    """The rows to train on: those that data.exclude leaves, and of these the drawn ones. Raises: DataError, RecipeError."""
    rows = _without_excluded(recipe, rows)
    if per_class is not None and recipe.data.balance:
        raise RecipeError("has no effect on rows that are drawn per class; remove it", key="data.balance")
    if per_class is not None:
        left_out = rows.left_out
        return dataclasses.replace(_drawn(recipe, rows, per_class, key="data.train"), left_out=left_out)
    if not recipe.data.balance:
        return rows
    labels = read_class_labels(recipe, rows, all_names_used=False)
    shares = recipe.data.balance if isinstance(recipe.data.balance, dict) else None
    if shares is not None and shares.keys() != set(labels):
        raise RecipeError(
            f"expected a share of each class ({listed(sorted(set(labels)))}), found {listed(list(shares))}",
            key="data.balance",
        )
    kept = balanced_rows(labels, shares=shares, seed=data_seed(recipe))
    out = np.setdiff1d(np.arange(len(rows)), kept)
    if not len(out):
        return rows
    than = "the rarest" if shares is None else "its share"
    left_out = {
        **rows.left_out,
        f"of a class with more rows than {than} (data.balance)": [rows.where(int(i)) for i in out],
    }
    return dataclasses.replace(rows.select(kept), left_out=left_out)


def _without_excluded(recipe: Recipe, rows: Rows) -> Rows:
    """Drops the rows of data.exclude. Raises: DataError if a value matches no row, or if no rows remain."""
    kept = np.ones(len(rows), dtype=bool)
    for column, values in recipe.data.exclude.items():
        key = f"data.exclude.{column}"
        texts = [label_text(v) for v in rows.column(column, key=key)]
        numbers = {str(i): name for i, name in enumerate(rows.class_names.get(column, ()))}
        excluded = {value: label_text(numbers.get(value, value)) for value in values}
        if missing := sorted(value for value, text in excluded.items() if text not in texts):
            raise DataError(
                f"no row of {rows.name} has {missing[0]!r} in the column {column!r}, which has {listed(sorted(set(texts)))}",
                key=key,
            )
        kept &= ~np.isin(texts, list(excluded.values()))
    if not kept.any():
        raise DataError(f"all rows of {rows.name} are excluded: nothing is left to train on", key="data.exclude")
    return rows if kept.all() else dataclasses.replace(rows.select(np.flatnonzero(kept)), left_out=rows.left_out)


def _with_labels(recipe: Recipe, rows: Rows, *, all_names_used: bool) -> Rows:
    """Adds a column ``label`` with class names for templates, if the task has no classification head."""
    column = recipe.data.columns.get("label")
    if recipe.spec.classifies or column is None:
        return rows
    labels = read_labels(rows, column, label_names=recipe.data.label_names, all_names_used=all_names_used)
    return dataclasses.replace(rows, columns={**rows.columns, "label": labels})

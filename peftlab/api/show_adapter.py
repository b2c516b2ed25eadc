"""``show_adapter``: what an adapter changes, module by module."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftlab.assembly.process import located, prepare_libraries
from peftlab.assembly.target import RecipeSource
from peftlab.measuring.drawing import check_picture
from peftlab.reworking.picture import draw_adapter
from peftlab.reworking.source import find_adapter
from peftlab.reworking.spectra import adapter_figures
from peftlab.training.progress import Progress, make_progress


def show_adapter(
    target: str | os.PathLike[str],
    *,
    picture: str | os.PathLike[str] | None = None,
    recipe: RecipeSource | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The size, the singular values and the effective rank of the update of each module that an adapter changes.

    The update is W' - W, with the adapter's scaling; for DoRA and methods that multiply, too. The effective rank is
    ``exp(H(s / sum(s)))`` with the entropy H of the normalised singular values s (Roy and Vetterli 2007).

    Args:
        target: a run folder or its adapter folder, or a folder with an adapter of PEFT, which needs ``recipe``.
        picture: a .png or .svg file to write: heat maps of layer x kind of module.
        overrides: ``section.key=value``.

    Returns: ``{"target", "method", "base", "modules", "kinds", "total", "in_full", "notes"}``. A module has ``name``, ``layer``,
        ``kind``, ``shape``, ``rank`` (nominal), ``num_parameters``, ``weight_norm``, ``norm`` and ``relative`` (Frobenius),
        ``values`` (the 16 largest), ``effective_rank``, ``rank_99`` (that holds 99 % of the squared norm) and ``reason``, why
        it has no update matrix. ``in_full``: what is trained in full, with its number of parameters.
    Raises: RecipeError, ArtifactError.
    """
    if picture is not None:
        check_picture(Path(picture))
    prepare_libraries()
    resolved = find_adapter(target, recipe, overrides)
    with located(resolved.loaded), progress or make_progress() as progress:
        for line in resolved.loaded.notes:
            progress.note(line)
        figures = adapter_figures(resolved, progress)
        if picture is not None:
            draw_adapter(figures, Path(picture))
            figures["picture"] = str(picture)
        return figures

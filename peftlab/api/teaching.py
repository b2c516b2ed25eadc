"""``teach``: what the teacher says about every training example, stored once for as many distillations as one likes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.api import build
from peftlab.api.parts import check_settings
from peftlab.api.run import LOCK_NAME, open_run
from peftlab.api.teachers import TeacherModel, Teachers, open_teacher, teacher_identity, teacher_keys
from peftlab.data import eval_batches
from peftlab.distill import fingerprint
from peftlab.distill.cache import CacheWriter, Fill, TeacherCache, example_key, open_cache
from peftlab.errors import ArtifactError, PeftlabError, RecipeError, ResourceError
from peftlab.evaluation.loop import evaluate_examples
from peftlab.evaluation.metrics import default_metrics
from peftlab.recipe import LoadedRecipe, Recipe, load_recipe
from peftlab.tasks import Encoded, Outputs, Task
from peftlab.training.progress import Progress, make_progress
from peftlab.training.teachers import Columns

# Examples that are answered before the first of them is written: enough to batch those of like length.
_WINDOW = 512
# Positions whose logits exist at a time: 256 x 128,256 float32 values are 131 MB.
_CHUNK = 256
_DEFAULT_K = 50
_REASONS = {
    "teacher": "made by another teacher",
    "teacher_adapter": "made by a teacher with another adapter",
    "teacher_storage": "made by a teacher in another storage",
    "tokenizer": "made with another tokenizer",
    "template": "made with another template or other columns",
    "max_length": "made with another truncation",
    "too_long": "made with another truncation",
    "data": "made for other data",
    "split": "made for another split of the data",
    "classes": "made for other classes",
}


@dataclass(frozen=True)
class Lesson:
    """The training examples that teachers answer, and what identifies them. Nothing of a model is loaded."""

    recipe: Recipe
    task: Task
    data: build.DataParts
    train: Encoded
    identity: dict[str, Any]

"""Tasks: one file each, implementing the protocol in ``base``; their specs are in ``specs.tasks``."""

from importlib import import_module

from peftlab.specs.task_spec import TaskSpec
from peftlab.tasks.base import (
    Chats,
    Columns,
    Contrasts,
    FindsClasses,
    FindsObjects,
    FindsSettings,
    Gathers,
    Generates,
    Padding,
    Redraws,
    Segments,
    Task,
    TaskParts,
)
from peftlab.tasks.batch import Batch, collate_packed
from peftlab.tasks.contrast import step_shares
from peftlab.tasks.example import Encoded, Example, lengths_of
from peftlab.tasks.outputs import OutputHead, Outputs, weighted_sum
from peftlab.tasks.preview import Preview


def task_class(spec: TaskSpec) -> type[Task]:
    """The class that implements a task."""
    file, _, class_name = spec.implementation.partition(":")
    implementation_class: type[Task] = getattr(import_module(f".{file}", __name__), class_name)
    return implementation_class


__all__ = [
    "Batch",
    "Chats",
    "Columns",
    "Contrasts",
    "Encoded",
    "Example",
    "FindsClasses",
    "Gathers",
    "FindsSettings",
    "FindsObjects",
    "Generates",
    "OutputHead",
    "Outputs",
    "Padding",
    "Preview",
    "Redraws",
    "Segments",
    "Task",
    "TaskParts",
    "collate_packed",
    "lengths_of",
    "step_shares",
    "task_class",
    "weighted_sum",
]

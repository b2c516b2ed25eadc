"""Tasks: one file each, implementing the protocol in ``base``; their specs are in ``specs.tasks``."""

from importlib import import_module

from peftlab.specs.tasks import TASKS
from peftlab.tasks.base import Columns, Generates, Padding, Redraws, Task, TaskParts
from peftlab.tasks.batch import Batch, collate_packed
from peftlab.tasks.example import Encoded, Example, lengths_of
from peftlab.tasks.outputs import OutputHead, Outputs, weighted_sum
from peftlab.tasks.preview import Preview


def task_class(name: str) -> type[Task]:
    """The class that implements a task, by its name in ``specs.tasks``."""
    file, _, class_name = TASKS[name].implementation.partition(":")
    implementation_class: type[Task] = getattr(import_module(f".{file}", __name__), class_name)
    return implementation_class


__all__ = [
    "Batch",
    "Columns",
    "Encoded",
    "Example",
    "Generates",
    "OutputHead",
    "Outputs",
    "Padding",
    "Preview",
    "Redraws",
    "Task",
    "TaskParts",
    "collate_packed",
    "lengths_of",
    "task_class",
    "weighted_sum",
]

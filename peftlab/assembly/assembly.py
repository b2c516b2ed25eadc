"""``Assembly``: resolves what a recipe names, once and on first use."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from peftlab.assembly.adapter import adapter_fingerprints, adapter_options, adapter_places
from peftlab.assembly.data import DataParts, check_columns, data_seed, load_data, read_class_labels
from peftlab.assembly.families import check_family
from peftlab.assembly.limits import input_limit, row_limit
from peftlab.assembly.metrics import run_metrics
from peftlab.assembly.process import pick_device
from peftlab.assembly.reading import Reading, read_family, settings_of, task_parts
from peftlab.assembly.stack import stacked
from peftlab.assembly.start import Start
from peftlab.assembly.weights import kept_as, load_backbone
from peftlab.data import Rows, class_names, require
from peftlab.errors import RecipeError
from peftlab.models import (
    Pretrained,
    add_tokens,
    find_pretrained,
    load_config,
    load_image_reader,
    load_skeleton,
    load_tokenizer,
    resolve_precision,
    sentence_files,
    stored_as,
    tokenizer_fingerprint,
)
from peftlab.recipe import LoadedRecipe, Recipe
from peftlab.recipe.distillation import DistillSection
from peftlab.specs.method_spec import MethodSpec
from peftlab.specs.task_spec import TaskSpec
from peftlab.tasks import Encoded, FindsClasses, FindsSettings, Task, TaskParts, task_class

T = TypeVar("T")
# Keys of the section data that affect examples but not rows.
_NOT_ABOUT_ROWS = {
    "template",
    "control_tokens",
    "max_length",
    "max_target_length",
    "stride",
    "too_long",
    "packing",
    "allow",
    "augment",
    "score_range",
    "prefix",
    "source_language",
    "target_language",
    "seed",
}


class Assembly:
    """Resolves what a recipe names: model files, reader, rows and their split, task, limit, examples, fingerprints.

    Each part is resolved on first use and cached. A derived assembly shares every part whose settings are equal: the
    arms of a distillation read their data once.

    Args:
        loaded: the recipe.
        transfer: whether to train on the rows of distill.transfer, if the recipe has them.
        classes: names of the classes; None: those of the training rows.
        reads_data: False if there may be no data, as in prediction; then only classes are read from it.
        reads_train: False to read only data.eval, whose rows then show the columns.
    """

    def __init__(
        self,
        loaded: LoadedRecipe,
        *,
        transfer: bool = False,
        classes: Sequence[str] | None = None,
        reads_data: bool = True,
        reads_train: bool = True,
        _shared: dict[tuple[str, str], Any] | None = None,
    ) -> None:
        self.loaded, self._transfer = loaded, transfer
        self._reads_data, self._reads_train = reads_data, reads_train
        self._classes = None if classes is None else list(classes)
        self._shared: dict[tuple[str, str], Any] = {} if _shared is None else _shared

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def spec(self) -> TaskSpec:
        return self.recipe.spec

    @property
    def method(self) -> MethodSpec:
        return self.recipe.method

    @property
    def adapter_places(self) -> dict[str, Any]:
        """The arguments of ``adapters.inject`` that say which modules are adapted and which are trained in full."""
        return adapter_places(self.recipe)

    @property
    def adapter_options(self) -> dict[str, Any]:
        """Its other arguments: the settings of the method."""
        return adapter_options(self.recipe)

    @property
    def distill(self) -> DistillSection:
        """The section ``distill``. Raises: RecipeError if the recipe has none."""
        if self.recipe.distill is None:
            raise RecipeError(f"{self.name} has no section distill, which names the teacher")
        return self.recipe.distill

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``. Raises: RecipeError if cuda is requested but missing."""
        return pick_device(self.recipe.run.device)

    @property
    def precision(self) -> str:
        """``no``, ``bf16`` or ``fp16``, as Accelerate calls the autocast dtypes. Raises: RecipeError for float16 on a CPU."""
        import torch

        dtype = resolve_precision(self.recipe.train.precision, self.device)
        if dtype == torch.float16 and self.device == "cpu":
            raise RecipeError("float16 needs a GPU; use bfloat16 or float32 on a CPU", key="train.precision")
        return {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]

    @property
    def seed(self) -> int:
        """The seed of the split and of sampled rows."""
        return data_seed(self.recipe)

    def derive(
        self,
        changes: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        transfer: bool | None = None,
        classes: Sequence[str] | None = None,
    ) -> Assembly:
        """Returns the assembly of the recipe with changed values, validated again. Shares the parts that do not change.

        Args: changes: dotted key -> value. classes: default the same. Raises: RecipeError.
        """
        return Assembly(
            self.loaded.derive(changes or {}, name=name),
            transfer=self._transfer if transfer is None else transfer,
            classes=self._classes if classes is None else classes,
            reads_data=self._reads_data,
            reads_train=self._reads_train,
            _shared=self._shared,
        )

    @property
    def pretrained(self) -> Pretrained:
        """The files of the model, with the adapter in model.adapter. Raises: RecipeError, ArtifactError."""
        return self._once("model files", self._model_key, self._find_model)

    def _find_model(self) -> Pretrained:
        model = self.recipe.model
        found = find_pretrained(model.name, revision=model.revision, trust_remote_code=model.trust_remote_code)
        return found if model.adapter is None else stacked(self, found, model.adapter)

    @property
    def stored(self) -> str:
        """How the model's files store the linear weights, as ``storage``."""
        return self._once("stored as", self._model_key, lambda: stored_as(self.pretrained))

    @property
    def storage(self) -> str:
        """How the linear weights are kept: as the model's files store them quantized, else model.quantize.

        Raises: RecipeError if the two contradict each other, or quantized weights would be trained.
        """
        return kept_as(self)

    @property
    def reader(self) -> Any:
        """The tokenizer, or the ``ImageReader`` for images. Raises: RecipeError."""
        settings = [
            *self._model_key,
            self.spec.reader,
            self.spec.reads_source,
            self.recipe.model.chat_template,
            self.recipe.adapter.tokens,
        ]
        return self._once("reader", settings, self._read_reader)

    def _read_reader(self) -> Any:
        if self.spec.reader == "image processor":
            reader = load_image_reader(self.pretrained)
        else:
            template, offsets = self.recipe.model.chat_template, not self.spec.reads_source
            reader = load_tokenizer(self.pretrained, chat_template=template, offsets=offsets)
            if self.recipe.adapter.tokens:
                add_tokens(reader, self.recipe.adapter.tokens)
        # Students cut from one model have equal readers; sharing one lets them share their examples.
        shared = self._once("reader by content", _content(reader), lambda: reader)
        # Encoding changes the truncation that a tokenizer's file may set, and with it the fingerprint.
        self._once("fingerprint of the reader", id(shared), lambda: tokenizer_fingerprint(reader))
        return shared

    @property
    def data(self) -> DataParts:
        """The rows. Raises: DataError, RecipeError."""
        return self._once("data", self._data_key, self._load_data)

    def _load_data(self) -> DataParts:
        drop = self.recipe.data.empty == "drop"
        return load_data(
            self.recipe,
            transfer=self._transfer,
            held_out_only=not self._reads_train,
            blank_rows=self._blank_rows if drop else None,
        )

    def _blank_rows(self, rows: Rows, labelled: bool) -> dict[int, str]:
        """Why rows lack what the task needs, by index."""
        label = self.recipe.data.columns.get("label")
        if not self.spec.classifies and label in rows.columns:  # named before there are class names
            rows = dataclasses.replace(rows, columns={**rows.columns, "label": rows.columns[label]})
        parts = self._task_parts(self.reader, classes=None, rows=rows)
        return task_class(self.spec).blank_rows(parts, rows, labelled=labelled)

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, in the order of their index; None for a task without classes."""
        if self.spec.classes_from == "eval.choices":
            return self.recipe.eval.choices
        if not self.spec.names_classes:
            return None
        if self._classes is not None:
            return self._classes
        return self._once("classes", self._data_key, self._read_classes)

    def _read_classes(self) -> list[str]:
        rows = self.data.labelled
        if self.spec.classes_from == "label":
            return class_names(read_class_labels(self.recipe, rows))
        parts = self._task_parts(self.reader, classes=None, rows=rows)
        return cast(type[FindsClasses], task_class(self.spec)).find_classes(parts, rows)

    @property
    def found(self) -> dict[str, Any]:
        """The settings that the task finds, or that the run in the recipe's lock has found; empty for a task without any."""
        if not self.spec.finds_settings:
            return {}
        stored = ((self.recipe.lock or {}).get("environment") or {}).get("found")
        if isinstance(stored, dict):
            return dict(stored)
        return self._once("settings", [self._data_key, self._reads_train], self._find_settings)

    def _find_settings(self) -> dict[str, Any]:
        rows = self.data.labelled
        parts = self._task_parts(self.reader, classes=None, rows=rows, found={})
        return cast(type[FindsSettings], task_class(self.spec)).find_settings(parts, rows)

    @property
    def kept(self) -> dict[str, Any]:
        """What the lock file of a run keeps of the data: names of the classes, and settings."""
        kept: dict[str, Any] = {"class_names": self.classes} if self.spec.names_classes else {}
        return kept | ({"found": self.found} if self.found else {})

    @property
    def task(self) -> Task:
        """The task, with reader, columns and classes. Raises: DataError, RecipeError."""
        return self._once("task", self._task_key, self._make_task)

    def _make_task(self) -> Task:
        if not self._reads_data:
            return self.task_for(self.reader, classes=self.classes)
        rows = self.data.labelled
        check_columns(self.recipe, rows)
        return self.task_for(self.reader, classes=self.classes, rows=rows)

    def task_for(
        self,
        reader: Any,
        *,
        classes: list[str] | None,
        rows: Rows | None = None,
        pretrained: Pretrained | None = None,
    ) -> Task:
        """Returns the recipe's task with another reader, other classes and another model, such as those of a teacher.

        Args: rows: define the columns; default: each row shows its own when it is encoded.
        Raises: RecipeError, DataError.
        """
        parts = self._task_parts(reader, classes=classes, rows=rows, pretrained=pretrained)
        return task_class(self.spec).make(parts)

    def _task_parts(
        self,
        reader: Any,
        *,
        classes: list[str] | None,
        rows: Rows | None,
        pretrained: Pretrained | None = None,
        found: dict[str, Any] | None = None,
    ) -> TaskParts:
        model = pretrained or self.pretrained
        return task_parts(
            self.recipe,
            reader,
            self._reading(model, reader),
            rows=rows,
            classes=classes,
            config=load_config(model) if self.spec.reader != "tokenizer" else None,
            sentences=lambda: sentence_files(self.pretrained),
            found=self.found if found is None else found,
        )

    @property
    def unread_columns(self) -> list[str]:
        """The columns of the training rows that neither the task nor another key of the recipe reads."""
        data, distill = self.recipe.data, self.recipe.distill
        teachers = [distill.teacher, *distill.teachers] if distill else []
        read = self.task.read_columns | set(data.exclude)
        read |= {column for teacher in teachers if teacher is not None for column in teacher.rows}
        if "label" in data.columns:
            read |= {"label", data.columns["label"]}
        return [name for name in self.data.labelled.columns if name not in read]

    def _reading(self, pretrained: Pretrained, reader: Any) -> Reading:
        """How the model's family reads and writes. Raises: RecipeError if it cannot do the task."""
        if self.spec.reader != "tokenizer":
            return Reading()
        settings = [
            pretrained,
            id(reader),
            self.recipe.task,
            self.recipe.data.columns,
            bool(self.recipe.adapter.tokens),
        ]
        # The reader is kept too: while it lives, no other one has its id.
        return self._once("reading", settings, lambda: (self._read_family(pretrained, reader), reader))[0]

    def _read_family(self, pretrained: Pretrained, reader: Any) -> Reading:
        check_family(load_config(pretrained), reader, self.spec, pairs="pair" in self.recipe.data.columns)
        return read_family(pretrained, reader, self.spec, adds_tokens=bool(self.recipe.adapter.tokens))

    @property
    def num_embeddings(self) -> int | None:
        """Rows of the model's input embeddings; None for images and for a model without a vocabulary."""
        return self._reading(self.pretrained, self.reader).num_embeddings

    @property
    def most_tokens(self) -> int:
        """The longest input in tokens that the model's positions and its tokenizer allow."""
        return self._reading(self.pretrained, self.reader).most_tokens

    @property
    def target_limit(self) -> int:
        """The longest target in tokens that the model's decoder writes."""
        limit = self._reading(self.pretrained, self.reader).target_limit
        assert limit is not None
        return limit

    @property
    def limit(self) -> int:
        """Maximum row length in tokens: data.max_length. Raises: RecipeError if the model allows less, or packing has no
        limit."""
        return row_limit(self)

    @property
    def model_limit(self) -> int:
        """Maximum input length in tokens that the model's files allow: the limit of prompts and of inputs to predict."""
        return input_limit(self)

    @property
    def train(self) -> Encoded:
        """The training examples. Raises: DataError with everything the ledger refuses."""
        return self._once("train", self._examples_key, self._encode_train)

    def _encode_train(self) -> Encoded:
        return self.encode(self.data.train, training=True, labelled=self.data.has_labels)

    @property
    def held_out(self) -> Encoded:
        """The held-out examples. Raises: as ``train``."""
        return self._once("held out", self._examples_key, lambda: self.encode(self.data.eval, training=False))

    def encode(self, rows: Rows, *, training: bool, labelled: bool = True) -> Encoded:
        """Encodes ``rows`` into examples. Raises: DataError with everything the ledger refuses."""
        data = self.recipe.data
        encoded = self.task.encode(
            rows, max_length=self.limit, too_long=data.too_long, training=training, labelled=labelled
        )
        require(encoded.ledger, allow=data.allow, training=training, num_embeddings=self.num_embeddings)
        return encoded

    @property
    def metrics(self) -> list[str]:
        """Names of the run's metrics. Raises: RecipeError for an unknown metric, or if eval.best is not among them."""
        return run_metrics(self, reads_rows=self._reads_data)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of model, tokenizer and data. The weights are hashed once, as long as their files do not change."""
        reader = self.reader
        of_reader = self._once("fingerprint of the reader", id(reader), lambda: tokenizer_fingerprint(reader))
        adapters = adapter_fingerprints(self.recipe, self.start)
        return {"model": self.model_fingerprint, "tokenizer": of_reader, **adapters, **self.data.fingerprints}

    @property
    def model_fingerprint(self) -> str:
        """Identifies the frozen weights."""
        return self.pretrained.fingerprint

    @property
    def start(self) -> Start | None:
        """The adapter that this one continues. Raises: RecipeError if there is none in adapter.start, ArtifactError."""
        name = self.recipe.adapter.start
        return None if name is None else self._once("start adapter", name, lambda: Start.find(name))

    def model(self, **changes: Any) -> Any:
        """Loads the frozen backbone, every time; ``changes`` override loading options, such as ``quantize="none"``."""
        return load_backbone(self, changes)

    def skeleton(self, task: Task | None = None) -> Any:
        """Returns the model without weights, on the meta device. Args: task: determines the head; default the recipe's."""
        kwargs = (task or self.task).model_kwargs()
        return load_skeleton(self.pretrained, auto_class=self.spec.auto_class, **kwargs)

    def headline(self) -> str:
        """The metric of the distillation's verdict."""
        if self.distill.headline is not None:
            return self.distill.headline
        return (self.recipe.eval.choices and self.spec.headline_with_classes) or self.spec.headline

    @property
    def _model_key(self) -> list[Any]:
        model = self.recipe.model
        return [model.name, model.revision, model.trust_remote_code, model.adapter]

    @property
    def _data_key(self) -> list[Any]:
        r = self.recipe
        transfer = r.distill.transfer if self._transfer and r.distill is not None else None
        return [r.task, r.data.model_dump(exclude=_NOT_ABOUT_ROWS), self.seed, transfer]

    @property
    def _task_key(self) -> list[Any]:
        r = self.recipe
        sentences = str(sentence_files(self.pretrained)) if "model.pooling" in self.spec.keys else None
        return [
            r.task,
            id(self.reader),
            self._data_key[:3] if self._reads_data else None,
            r.data.columns,
            settings_of(self.recipe),
            self._model_key if self.spec.reader != "tokenizer" else None,
            self.classes,
            self.found,
            r.run.kernels,
            sentences,
            self._reading(self.pretrained, self.reader),
        ]

    @property
    def _examples_key(self) -> list[Any]:
        data = self.recipe.data
        return [self._task_key, self._data_key, self.limit, data.too_long, data.allow]

    def _once(self, what: str, settings: Any, make: Callable[[], T]) -> T:
        """Returns the result of ``make``, cached for all assemblies that share it and have equal ``settings``."""
        key = (what, json.dumps(settings, sort_keys=True, default=str))
        if key not in self._shared:
            self._shared[key] = make()
        part: T = self._shared[key]
        return part


def _content(reader: Any) -> list[Any]:
    """Values that identify a reader by content."""
    names = ("special_tokens_map", "model_max_length", "padding_side")
    return [type(reader).__name__, tokenizer_fingerprint(reader), *(str(getattr(reader, name, None)) for name in names)]

"""``Assembly``: resolves what a recipe names, once and on first use."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

from pydantic import BaseModel

from peftlab.adapters import HeadLoss
from peftlab.assembly.adapter import adapter_fingerprints, adapter_options, adapter_places
from peftlab.assembly.data import DataParts, check_columns, data_seed, load_data, read_class_labels
from peftlab.assembly.model_findings import check_family, reads_ids
from peftlab.assembly.process import pick_device
from peftlab.assembly.stack import stacked
from peftlab.assembly.start import Start
from peftlab.data import Augmentation, Rows, class_names, require
from peftlab.errors import RecipeError, listed
from peftlab.evaluation.metrics import check_metrics, default_metrics, flat_names
from peftlab.measuring.memory import share_one_heap
from peftlab.models import (
    UNLIMITED,
    Pretrained,
    add_tokens,
    check_stored,
    decoder_start,
    end_ids,
    find_pretrained,
    is_causal,
    load_config,
    load_image_reader,
    load_model,
    load_skeleton,
    load_tokenizer,
    model_max_length,
    padding_of,
    reconcile,
    resolve_precision,
    sentence_files,
    start_rows,
    stored_as,
    target_limit,
    token_types,
    tokenizer_fingerprint,
    vocabulary_rows,
)
from peftlab.recipe import LoadedRecipe, Recipe
from peftlab.recipe.distillation import DistillSection
from peftlab.specs.method_spec import MethodSpec
from peftlab.specs.methods import METHODS
from peftlab.specs.metrics import family_of, values_of
from peftlab.specs.task_spec import TaskSpec
from peftlab.tasks import Encoded, FindsClasses, FindsSettings, Padding, Task, TaskParts, task_class

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


class Reading(NamedTuple):
    """How a model's family reads and writes texts.

    Attributes: padding, causal, num_embeddings, token_types, decoder_start, hidden_size: see ``TaskParts``.
        end_ids: the ids that end its texts.
        target_limit: the longest target in tokens; None for a task without targets.
    """

    padding: Padding = "right"
    causal: bool = False
    end_ids: Sequence[int] = ()
    num_embeddings: int | None = None
    token_types: int = 0
    decoder_start: int | None = None
    target_limit: int | None = None
    hidden_size: int | None = None


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
        stored, wanted = self.stored, self.recipe.model.quantize
        if stored == "none":
            return wanted
        check_stored(self.pretrained, stored, wanted)
        methods = [self.method, *(METHODS[other.method] for other in self.recipe.adapter.beside)]
        if (method := next((m for m in methods if not m.trains_on(stored)), None)) is not None:
            what = f"{method.label} does not work on them" if method.adapts else "they cannot be trained"
            raise RecipeError(
                f"the weights of {self.recipe.model.name} are stored in {stored}, and {what}; use adapter.method=lora, or name "
                "the model that it was made from",
                key="adapter.method",
            )
        return stored

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
        r, data = self.recipe, self.recipe.data
        family = self._reading(pretrained or self.pretrained, reader)
        return TaskParts(
            reader,
            columns=data.columns,
            available=list(rows.columns) if rows else (),
            sample=rows.sample() if rows else {},
            classes=classes,
            label_names=data.label_names,
            bins=(data.bins.edges, data.bins.names) if data.bins else None,
            class_weights=r.train.class_weights,
            template=data.template.model_dump(exclude_none=True) if data.template else None,
            head_loss=HeadLoss(r.run.kernels),
            pooling=r.model.pooling,
            sentences=lambda: sentence_files(self.pretrained),
            style=((r.lock or {}).get("environment") or {}).get("style"),
            control_tokens=data.control_tokens,
            padding=family.padding,
            causal=family.causal,
            end_ids=family.end_ids,
            num_embeddings=family.num_embeddings,
            token_types=family.token_types,
            decoder_start=family.decoder_start,
            max_target_length=self._max_target_length(family),
            hidden_size=family.hidden_size,
            settings=self._settings,
            config=load_config(pretrained or self.pretrained) if self.spec.reader != "tokenizer" else None,
            augmentation=Augmentation(**data.augment.model_dump()) if data.augment else None,
            found=self.found if found is None else found,
        )

    @property
    def _settings(self) -> dict[str, Any]:
        """See ``TaskParts.settings``."""
        values: dict[str, Any] = {}
        for key in self.spec.settings:
            section, name = key.split(".")
            value = getattr(getattr(self.recipe, section), name)
            values[key] = value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value
        return values

    def _max_target_length(self, family: Reading) -> int | None:
        """The longest target in tokens; None for a task without targets. Raises: RecipeError if the model writes less."""
        wanted, allowed = self.recipe.data.max_target_length, family.target_limit
        if allowed is None:
            return None
        if wanted is not None and wanted > allowed:
            raise RecipeError(
                f"the decoder of {self.recipe.model.name} writes at most {allowed:,} tokens, found {wanted:,}",
                key="data.max_target_length",
            )
        return allowed if wanted is None else wanted

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
        settings = [pretrained, id(reader), self.recipe.task, bool(self.recipe.adapter.tokens)]
        # The reader is kept too: while it lives, no other one has its id.
        return self._once("reading", settings, lambda: (self._read_family(pretrained, reader), reader))[0]

    def _read_family(self, pretrained: Pretrained, reader: Any) -> Reading:
        config = load_config(pretrained)
        check_family(config, reader, self.spec)
        ends = end_ids(pretrained, reader)[0] if self.spec.generates else []
        rows = vocabulary_rows(config)
        if self.recipe.adapter.tokens and rows is not None:
            rows = max(rows, len(reader))
        reading = Reading(
            padding_of(config, whole_rows=self.spec.reads_whole_rows),
            is_causal(config),
            ends,
            rows,
            token_types(config, reader),
            hidden_size=getattr(config.get_text_config(), "hidden_size", None),
        )
        if not self.spec.reads_source:
            return reading
        return reading._replace(decoder_start=decoder_start(config), target_limit=target_limit(pretrained, reader))

    @property
    def num_embeddings(self) -> int | None:
        """Rows of the model's input embeddings; None for images and for a model without a vocabulary."""
        return self._reading(self.pretrained, self.reader).num_embeddings

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
        if self.spec.reader == "image processor":
            return self.model_limit
        allowed = self._max_length
        wanted = self.recipe.data.max_length
        if wanted is None and allowed == UNLIMITED and self.recipe.data.packing:
            raise RecipeError(
                f"{self.recipe.model.name} has no limit of its own, so packing needs data.max_length, such as 2048",
                key="data.max_length",
            )
        if wanted is None:
            return self.model_limit
        if wanted > allowed:
            prompts = f" beside the {self._virtual_tokens} of the adapter" if self._virtual_tokens else ""
            raise RecipeError(
                f"{self.recipe.model.name} reads at most {allowed:,} tokens{prompts}, found {wanted:,}",
                key="data.max_length",
            )
        return wanted

    @property
    def _virtual_tokens(self) -> int:
        """Number of positions that the adapter takes before each row."""
        options = {**self.method.defaults, **self.recipe.adapter.options}
        return int(options.get("num_virtual_tokens") or 0) if self.method.prompts else 0

    @property
    def _max_length(self) -> int:
        """Maximum number of a row's own tokens that the model's files and the adapter allow."""
        allowed = model_max_length(self.pretrained, self.reader)
        return allowed if allowed == UNLIMITED else allowed - self._virtual_tokens

    @property
    def model_limit(self) -> int:
        """Maximum input length in tokens that the model's files allow: the limit of prompts and of inputs to predict.
        data.max_length is that of training and held-out rows."""
        if self.spec.reader == "image processor":
            return int(self.reader.length)
        allowed = self._max_length
        return min(allowed, self.task.max_length or allowed)

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
        e, choices = self.recipe.eval, bool(self.recipe.eval.choices)
        if e.metrics is not None:
            check_metrics(e.metrics, self.spec, choices)
        metrics = e.metrics or default_metrics(self.spec, choices)
        names = flat_names(metrics, self.task.class_names)
        if e.best is not None and e.best not in names:
            raise RecipeError(f"{e.best!r} is not among this run's metrics: {listed(names, most=20)}", key="eval.best")
        if e.best is not None and self._reads_data:
            self.check_class_has_rows(e.best, key="eval.best")
        return metrics

    def check_class_has_rows(self, metric: str, *, key: str) -> None:
        """Raises RecipeError at ``key`` if ``metric`` is of one class, and no held-out row has that class."""
        classes, family = self.task.class_names, family_of(metric)
        if classes is None or family is None:
            return
        name = values_of(family, classes).get(metric)
        if name is not None and name not in self._held_out_classes():
            raise RecipeError(
                f"no held-out row has the class {name!r}, so {metric} cannot be measured; name another metric, or give "
                "data.eval rows of it",
                key=key,
            )

    def _held_out_classes(self) -> set[str]:
        if self.spec.classifies:
            return set(read_class_labels(self.recipe, self.data.eval, all_names_used=False))
        too_long = self.recipe.data.too_long
        encoded = self.task.encode(self.data.eval, max_length=self.limit, too_long=too_long, training=False, keep=False)
        return {entry["label"] for entry in encoded.ledger.label_counts() or () if entry["rows"]}

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
        # Only after encoding: before, the tokenizer's threads would wait for each other (measured: twice the time).
        share_one_heap()
        model = self.recipe.model
        options: dict[str, Any] = {
            "quantize": self.storage,
            "double_quant": model.double_quant,
            "compute_dtype": model.compute_dtype,
            # Trained weights need float32: a single update is often below the resolution of 16 bits.
            "dtype": "float32" if not self.method.adapts and model.dtype == "auto" else model.dtype,
            "attention": model.attention,
            "resize_token_embeddings": model.resize_token_embeddings,
        }
        loaded = load_model(
            self.pretrained,
            auto_class=self.spec.auto_class,
            device=self.device,
            **(options | changes),
            **self.task.model_kwargs(),
        )
        if self.recipe.adapter.tokens:
            start_rows(loaded, self.reader, self.recipe.adapter.tokens)
        if reads_ids(loaded.config, self.spec):
            reconcile(loaded, self.reader)
        return loaded

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
            self._settings,
            self._model_key if self.spec.reader != "tokenizer" else None,
            self.classes,
            self.found,
            r.eval.threshold,
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

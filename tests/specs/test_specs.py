"""The rows of ``specs``: everything that a row names exists, and everything that exists has a row."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import peft
import pytest
from peft import PeftConfig, PeftType, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peftlab import ops
from peftlab.distillation import INNER_ATTENTION, INNER_HIDDEN, VECTOR_LOSSES
from peftlab.evaluation import modules
from peftlab.evaluation.comparison import Comparison
from peftlab.recipe.keys import known_keys
from peftlab.recipe.schema import AdapterSection, ModelSection, TrainSection
from peftlab.specs import methods
from peftlab.specs.kernels import KERNEL_MODES
from peftlab.specs.losses import LOSSES
from peftlab.specs.methods import METHODS, VARIANTS, variant_of
from peftlab.specs.metrics import CARD_ORDER, METRICS, ROWS, ROWS_OF_ANSWERS, ROWS_OF_ENTITIES, ROWS_OF_TEXTS, family_of
from peftlab.specs.optimizers import OPTIMIZERS, SCHEDULES
from peftlab.specs.peft_methods import COMPUTED, peft_method, peft_method_names
from peftlab.specs.storages import STORAGES
from peftlab.specs.task_spec import TaskSpec
from peftlab.specs.tasks import COLUMNS, KEYS_OF_TASKS, NEEDS, TASK_SPECS, TASKS, spec_of
from peftlab.tasks import FindsClasses, Generates, Redraws, Task, task_class
from peftlab.training import optimizers, schedules


def test_specs_import_neither_the_engine_nor_libraries() -> None:
    program = """
import sys
before = set(sys.modules)
from peftlab.specs import kernels, losses, methods, metrics, optimizers, peft_methods, protocol, storages, tasks
found = {name for name in set(sys.modules) - before if not name.startswith("peftlab.specs")}
print(sorted(name for name in found if name.startswith("peftlab.") or name in ("torch", "numpy", "pydantic")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("rows", [TASKS, METHODS, LOSSES, METRICS, OPTIMIZERS, SCHEDULES, KERNEL_MODES, STORAGES])
def test_rows_are_keyed_by_their_name(rows: dict[str, object]) -> None:
    assert rows and all(getattr(row, "name", None) == name for name, row in rows.items())


@pytest.mark.parametrize("spec", TASK_SPECS, ids=lambda s: " ".join((s.name, *s.chosen_by)))
def test_tasks_implement_what_their_row_names(spec: TaskSpec) -> None:
    implementation = task_class(spec)
    assert implementation.spec is spec and spec_of(spec.name, spec.chosen_by) is spec
    protocols = [Task, *([Generates] if spec.generates else []), *([Redraws] if spec.redraws else [])]
    protocols += [FindsClasses] if spec.classes_from == "rows" else []
    wanted = {
        n
        for p in protocols
        for n, value in vars(p).items()
        if inspect.isfunction(value) or isinstance(value, classmethod)
    }
    assert not {n for n in wanted if not n.startswith("_")} - set(dir(implementation))
    assert spec.predicts in ROWS and (family_of(spec.headline).rows)


def test_keys_of_tasks_are_keys_of_the_recipe() -> None:
    known = {f"{section}.{name}" for section, names in known_keys().items() for name in names}
    assert set(KEYS_OF_TASKS) <= known and set(NEEDS) <= set(KEYS_OF_TASKS)
    assert {f"data.columns.{part}" for part in COLUMNS} <= known


@pytest.mark.parametrize("name", [name for name, spec in METRICS.items() if spec.needs])
def test_metrics_take_what_their_row_says(name: str) -> None:
    metric = modules.load_metric(name)
    assert modules.takes_class_names(metric) <= METRICS[name].of_classes
    assert set(inspect.signature(metric._compute).parameters) - {"self", "class_names"} == set(METRICS[name].needs)
    assert any(
        set(METRICS[name].needs.values()) <= {*t.scores, *t.answer_scores, *t.scores_with_classes} for t in TASK_SPECS
    )


def test_comparison_columns_are_those_that_rows_name() -> None:
    import torch

    for predicts, wanted in ROWS.items():
        if predicts not in ("vectors", "numbers", "boxes"):
            comparison = Comparison(4, predicts=predicts)
            logits = torch.randn(4, 3)
            comparison.add(logits, torch.tensor([0, 1, 2, 0]), torch.arange(4), logits)
            assert comparison.columns().keys() == wanted
    columns_of = [*ROWS.values(), ROWS["spans"] | ROWS_OF_ANSWERS, ROWS_OF_ENTITIES, ROWS_OF_TEXTS]
    assert all(any(set(s.rows) <= columns for columns in columns_of) for s in METRICS.values() if s.rows)
    assert {family_of(name).name for name in CARD_ORDER} <= set(METRICS)


def test_losses_and_their_functions_match() -> None:
    by_kind = {
        kind: {n for n, spec in LOSSES.items() if kind in spec.compares} for kind in ("probabilities", "vectors")
    }
    assert by_kind["probabilities"] == set(ops.DIVERGENCES)
    assert by_kind["vectors"] == set(VECTOR_LOSSES)
    assert {n for n, s in LOSSES.items() if "layers" in s.compares} == {*INNER_HIDDEN, *INNER_ATTENTION, "relation_kl"}


def test_optimizers_and_schedules_are_implemented_and_have_their_keys() -> None:
    assert optimizers.OPTIMIZERS.keys() == OPTIMIZERS.keys()
    assert schedules.SCHEDULES.keys() == SCHEDULES.keys()
    keys = {key for rows in (OPTIMIZERS, SCHEDULES) for row in rows.values() for key in row.keys}
    assert keys <= set(TrainSection.model_fields)


@pytest.mark.parametrize("name", [name for name, spec in METHODS.items() if spec.peft])
def test_methods_name_fields_of_pefts_configuration(name: str) -> None:
    spec = METHODS[name]
    assert spec.peft is not None
    config = getattr(peft, peft_method(spec.peft).config)
    own = {field.name for field in dataclasses.fields(config)} - {
        field.name for field in dataclasses.fields(PeftConfig)
    }
    assert set(peft_method(spec.peft).options) == own
    assert {*spec.keys.values(), *spec.fixed} <= own
    assert {*spec.required, *(set(spec.defaults) - set(spec.keys))} <= set(spec.options)
    assert {*spec.keys, *spec.places} <= set(AdapterSection.model_fields)
    assert peft_method(spec.peft).prompts == issubclass(config, PromptLearningConfig)


def test_methods_are_those_that_peft_registers() -> None:
    registered = {peft_type.value.lower() for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert {spec.peft for spec in METHODS.values() if spec.peft} == registered == set(peft_method_names())


@pytest.mark.parametrize("name", peft_method_names())
def test_peft_method_reads_the_defaults_of_pefts_configuration(name: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name.upper()]])}
    for option in peft_method(name).options.values():
        if option.default is not COMPUTED:
            default = fields[option.name].default
            assert option.default == (None if default is dataclasses.MISSING else default), option.name


def test_peft_method_without_a_row_is_a_method_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_ROWS", [row for row in methods._ROWS if row.name != "vera"])
    spec = methods._methods()["vera"]
    assert spec.adapts and spec.has_rank and spec.default("rank") == 256 and "d_initial" in spec.options
    assert "Vera" in spec.summary or "VeRA" in spec.summary or spec.summary


def test_variant_of_tells_variants_apart_by_settings() -> None:
    for name, (spec, variant) in VARIANTS.items():
        section = AdapterSection(method=spec.name, **variant.settings).model_dump()
        assert variant_of(spec.name, section) == name


def test_kernel_modes_and_storages_match_the_kernels() -> None:
    assert {name for name, mode in KERNEL_MODES.items() if mode.operands} == set(ops.CPU_OPERANDS)
    assert all(mode.storage in (None, *STORAGES) for mode in KERNEL_MODES.values())
    assert {key for spec in STORAGES.values() for key in spec.keys} <= set(ModelSection.model_fields)

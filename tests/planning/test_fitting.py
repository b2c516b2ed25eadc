"""The search for settings that fit: order, effective batch, and the end when nothing fits."""

from __future__ import annotations

from pathlib import Path

from peftlab.assembly import Assembly
from peftlab.planning.fitting import find_fit
from peftlab.planning.memory import MemoryPlan, PhasePlan
from peftlab.planning.stage import Machine
from peftlab.runs import open_source


def assembly_of(folder: Path) -> Assembly:
    (folder / "rows.csv").write_text("text\n" + "a text\n" * 20)
    data = {"train": str(folder / "rows.csv"), "eval_rows": 2, "columns": {"text": "text"}, "max_length": 64}
    train = {"batch_size": 8, "max_steps": 2}
    return Assembly(
        open_source({"task": "causal_lm", "model": {"name": "tiny:llama"}, "data": data, "train": train}, [])[0]
    )


def memory(assembly: Assembly, machine: Machine) -> MemoryPlan:
    """100 bytes a row, a tenth of that with recomputation; weights of 1,000 bytes, 300 in NF4."""
    t = assembly.recipe.train
    activations = (t.batch_size or 0) * (10 if t.gradient_checkpointing else 100)
    return MemoryPlan([PhasePlan("training", {"w": 1000 if assembly.storage == "none" else 300, "a": activations})])


def test_fit_keeps_the_rows_of_a_step(tmp_path: Path) -> None:
    for limit in (1800, 1400, 1200, 1030, 1010, 310):
        found = find_fit(assembly_of(tmp_path), Machine("cuda", limit), memory=memory)
        assert found.fits and found.steps[-1].num_bytes <= limit
        assert found.steps[0].num_bytes > limit or len(found.steps) == 1
        rows = found.changes.get("train.batch_size", 8) * found.changes.get("train.accumulate", 1)
        assert rows == 8
        assert ("model.quantize" in found.changes) == (limit == 310)


def test_fit_says_when_nothing_fits(tmp_path: Path) -> None:
    found = find_fit(assembly_of(tmp_path), Machine("cuda", 100), memory=memory)
    assert not found.fits and found.steps[-1].num_bytes == 310


def test_fit_takes_back_what_the_last_change_makes_needless(tmp_path: Path) -> None:
    found = find_fit(assembly_of(tmp_path), Machine("cuda", 800), memory=memory)
    assert found.changes == {"train.batch_size": 4, "train.accumulate": 2, "model.quantize": "nf4"}


def test_fit_leaves_out_a_merge_that_takes_the_most(tmp_path: Path) -> None:
    def with_merge(assembly: Assembly, machine: Machine) -> MemoryPlan:
        phases = memory(assembly, machine).phases
        return MemoryPlan([*phases, PhasePlan("merge", {"m": 5000})] if assembly.recipe.run.merge != "none" else phases)

    original = assembly_of(tmp_path).derive({"run.merge": "original"})
    found = find_fit(original, Machine("cuda", 1800), memory=with_merge)
    assert found.fits and found.changes == {"run.merge": "none"}


def test_fit_changes_only_what_lowers_the_peak(tmp_path: Path) -> None:
    def of_evaluation(assembly: Assembly, machine: Machine) -> MemoryPlan:
        return MemoryPlan([PhasePlan("evaluation", {"a": assembly.recipe.eval.batch_tokens})])

    original = assembly_of(tmp_path).derive({"eval.batch_tokens": 1024})
    found = find_fit(original, Machine("cuda", 300), memory=of_evaluation)
    assert found.fits and found.changes == {"eval.batch_tokens": 256}
    nothing = find_fit(original, Machine("cuda", 10), memory=of_evaluation)
    assert not nothing.fits and set(nothing.changes) == {"eval.batch_tokens", "model.quantize"}

"""Every adapter method: train, resume, plain PEFT, merge; as docs/adapters.md says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftlab
from peftlab.errors import Interrupted, VerificationError
from peftlab.training.progress import SilentProgress
from tests.family_examples import write_family
from tests.family_table import family_recipe, write_rows
from tests.method_table import COLUMNS, measure_in, read_page, rows
from tests.run_examples import Stopper, contents, recipe, write_data

# One of each kind: a low-rank product, a schedule, rotations, virtual tokens, norms, rows of the embeddings, ours, and one that
# cannot be trained on quantized weights; the others run with the slow tests.
QUICK = {
    ("adalora", "causal_lm", "none"),
    ("bottleneck", "seq_cls", "none"),
    ("ln_tuning", "seq_cls", "none"),
    ("oft", "causal_lm", "nf4"),
    ("p_tuning", "causal_lm", "none"),
    ("trainable_tokens", "causal_lm", "none"),
    ("deft", "causal_lm", "int8"),
    ("xlora", "causal_lm", "none"),
}
ROWS = [pytest.param(*row, marks=() if row in QUICK else pytest.mark.slow, id="-".join(row)) for row in rows()]


@pytest.mark.parametrize(("method", "task", "storage"), ROWS)
def test_method_does_what_the_page_says(method: str, task: str, storage: str, tmp_path: Path) -> None:
    row = measure_in(tmp_path, method, task, storage)
    cells, reason = read_page()[method, task, storage]
    assert [row.cells[column] for column in COLUMNS] == cells, row.line()
    assert row.reason == reason


@pytest.mark.parametrize(
    ("family", "task", "adapter", "num_modules"),
    [
        # Routers and experts are no layers that LoHa can adapt.
        ("MixtralConfig", "causal_lm", {"method": "loha"}, 8),
        # A head of two layers, which PEFT forgets or stumbles over in a merge.
        ("RobertaConfig", "seq_cls", {"method": "vera", "rank": 8}, 12),
        ("RobertaConfig", "seq_cls", {"method": "ln_tuning"}, 5),
        # BatchNorms, whose inputs are images.
        ("ResNetConfig", "image_cls", {"method": "ln_tuning"}, 6),
    ],
)
def test_method_merges_on_other_families(
    family: str, task: str, adapter: dict[str, Any], num_modules: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_family(tmp_path / "model", family, task)
    write_rows(tmp_path)
    run = peftlab.train(family_recipe(task, adapter=adapter), progress=SilentProgress())
    assert run.summary["adapter"]["num_modules"] == num_modules
    report = peftlab.merge("run", progress=SilentProgress())
    assert report["verified"]
    layers = report["targets"]["original"]["layers"]
    assert layers["by_formula"] + layers["by_probes"] == num_modules and layers["unchecked"] == 0


def test_page_has_every_method_and_no_cell_is_no() -> None:
    page = read_page()
    assert list(page) == list(rows())
    for row, (cells, reason) in page.items():
        # BERT's head reads the first position, which is a virtual token of the untrained network.
        allowed = 1 if row[:2] == ("p_tuning", "seq_cls") else 0
        assert sum("no" in cell for cell in cells) == allowed, row
        assert "refused" not in cells or reason, row


@pytest.mark.parametrize(
    "adapter",
    [
        {"init_lora_weights": "pissa"},
        pytest.param({"init_lora_weights": "eva"}, marks=pytest.mark.slow),
        pytest.param({"init_lora_weights": "corda"}, marks=pytest.mark.slow),
        {"init_lora_weights": "lora_ga"},
        {"tokens": ["<a>", "<b>"]},
    ],
    ids=lambda adapter: str(next(iter(adapter.values()))),
)
def test_initialisation_and_new_tokens_resume_to_the_byte(
    adapter: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an initialisation took from the rows and the weights comes from the checkpoint, and not from another start."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    document = recipe() | {"adapter": {"rank": 4, "alpha": 8, **adapter}}
    peftlab.train(document, progress=SilentProgress())
    other = document | {"run": {"dir": "other", "save_every": 2}}
    with pytest.raises(Interrupted):
        peftlab.train(other, progress=Stopper(at=4))
    peftlab.train("other", resume=True, progress=SilentProgress())
    assert contents(Path("other/adapter")) == contents(Path("run/adapter"))


def test_velora_trains_with_a_projection_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's default projection comes from the first batch, and an adapter's files do not have it."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    with pytest.raises(VerificationError, match=r"VeLoRA works with adapter.velora_config=\{init_type: random\}"):
        peftlab.train(recipe() | {"adapter": {"velora_config": {"num_groups": 8}}}, progress=SilentProgress())
    document = recipe() | {"adapter": {"velora_config": {"num_groups": 8, "init_type": "random"}}}
    assert peftlab.train(document, progress=SilentProgress()).summary["reopened"]["kl_mean"] < 1e-9

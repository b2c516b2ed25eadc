"""Step checkpoints: whole or absent, hashed, and refused when damaged."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peftlab.errors import ArtifactError
from peftlab.training import checkpoint as checkpoint_module
from peftlab.training.checkpoint import RngState, check_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from peftlab.training.optimizers import make_optimizer

FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifest.json",
    "optimizer.safetensors",
    "rng.safetensors",
    "state.json",
]


def trained(tiny: Callable[..., Any], steps: int = 2, optimizer_name: str = "adamw", **options: Any) -> tuple[Any, Any]:
    """A model after a few optimizer steps with random gradients."""
    model = tiny("tiny:llama", **options)
    optimizer = make_optimizer(model, optimizer_name, lr=0.01, betas=(0.9, 0.999), weight_decay=0.0)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    return model, optimizer


def save(root: Path, model: Any, optimizer: Any, step: int = 2, keep: int = 9) -> Path:
    state = {"best_step": 1, "best_value": 0.5}
    return save_checkpoint(
        root, step=step, model=model, optimizer=optimizer, rng=RngState.capture(), state=state, keep=keep
    )


def weights(model: Any) -> dict[str, Any]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_checkpoint_restores_everything(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, optimizer = trained(tiny, modules_to_save=["lm_head"])
    folder = save(tmp_path, model, optimizer)
    assert folder.name == "step-00000002"
    assert sorted(p.name for p in folder.iterdir()) == FILES
    draws = (torch.rand(3).tolist(), random.random(), np.random.rand())
    other, fresh = trained(tiny, steps=0, seed=5, modules_to_save=["lm_head"])
    state, rng = load_checkpoint(folder, model=other, optimizer=fresh)
    assert state == {"best_step": 1, "best_value": 0.5, "step": 2}
    for name, value in weights(model).items():
        assert torch.equal(weights(other)[name], value), name
    names = {p: n for n, p in model.named_parameters()}
    saved = {names[p]: values for p, values in optimizer.state.items()}
    for p, values in fresh.state.items():
        name = next(n for n, q in other.named_parameters() if q is p)
        assert all(torch.equal(values[k], saved[name][k]) for k in ("step", "exp_avg", "exp_avg_sq"))
    rng.restore()
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == draws


def test_checkpoint_keeps_the_8_bit_state(tiny: Callable[..., Any], tmp_path: Path) -> None:
    options = {"optimizer_name": "adamw_8bit", "modules_to_save": ["lm_head"]}
    model, optimizer = trained(tiny, **options)
    other, fresh = trained(tiny, steps=0, seed=5, **options)
    load_checkpoint(save(tmp_path, model, optimizer), model=other, optimizer=fresh)
    names = {p: n for n, p in model.named_parameters()}
    saved = {names[p]: values for p, values in optimizer.state.items()}
    assert any("absmax1" in values for values in saved.values()) and any(len(v) == 3 for v in saved.values())
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            values = fresh.state[parameter]
            assert values.keys() == saved[name].keys() and values["step"] == 2
            assert all(torch.equal(values[k], v) for k, v in saved[name].items() if k != "step"), name


def test_checkpoint_equal_states_give_equal_bytes(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, optimizer = trained(tiny)
    rng = RngState.capture()
    for root in ("a", "b"):
        save_checkpoint(tmp_path / root, step=1, model=model, optimizer=optimizer, rng=rng, state={}, keep=1)
    for name in FILES:
        assert (tmp_path / "a/step-00000001" / name).read_bytes() == (tmp_path / "b/step-00000001" / name).read_bytes()


@pytest.mark.parametrize("name", [f for f in FILES if f != "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_checkpoint_damage_is_found_and_the_earlier_one_named(
    tiny: Callable[..., Any], tmp_path: Path, name: str, damage: str
) -> None:
    model, optimizer = trained(tiny, targets=["q_proj"])
    save(tmp_path, model, optimizer, step=1)
    folder = save(tmp_path, model, optimizer, step=2)
    content = bytearray((folder / name).read_bytes())
    if damage == "remove":
        (folder / name).unlink()
    else:
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content if damage == "flip" else content[:-1])
    before = weights(model)
    with pytest.raises(ArtifactError, match=rf"{name}.*step-00000001") as caught:
        load_checkpoint(folder, model=model, optimizer=optimizer)
    assert caught.value.exit_code == 5
    assert all(torch.equal(before[n], w) for n, w in weights(model).items())
    check_checkpoint(tmp_path / "step-00000001")


def test_checkpoint_check_that_skips_the_hash_is_caught(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "_sha256", lambda path: "0")
    with pytest.raises(pytest.fail.Exception):
        test_checkpoint_damage_is_found_and_the_earlier_one_named(tiny, tmp_path, "adapter_model.safetensors", "flip")


def test_checkpoint_with_a_damaged_manifest_is_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, optimizer = trained(tiny, targets=["q_proj"])
    folder = save(tmp_path, model, optimizer)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"no readable manifest\.json.*there is no earlier checkpoint"):
        check_checkpoint(folder)


def test_checkpoint_with_an_empty_manifest_is_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, optimizer = trained(tiny, targets=["q_proj"])
    folder = save(tmp_path, model, optimizer)
    (folder / "manifest.json").write_text("{}")
    (folder / "optimizer.safetensors").unlink()
    with pytest.raises(ArtifactError):
        load_checkpoint(folder, model=model, optimizer=optimizer)


def test_checkpoint_of_other_parameters_is_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    folder = save(tmp_path, *trained(tiny, targets=["q_proj"]))
    model, optimizer = trained(tiny, targets=["q_proj", "v_proj"])
    with pytest.raises(ArtifactError, match="a run with another adapter"):
        load_checkpoint(folder, model=model, optimizer=optimizer)


def test_checkpoint_of_another_rank_is_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    folder = save(tmp_path, *trained(tiny, targets=["q_proj"], rank=4))
    model, optimizer = trained(tiny, targets=["q_proj"], rank=8)
    with pytest.raises(ArtifactError):
        load_checkpoint(folder, model=model, optimizer=optimizer)


def test_checkpoints_are_kept_up_to_the_newest(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, optimizer = trained(tiny, targets=["q_proj"])
    for step in (1, 2, 3, 10, 100):
        save(tmp_path, model, optimizer, step=step, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000100"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


@pytest.mark.parametrize("at", ["_optimizer_tensors", "_sha256", "_publish"])
def test_checkpoint_save_that_fails_leaves_only_the_earlier_one(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    model, optimizer = trained(tiny, targets=["q_proj"])
    save(tmp_path, model, optimizer, step=1, keep=1)

    def fail(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, at, fail)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, model, optimizer, step=2, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_checkpoint_list_ignores_what_a_kill_left_behind(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, optimizer = trained(tiny, targets=["q_proj"])
    save(tmp_path, model, optimizer, step=1)
    (tmp_path / ".partial-00000002-1").mkdir()
    (tmp_path / "step-00000003").mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001"]


def test_checkpoint_saving_a_step_again_replaces_it(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, optimizer = trained(tiny, targets=["q_proj"])
    save(tmp_path, model, optimizer, step=1)
    check_checkpoint(save(tmp_path, model, optimizer, step=1))
    assert len(list_checkpoints(tmp_path)) == 1

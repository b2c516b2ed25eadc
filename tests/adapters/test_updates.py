"""Updates of adapted modules, against PEFT's own merge of the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftlab.adapters.updates import changed_base, read_updates, trained_in_full


class Layers(nn.Module):
    """One of each kind of layer that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.linear = nn.Linear(12, 16)
        self.conv1d = Conv1D(10, 16)
        self.conv = nn.Conv2d(3, 8, (3, 2))
        self.head = nn.Linear(10, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv1d(self.linear(self.embed(ids))))  # type: ignore[no-any-return]


LAYERS = ["embed", "linear", "conv1d", "conv"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(target_modules=LAYERS, r=3, lora_alpha=5),
    "rslora-patterns": lambda: peft.LoraConfig(
        target_modules=LAYERS, r=3, use_rslora=True, rank_pattern={"linear": 2}, alpha_pattern={"conv1d": 7}
    ),
    "wide": lambda: peft.LoraConfig(target_modules=LAYERS, r=24),
    "dora": lambda: peft.LoraConfig(target_modules=LAYERS, r=3, use_dora=True),
    "loha": lambda: peft.LoHaConfig(target_modules=["linear", "conv"], r=3),
    "lokr": lambda: peft.LoKrConfig(target_modules=["linear", "conv"], r=3),
    "vera": lambda: peft.VeraConfig(target_modules=["linear"], r=3),
    "ia3": lambda: peft.IA3Config(target_modules=["linear", "conv1d"], feedforward_modules=[]),
    "oft": lambda: peft.OFTConfig(target_modules=["linear"], oft_block_size=4),
    "hira": lambda: peft.HiraConfig(target_modules=["linear"], r=3),
    "fourier": lambda: peft.FourierFTConfig(target_modules=["linear"], n_frequency=20),
    "miss": lambda: peft.MissConfig(target_modules=["linear"], r=4),
}  # fmt: skip


def adapted(name: str) -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(Layers(), CONFIGS[name]())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def as_matrix(name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight.T if name == "conv1d" else weight.flatten(1)


@pytest.mark.parametrize("name", CONFIGS)
def test_read_updates_gives_what_a_merge_adds(name: str) -> None:
    """A dropped scaling (times 3 / 5) or a Conv1D that is not transposed turns this red."""
    torch.manual_seed(0)
    before = dict(Layers().named_modules())
    model = adapted(name)
    updates = list(read_updates(model))
    merged = dict(copy.deepcopy(model).merge_and_unload().named_modules())
    assert {u.name for u in updates} == set(model.targeted_module_names)
    for update in updates:
        assert update.reason is None
        wanted = as_matrix(update.name, merged[update.name].weight - before[update.name].weight)
        torch.testing.assert_close(update.matrix().float(), wanted, rtol=1e-4, atol=2e-6)
        assert update.shape == wanted.shape
        assert update.weight_norm == pytest.approx(float(before[update.name].weight.norm()))


def test_updates_count_what_the_file_contains() -> None:
    model = adapted("rslora-patterns")
    stored = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert sum(u.num_parameters for u in read_updates(model)) == sum(t.numel() for t in stored.values())
    assert [u.rank for u in read_updates(model)] == [3, 2, 3, 3]


def test_read_updates_says_why_there_is_no_matrix() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    model = peft.get_peft_model(Norms(), peft.LNTuningConfig(target_modules=["norm"]))
    assert [u.reason for u in read_updates(model)] == ["its weight is a vector"]
    biased = peft.get_peft_model(Norms(), peft.LoraConfig(target_modules=["linear"], lora_bias=True))
    assert [u.reason for u in read_updates(biased)] == ["it has a bias of its own (lora_bias)"]


def test_trained_in_full_names_heads_and_tokens() -> None:
    config = peft.LoraConfig(
        target_modules=["linear"], modules_to_save=["head"], trainable_token_indices={"embed": [3, 4]}
    )
    assert trained_in_full(peft.get_peft_model(Layers(), config)) == {"embed (2 rows)": 24, "head": 44}


def test_changed_base_names_initialisations_that_change_the_weights() -> None:
    inits: list[Any] = [True, "gaussian", "pissa", "pissa_niter_4"]
    names = [changed_base(peft.LoraConfig(init_lora_weights=init)) for init in inits]
    assert names == [None, None, "pissa", "pissa_niter_4"]

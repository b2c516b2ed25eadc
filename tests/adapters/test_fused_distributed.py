"""Two gloo processes with fused layers in DDP and FSDP2 get the gradients of one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

RANK = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from peftlab.adapters import inject
from peftlab.adapters.fused import FusedLora, fusion_report

def build():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config)
    model = inject(model, "lora", peft_type="CAUSAL_LM", rank=4, alpha=8, dropout=0.0, targets="all-linear")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()

def gradients(model, whole):
    return {n.removeprefix("module."): whole(p.grad) for n, p in model.named_parameters() if p.requires_grad}

dist.init_process_group("gloo")
ids = torch.arange(2, 50).view(4, 12)
half = ids[2 * dist.get_rank() :][:2]
one = build()
one(input_ids=ids, labels=ids).loss.backward()
want = gradients(one, lambda g: g)

calls = []
right = FusedLora._fused
FusedLora._fused = lambda self, x: (calls.append(type(self.get_base_layer().weight)), right(self, x))[1]
model = build()
if sys.argv[1] == "fsdp2":
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    whole = lambda g: g.full_tensor()
else:
    model = DistributedDataParallel(model)
    whole = lambda g: g
if "checkpointing" in sys.argv:
    inner = getattr(model, "module", model)
    inner.enable_input_require_grads()
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model(input_ids=half, labels=half).loss.backward()
report = fusion_report(getattr(model, "module", model))
assert len(report.fused) == 14 and not report.slow, str(report)
assert len(calls) == 14 * (2 if "checkpointing" in sys.argv else 1), len(calls)
assert set(calls) == {torch.nn.Parameter}, set(calls)
got = gradients(model, whole)
assert got.keys() == want.keys() and len(want) == 28
for name, gradient in want.items():
    assert gradient.any(), name
    error = float((got[name] - gradient).norm() / gradient.norm())
    assert error <= 1e-5, f"{name}: {error:.1e} away from one process"
dist.destroy_process_group()
# The comparison is done. torch's gloo threads sometimes abort the interpreter's exit.
os._exit(0)
"""


@pytest.mark.parametrize("options", [["ddp"], ["fsdp2"], ["fsdp2", "checkpointing"]], ids=" ".join)
def test_fused_layers_in_two_processes_get_the_gradients_of_one(
    process: Any, tmp_path: Path, options: list[str]
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    root = Path(__file__).parents[2]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
    }
    process.run_ranks([script, *options], env=env, timeout=180)

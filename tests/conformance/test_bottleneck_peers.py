"""Our bottlenecks against those of ``adapters`` with equal weights: outputs and gradients, family by family.

Runs in an environment with adapters 1.3.0 (see ``bottleneck_peers``); without it, it is skipped.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from peftlab.adapters.bottleneck import STYLES, BottleneckConfig, add_bottlenecks
from tests.conformance.bottleneck_peers import FAMILIES, SETTINGS, base_of, inputs_of, with_theirs

pytestmark = pytest.mark.peers


def _order(name: str) -> tuple[bool, list[int], bool]:
    """Sorts modules of both sides alike: the encoder first, block by block, the attention before the feed-forward."""
    numbers = [int(part) for part in re.findall(r"\.(\d+)(?=\.)", name)]
    return name.startswith("decoder"), numbers, "att" not in name


def equal_models(family: str, style: Any) -> tuple[Any, Any, list[tuple[Any, Any]]]:
    """Their model and ours with equal weights, and the pairs of the adapters' parameters."""
    peer, base = base_of(family), base_of(family)
    weights = with_theirs(peer, style)
    model = add_bottlenecks(base, BottleneckConfig(style, **SETTINGS[style]))
    theirs = sorted({name.partition("adapters.recorded.")[0] for name in weights}, key=_order)
    ours = sorted(model.bottleneck_layers(), key=lambda layer: _order(f"{layer.place.output}."))
    assert len(ours) == len(theirs)
    pairs = []
    for layer, name in zip(ours, theirs, strict=True):
        adapter: Any = layer.bottleneck["default"]
        for mine, their in ((adapter.down, "adapter_down.0"), (adapter.up, "adapter_up")):
            for key in ("weight", "bias"):
                pairs.append((getattr(mine, key), weights[f"{name}adapters.recorded.{their}.{key}"]))
    for mine, their in pairs:
        mine.data.copy_(their.data)
    return peer, model, pairs


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bottlenecks_equal_those_of_adapters(family: str, style: str) -> None:
    pytest.importorskip("adapters.configuration")  # pytest's path makes tests/adapters importable as `adapters`
    if (family, style) == ("Albert", "houlsby"):
        pytest.skip("adapters 1.3.0 swaps the attention's input and output here: its adapter reads the residual stream")
    peer, model, pairs = equal_models(family, style)
    inputs = inputs_of(peer)
    output, want = model(**inputs)[0], peer(**inputs)[0]
    with model.disable_adapter(), torch.no_grad():
        assert (model(**inputs)[0] - want).abs().max() > 0.05
    # Float32: in post-norm blocks Pfeiffer's style sums in another order. Seen: 1.4e-7, gradients 1.1e-6; all others: 0.
    torch.testing.assert_close(output, want, rtol=0, atol=2e-6)
    probe = torch.randn(want.shape, generator=torch.Generator().manual_seed(3))
    for result in (output, want):
        (result * probe).sum().backward()
    for mine, their in pairs:
        size = float(their.grad.abs().max())
        assert size > 0
        torch.testing.assert_close(mine.grad, their.grad, rtol=0, atol=2e-5 * size)


@pytest.mark.parametrize("style", STYLES)
def test_bottlenecks_drop_what_those_of_adapters_drop(style: str) -> None:
    """In training, with the dropout of BERT: the adapter comes after it on both sides."""
    pytest.importorskip("adapters.configuration")
    peer, model, _ = equal_models("Bert", style)
    outputs = []
    for one in (model, peer):
        one.train()
        torch.manual_seed(0)
        outputs.append(one(**inputs_of(peer))[0])
    model.eval()
    assert (outputs[0] - model(**inputs_of(peer))[0]).abs().max() > 0.05
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-6)

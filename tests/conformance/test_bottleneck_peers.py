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


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bottlenecks_equal_those_of_adapters(family: str, style: str) -> None:
    pytest.importorskip("adapters.configuration")  # pytest's path makes tests/adapters importable as `adapters`
    if (family, style) == ("Albert", "houlsby"):
        pytest.skip("adapters 1.3.0 swaps the attention's input and output here: its adapter reads the residual stream")
    peer, base = base_of(family), base_of(family)
    inputs = inputs_of(base)
    weights = with_theirs(peer, style)
    model: Any = add_bottlenecks(base, BottleneckConfig(style, **SETTINGS[style]))
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
    output, want = model(**inputs)[0], peer(**inputs)[0]
    with model.disable_adapter(), torch.no_grad():
        assert (model(**inputs)[0] - want).abs().max() > 0.05
    # Float32: the sums of the post-norm blocks of Pfeiffer's style are in another order.
    torch.testing.assert_close(output, want, rtol=0, atol=2e-6)
    probe = torch.randn(want.shape, generator=torch.Generator().manual_seed(3))
    for result in (output, want):
        (result * probe).sum().backward()
    for mine, their in pairs:
        size = float(their.grad.abs().max())
        assert size > 0
        torch.testing.assert_close(mine.grad, their.grad, rtol=0, atol=2e-5 * size)

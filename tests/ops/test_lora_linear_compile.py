"""lora_linear as a registered operator and inside one compiled graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peftlab_kernels import runtime
from peftlab_kernels.lora_linear import lora_linear, op
from torch import Tensor

from tests.ops.lora_linear_examples import (
    EACH_BACKEND,
    EACH_DROPOUT,
    EACH_KIND,
    NAMES,
    SCALE,
    SEED,
    problem,
    run,
    weight,
)


@EACH_KIND
@EACH_DROPOUT
@EACH_BACKEND
def test_lora_linear_passes_opcheck(device: torch.device, backend: str, dropout: float, kind: str) -> None:
    case = problem(kind, (9, 50, 33, 4), torch.float32, device, backend=backend, dropout=dropout)
    tensors, name, numbers, threshold = op._pack(case.base)
    rest = (tensors, name, numbers, threshold, SCALE, dropout, backend)
    seed = torch.tensor(SEED) if dropout else None
    leaves = [t.clone().requires_grad_() for t in case.inputs()]
    torch.library.opcheck(torch.ops.peftlab.lora_linear.default, (*leaves, seed, *rest))
    with torch.no_grad():
        _, S, packed = torch.ops.peftlab.lora_linear(*leaves, seed, *rest)
    torch.library.opcheck(
        torch.ops.peftlab.lora_linear_backward.default, (case.grad, *case.inputs()[:3], S, packed, *rest)
    )


# Inductor's CPU code needs a C++ compiler and half a minute for the first graph.
COMPILERS = ["aot_eager"] + (["inductor"] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("compiler", COMPILERS)
@EACH_KIND
@EACH_DROPOUT
@EACH_BACKEND
@pytest.mark.usefixtures("fresh_dynamo")
def test_lora_linear_compiles_into_one_graph(
    device: torch.device, backend: str, dropout: float, kind: str, compiler: str
) -> None:
    """There is one graph, it draws the seed itself, and the results equal those of eager code."""
    case = problem(kind, (10, 50, 33, 4), torch.float32, device)

    def layer(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        seed = runtime.new_seed() if dropout else None
        y = lora_linear(
            2 * x.view(2, 5, 50), case.base, A, B, bias_N=bias, scale=SCALE, dropout=dropout, seed=seed, backend=backend
        )
        return torch.tanh(y).view(10, 33)

    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    results = []
    for function in (layer, compiled):
        torch.manual_seed(0)
        results.append(run(function, case.inputs(), case.grad))
    eager, graph = results
    for name in NAMES:
        torch.testing.assert_close(graph[name], eager[name], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("fresh_dynamo")
def test_lora_linear_compiles_once_for_any_number_of_rows(device: torch.device) -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    base, _ = weight("dense", 33, 50, torch.float32, device)
    compiled = torch.compile(
        lambda x, A, B: lora_linear(x, base, A, B, scale=SCALE, backend="torch"), fullgraph=True, dynamic=True,
        backend=counting,
    )  # fmt: skip
    for M in (3, 7, 20):
        case = problem("dense", (M, 50, 33, 4), torch.float32, device)
        want = lora_linear(case.x, base, case.A, case.B, scale=SCALE, backend="torch")
        torch.testing.assert_close(compiled(case.x, case.A, case.B), want, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1

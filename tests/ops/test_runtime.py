"""Whether Triton can run, on which device a kernel is launched, and seeds. A fake GPU stands for a real one."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peftlab_kernels import runtime
from peftlab_kernels.lora_linear import plan
from torch import Tensor

from peftlab import ops

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(runtime, "_probes", {})
    runtime._unfit.cache_clear()
    yield
    runtime._unfit.cache_clear()


def made_up_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *, sums: Any = None) -> list[Any]:
    """A GPU whose probe gives ``sums``, or raises it; the list gets the device of each probe."""
    probed: list[Any] = []

    def row_sums(x: Tensor) -> Tensor:
        probed.append(x.device)
        if isinstance(sums, Exception):
            raise sums
        return x.sum(1) if sums is None else x.sum(1) + sums

    arange = torch.arange
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "arange", lambda *args, device=None, **kw: arange(*args, **kw))
    monkeypatch.setitem(sys.modules, "peftlab_kernels.probe", SimpleNamespace(row_sums=row_sums))
    return probed


def test_probe_runs_once_before_any_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    probed = made_up_gpu(monkeypatch, (9, 0))
    assert runtime.triton_problem(CUDA, products=True) is None
    assert runtime.triton_problem("cuda", products=False) is None
    assert len(probed) == 1


@pytest.mark.parametrize(
    ("sums", "reason"),
    [
        (
            RuntimeError("Failed to find C compiler. Please specify via CC\nmore"),
            "RuntimeError: Failed to find C compiler",
        ),
        (OSError(), "first kernel failed: OSError"),
        (1.0, "gave a wrong result"),
    ],
)
def test_failed_probe_selects_pytorch(monkeypatch: pytest.MonkeyPatch, sums: Any, reason: str) -> None:
    probed = made_up_gpu(monkeypatch, (8, 9), sums=sums)
    for products in (True, False):
        problem = runtime.triton_problem(CUDA, products=products)
        assert problem is not None and reason in problem and "\n" not in problem
        assert runtime.choose_backend("auto", _on_cuda(), products=products) == "torch"
    with pytest.raises(ValueError, match="backend triton cannot run: Triton's first kernel"):
        runtime.choose_backend("triton", _on_cuda(), products=False)
    assert len(probed) == 1, "the reason is remembered"
    note = ops.kernels_note("cuda")
    assert note is not None and note.startswith("the kernels run in PyTorch, slower: ") and reason in note
    assert {path for path, _ in ops.kernel_paths("cuda").values()} == {"PyTorch, fused"}


def test_probe_out_of_memory_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    probed = made_up_gpu(monkeypatch, (9, 0), sums=torch.OutOfMemoryError("CUDA out of memory"))
    for _ in range(2):
        assert runtime.triton_problem(CUDA, products=True) is None
    assert len(probed) == 2, "asked again"


def test_probe_does_not_run_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the probe's result would end the capture."""
    probed = made_up_gpu(monkeypatch, (9, 0), sums=1.0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert runtime.triton_problem(CUDA, products=True) is None and not probed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert "wrong result" in str(runtime.triton_problem(CUDA, products=True))


def test_probe_runs_outside_of_fake_tensor_mode(process: Any) -> None:
    code = (
        "import torch; from peftlab_kernels import runtime; from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "with FakeTensorMode(): print(runtime._probed(torch.device('cpu')))"
    )
    assert _interpreted(process, code) == "None"


def _interpreted(process: Any, code: str) -> str:
    """What a program prints in its own process, in Triton's interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "TRITON_INTERPRET": "1"}
    return str(process.run(["-c", code], env=environment, check=True).stdout.strip())


def _on_cuda() -> Any:
    return SimpleNamespace(is_cuda=True, device=CUDA, dtype=torch.float16)


def test_products_need_matrix_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """On sm_75 kernels with products spill, so PyTorch does the products. Dequantization and losses run on Triton."""
    made_up_gpu(monkeypatch, (7, 5))
    assert runtime.choose_backend("auto", _on_cuda(), products=False) == "triton"
    assert runtime.choose_backend("auto", _on_cuda(), products=True) == "torch"
    with pytest.raises(ValueError, match=r"compute capability 7\.5, and 8\.0 is needed for matrix products"):
        runtime.choose_backend("triton", _on_cuda(), products=True)
    paths = ops.kernel_paths("cuda")
    assert {name for name, (path, _) in paths.items() if path != "Triton"} == {"lora_linear"}
    note = ops.kernels_note("cuda")
    assert note is not None and note.startswith("the adapter's products run in PyTorch, slower: the GPU has compute")


def test_gpu_that_is_too_old_gets_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    probed = made_up_gpu(monkeypatch, (7, 0))
    assert runtime.choose_backend("auto", _on_cuda(), products=False) == "torch"
    assert "7.0, and 7.5 is needed" in str(ops.kernels_note("cuda")) and not probed


def test_triton_problem_is_decided_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: [(9, 0), (7, 0)][index or 0])
    assert runtime.triton_problem(torch.device("cuda", 0), products=True) is None
    assert runtime.triton_problem(torch.device("cuda", 1), products=True) is not None


def test_kernels_note_is_none_without_a_gpu() -> None:
    assert ops.kernels_note("cpu") is None


class _Kernel:
    """Notes its options and which device is current when it is launched."""

    def __init__(self, current: list[int]) -> None:
        self.current, self.launches = current, []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.launches.append((self.current[-1], grid, args, options))


def test_launch_uses_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    kernel = _Kernel(current)
    runtime.launch(kernel, (7,), SimpleNamespace(device=torch.device("cuda", 1)), 5, BLOCK=16)
    ((used, grid, args, options),) = kernel.launches
    assert (used, grid, args[1:], options) == (1, (7,), (5,), {"BLOCK": 16}) and current == [0]


@pytest.mark.parametrize(("hip", "there"), [(None, True), ("6.4", False)])
def test_launch_drops_an_option_that_amds_backend_does_not_know(
    monkeypatch: pytest.MonkeyPatch, hip: Any, there: bool
) -> None:
    from peftlab_kernels.linear_cross_entropy.op import rows_options

    monkeypatch.setattr(torch.version, "hip", hip)
    kernel = _Kernel([0])
    runtime.launch(kernel, (1,), torch.zeros(1), **rows_options(1000))
    assert ("maxnreg" in kernel.launches[0][3]) == there


def test_launch_options_are_known_to_amds_backend() -> None:
    import dataclasses

    from peftlab_kernels.linear_cross_entropy.op import rows_options
    from peftlab_kernels.lora_linear import passes
    from peftlab_kernels.nf4_dequant.op import dequant_options, merge_options
    from triton.backends.amd.compiler import HIPOptions

    known = {field.name for field in dataclasses.fields(HIPOptions)}
    makers = (passes.down_options, passes.up_options, passes.down_backward_options, passes.dropout_dx_options)
    used = [maker(16, torch.float16) for maker in makers]
    used += [passes.mask_options(), dequant_options(64), merge_options(64, 16, 64, torch.float16), rows_options(1000)]
    launch = {name for options in used for name in options if not name.isupper()}
    assert launch - known == {"maxnreg"}


def test_launches_all_go_through_runtime() -> None:
    """``kernel[grid](...)`` anywhere else would use the current device, not that of the tensors."""
    for path in (ROOT / "kernels" / "peftlab_kernels").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]
        launches = [n for n in calls if "kernel" in ast.unparse(n.func.value)]
        assert len(launches) == (path.name == "runtime.py"), f"{path}: {[ast.unparse(n) for n in launches]}"


def test_probe_runs_in_the_interpreter(process: Any) -> None:
    code = (
        "import torch; from peftlab_kernels import runtime\n"
        "assert runtime._probed(torch.device('cpu')) is None\n"
        "from peftlab_kernels import probe; probe.row_sums = lambda x: x.sum(0)\n"
        "runtime._probes.clear(); print(runtime._probed(torch.device('cpu')))"
    )
    assert _interpreted(process, code) == "Triton's first kernel gave a wrong result"


def test_new_seed_stays_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number from the host would be part of a CUDA graph: each replay would draw the same mask."""
    asked: list[Any] = []
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, device, **kw: (asked.append(device), randint(*a, **kw))[1])
    for device in ("cuda:1", torch.device("cuda"), "cpu", "meta"):
        runtime.new_seed(device)
    assert asked == ["cuda:1", torch.device("cuda"), "cpu", "cpu"]


@pytest.mark.parametrize(
    ("device", "kind", "dropout", "want"),
    [
        ("sm_90", "int8", False, ("merged", "merged")),
        ("sm_90", "int8", True, ("split", "split")),
        ("sm_100", "int8", False, ("merged", "merged")),
        ("sm_89", "int8", False, ("library", "merged")),
        ("sm_120", "int8", True, ("library", "split")),
        ("sm_90", "nf4", False, ("merged", "merged")),
        ("sm_90", "dense", False, ("split", "split")),
    ],
)
def test_plan_rule_by_device_and_storage(device: str, kind: str, dropout: bool, want: tuple[str, str]) -> None:
    chosen = plan.rule(device, kind, M=2048, N=4096, K=4096, dropout=dropout)
    assert (chosen.forward, chosen.backward) == want


def test_plan_rule_of_pytorch_on_a_gpu_does_not_merge() -> None:
    """PyTorch would make float32 copies of the weight."""
    for kind in ("nf4", "int8"):
        assert plan.rule("sm_75", kind, M=2048, N=4096, K=4096, dropout=False, backend="torch").backward == "split"

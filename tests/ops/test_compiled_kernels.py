"""Every Triton kernel compiled for sm_80, sm_89, sm_90 and sm_120 on this machine: no spills, shared memory, matrix unit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need Triton, which exists for Linux alone")

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMIT_KIB = {80: 163, 89: 99, 90: 227, 120: 99}
Row = dict[str, Any]


def _compile(folder: Path, *arguments: str) -> tuple[int, list[Row]]:
    """(exit code, one row a case). The interpreter, which other tests run kernels in, must not be on."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    command = [
        sys.executable,
        str(ROOT / "bench" / "compile_kernels.py"),
        "--json",
        str(folder / "rows.json"),
        *arguments,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (folder / "rows.json").exists(), done.stdout + done.stderr
    return done.returncode, json.loads((folder / "rows.json").read_text(encoding="utf-8"))["cases"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[Row]]:
    """Takes 8 s on two idle cores, 45 s where other work shares them."""
    return _compile(tmp_path_factory.mktemp("compiled"), "--quick")


def test_every_case_is_as_it_should_be(compiled: tuple[int, list[Row]]) -> None:
    code, rows = compiled
    assert [row for row in rows if row["problems"]] == []
    assert code == 0


def test_no_spills_and_shared_memory_within_the_limit(compiled: tuple[int, list[Row]]) -> None:
    for row in compiled[1]:
        assert row["spill_bytes"] == 0, row
        assert 0 < row["registers"] <= 255, row
        assert row["shared_bytes"] <= SHARED_LIMIT_KIB[row["arch"]] * 1024, row


def test_products_run_on_the_matrix_unit(compiled: tuple[int, list[Row]]) -> None:
    for row in compiled[1]:
        unit = ("wgmma" if row["arch"] == 90 else "mma.sync") if row["matrix"] else ""
        assert row["matrix_unit"] == unit, row


def test_every_kernel_is_compiled_for_every_architecture(compiled: tuple[int, list[Row]]) -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("peftlab_kernels/*/kernel.py")]
    kernels = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, flags=re.MULTILINE)}
    assert kernels
    found = {(row["kernel"], row["dtype"], row["arch"]) for row in compiled[1]}
    expected = {("bf16", arch) for arch in SHARED_LIMIT_KIB} | {("fp16", 90)}
    assert found == {(kernel, dtype, arch) for kernel in kernels for dtype, arch in expected}


@pytest.mark.parametrize(
    ("only", "change", "problem"),
    [
        pytest.param("nf4_merge_kernel nested$", "BLOCK_N=512", "spills", id="too-large-a-tile"),
        pytest.param("up_backward", "num_stages=14", "of shared memory", id="too-many-stages"),
        pytest.param("down_backward_kernel no", "BLOCK_K=32", "expected wgmma", id="too-low-for-wgmma"),
        pytest.param("dropout_dx", "BLOCK_K=48", "does not compile", id="no-power-of-two"),
    ],
)
def test_a_bad_case_is_reported(tmp_path: Path, only: str, change: str, problem: str) -> None:
    code, rows = _compile(tmp_path, "--quick", "--arch", "90", "--only", only, "--set", change)
    assert code == 1
    assert len(rows) == 2  # bf16 and fp16
    assert all(problem in " ".join(row["problems"]) for row in rows), rows

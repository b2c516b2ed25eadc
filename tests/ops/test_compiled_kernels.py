"""Every Triton kernel compiled without a GPU: spills, shared memory, matrix unit, and the order of reads and writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton", reason="the kernels need Triton, which exists for Linux alone")

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels" / "peftlab_kernels"
SHARED_LIMIT_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
MATRIX_UNIT = {90: "wgmma", 100: "tcgen05", 103: "tcgen05"}
# The least shared memory for products, and another matrix unit. The slow ones: no products, and the third matrix unit.
FAST_ARCHS, SLOW_ARCHS = (89, 90), (75, 100)
FAST = pytest.mark.parametrize("compiled", [FAST_ARCHS], indirect=True)
EACH = pytest.mark.parametrize(
    "compiled", [FAST_ARCHS, pytest.param(SLOW_ARCHS, marks=pytest.mark.slow)], indirect=True
)
Row = dict[str, Any]


def _environment(folder: Path) -> dict[str, str]:
    """The interpreter, which other tests use, must be off."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    return environment


def _compile(folder: Path, *arguments: str, timeout_s: float = 300) -> tuple[int, list[Row]]:
    """(exit code, one row per case)."""
    command = [
        sys.executable,
        "-m",
        "bench.compile_kernels",
        "--json",
        str(folder / "rows.json"),
        *arguments,
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(folder), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert (folder / "rows.json").exists(), done.stdout + done.stderr
    return done.returncode, json.loads((folder / "rows.json").read_text(encoding="utf-8"))["cases"]


class Compiled(NamedTuple):
    code: int
    rows: list[Row]
    archs: tuple[int, ...]
    folder: Path  # the PTX of every case


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The quick cases of two architectures. They take twenty seconds of processor time on a busy machine."""
    folder = tmp_path_factory.mktemp("compiled")
    archs = [word for arch in request.param for word in ("--arch", str(arch))]
    return Compiled(*_compile(folder, "--quick", *archs, "--ptx", str(folder)), request.param, folder)


def _as_it_should_be(code: int, rows: list[Row]) -> None:
    assert [row for row in rows if row["problems"]] == []
    assert code == 0
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert 0 < row["registers"] <= 255, row
        assert row["shared_bytes"] <= SHARED_LIMIT_KIB[row["arch"]] * 1024, row
        if not row["matrix"]:
            assert row["matrix_unit"] == "", row
        elif row["dtype"] != "fp32":
            assert row["matrix_unit"] == MATRIX_UNIT.get(row["arch"], "mma.sync"), row


@EACH
def test_compiled_kernels_spill_nothing_and_use_the_matrix_unit(compiled: Compiled) -> None:
    _as_it_should_be(compiled.code, compiled.rows)


@pytest.mark.slow
def test_compiled_kernels_of_every_case_and_architecture(tmp_path: Path) -> None:
    """The test takes ten minutes on two idle cores."""
    code, rows = _compile(tmp_path, timeout_s=3600)
    _as_it_should_be(code, rows)
    assert {row["arch"] for row in rows} == set(SHARED_LIMIT_KIB)


@EACH
def test_compiled_kernels_cover_every_kernel_and_architecture(compiled: Compiled) -> None:
    """sm_75 has no matrix instructions of 16 columns, so PyTorch does the products there."""
    sources = [path.read_text(encoding="utf-8") for path in KERNELS.glob("*/kernel.py")]
    kernels = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, flags=re.MULTILINE)}
    assert kernels
    seen = {(row["kernel"], row["dtype"], row["arch"]) for row in compiled.rows}
    # Of int8_dequant_kernel one variant has a product and one has none.
    without = {row["kernel"] for row in compiled.rows if not row["matrix"]}
    assert without == kernels - {name for name in kernels if "merge" in name or re.search("_(down|backward|dx)_", name)}
    expected = {
        (kernel, "bf16", arch) for kernel in kernels for arch in compiled.archs if arch >= 80 or kernel in without
    }
    assert seen == expected | {(kernel, "fp16", 90) for kernel in kernels if 90 in compiled.archs}


def _instructions(ptx: str, source: Path) -> list[tuple[int, str]]:
    """(line of ``source`` or 0, instruction), in the order of the code."""
    number = next(int(n) for n, name in re.findall(r'\.file\s+(\d+) "([^"]+)"', ptx) if name.endswith(str(source)))
    instructions, line = [], 0
    for text in ptx.splitlines():
        if match := re.match(r"\s*\.loc\s+(\d+) (\d+)", text):
            # Code inlined from a jit function of another file belongs to the call.
            line = int(match[2]) if int(match[1]) == number else 0
        else:
            instructions.append((line, text.strip()))
    return instructions


def _unordered_reads(ptx: str, op: str) -> list[str]:
    """Loads of single logits without a barrier before the first store over the row. Another thread may have overwritten
    them."""
    source = KERNELS / op / "kernel.py"
    lines = source.read_text(encoding="utf-8").splitlines()
    single = {n for n, text in enumerate(lines, 1) if re.search(r"tl\.load\(z_ptr \+ (target|ids)\b", text)}
    in_place = {n for n, text in enumerate(lines, 1) if re.search(r"tl\.store\(z_ptr \+", text)}
    assert single and in_place
    code = _instructions(ptx, Path(op) / "kernel.py")
    reads = [at for at, (line, text) in enumerate(code) if line in single and "ld.global" in text]
    writes = [at for at, (line, text) in enumerate(code) if line in in_place and "st.global" in text]
    barriers = [at for at, (_, text) in enumerate(code) if text.startswith(("bar.sync", "barrier.sync"))]
    assert reads and writes
    first = min(writes)
    return [code[at][1] for at in reads if not any(at < barrier < first for barrier in barriers)]


@EACH
def test_loss_kernels_read_no_logit_after_gradients_are_written(compiled: Compiled) -> None:
    files = list(compiled.folder.glob("*rows_kernel*.ptx"))
    # Two of the losses in fp16 too, on sm_90: (1 + 6 + 3) kernels.
    assert len(files) == 10 * (len(compiled.archs) + (90 in compiled.archs))
    for path in files:
        op = "linear_cross_entropy" if path.name.startswith("cross_entropy") else "linear_kl"
        assert _unordered_reads(path.read_text(), op) == [], path.name


@FAST
def test_unordered_reads_finds_a_read_without_barriers(compiled: Compiled) -> None:
    """The deliberate fault: the barriers between read and write are removed."""
    ptx = (compiled.folder / "divergence_rows_kernel-forward_kl-bf16-bf16-16-sm_90.ptx").read_text()
    assert _unordered_reads(re.sub(r"^\s*bar(rier)?\.sync.*$", "", ptx, flags=re.MULTILINE), "linear_kl")


@FAST
def test_merge_kernels_load_codes_before_the_first_wait(compiled: Compiled) -> None:
    """The codes of aligned weights fit into registers: packed bytes and scales are loaded before the first wait for a
    product."""
    for variant in ("nested", "flat"):
        ptx = (compiled.folder / f"nf4_merge_kernel-{variant}-bf16-fp32-16-sm_90.ptx").read_text()
        code = _instructions(ptx, Path("nf4_dequant") / "kernel.py")
        lines = (KERNELS / "nf4_dequant" / "kernel.py").read_text(encoding="utf-8").splitlines()
        packed = {n for n, text in enumerate(lines, 1) if "tl.load(packed_ptr + n" in text}
        loads = [at for at, (line, text) in enumerate(code) if line in packed and "ld.global" in text]
        wait = next(at for at, (_, text) in enumerate(code) if "wgmma.wait_group" in text)
        assert loads and max(loads) < wait


def test_compile_kernels_reports_a_bad_case(tmp_path: Path) -> None:
    code, rows = _compile(tmp_path, "--quick", "--arch", "90", "--only", "up_backward", "--set", "num_stages=14")
    assert code == 1
    assert len(rows) == 2  # bf16 and fp16
    assert all("of shared memory" in " ".join(row["problems"]) for row in rows), rows


BAD = {
    "nf4_merge_kernel nested$": ("BLOCK_N=512", "spills"),
    "down_backward_kernel no": ("BLOCK_K=32", "expected wgmma"),
    "dropout_dx": ("BLOCK_K=48", "does not compile"),
}
# Cases in one process, and the problems of each in bf16 on sm_90.
COMPILE_BAD = """
import json, sys
from bench.compile_kernels import compile_case, jobs
for only, (change, _) in json.loads(sys.argv[1]).items():
    (case,) = (job for job in jobs(quick=True, only=only, archs=[90]) if job[1] == "bf16")
    name, value = change.split("=")
    print(json.dumps([only, compile_case(*case, {name: int(value)}, None)["problems"]]), flush=True)
"""


def test_compile_kernels_finds_every_kind_of_problem(tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMPILE_BAD, json.dumps(BAD)]
    printed = subprocess.run(
        command, cwd=ROOT, env=_environment(tmp_path), capture_output=True, text=True, timeout=300, check=True
    ).stdout
    problems = dict(json.loads(line) for line in printed.splitlines() if line.startswith("["))
    assert problems.keys() == BAD.keys()
    for only, (_, problem) in BAD.items():
        assert problem in " ".join(problems[only]), (only, problems[only])

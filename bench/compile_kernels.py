"""Compiles every Triton kernel for every supported GPU, without a GPU, and checks the result.

    python -m bench.compile_kernels [--json FILE] [--table] [--quick] [--arch 90] [--only REGEX] [--set BLOCK_M=128]
                                    [--ptx FOLDER]

Each op's cases.py (peftlab_kernels/cases.py) lists what to compile. Triton ships ptxas. A case has a problem if a kernel does not
compile, spills registers, needs more shared memory than a block may have, or computes a product of 16-bit matrices outside the
matrix unit. sm_75 gets only the kernels without products.
``--table`` rewrites the tables in the READMEs of the ops. Exit codes: 0 no problems, 1 at least one problem, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peftlab_kernels import runtime
from peftlab_kernels.cases import Compiled, gathered

from bench import ROOT

FOLDER = ROOT / "kernels" / "peftlab_kernels"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANKS = (8, 16, 64)
# Shared memory that one block may have, by architecture (CUDA programming guide, technical specifications per compute capability).
SHARED_LIMIT_BYTES = {
    arch: kib * 1024
    for arch, kib in {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}.items()
}
# Instructions of the matrix unit; the default is mma.sync.
MATRIX_UNIT = {90: "wgmma", 100: "tcgen05", 103: "tcgen05"}
LAUNCH_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")

Row = dict[str, Any]


def ways() -> list[tuple[str, Compiled]]:
    """Every op with each way in which it launches a kernel."""
    return [(op, way) for op, ways in gathered("COMPILED").items() for way in ways]


def jobs(*, quick: bool, only: str, archs: list[int]) -> list[tuple[int, str, str, int, int]]:
    """(index of the case, type, type of the factors, rank, architecture)."""
    return [
        (number, dtype, factors, rank, arch)
        for number, (op, case) in enumerate(ways())
        if re.search(only, f"{op} {case.kernel} {case.variant}")
        for dtype in DTYPES
        for factors in ((dtype, "fp32") if case.wide and dtype != "fp32" else (dtype,))
        for rank in (RANKS if case.matrix else (16,))
        for arch in archs
        if divmod(arch, 10) >= runtime.MIN_CAPABILITY[case.matrix]
        if not quick
        or (rank == 16 and (factors == "fp32") == case.wide and (dtype == "bf16" or (dtype == "fp16" and arch == 90)))
    ]


def compile_case(
    number: int, dtype: str, factors: str, rank: int, arch: int, changes: dict[str, int], ptx: Path | None
) -> Row:
    """The compiler's result for a case; ``problems`` is empty if all is well. ptx: folder for the code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    op, case = ways()[number]
    kernel = getattr(importlib.import_module(f"peftlab_kernels.{op}.kernel"), case.kernel)
    values = case.values(DTYPES[dtype], rank)
    if "DOT" in kernel.arg_names:
        values["DOT"] = runtime.dot_dtype(DTYPES[dtype])
    values.update({name: value for name, value in changes.items() if name in values})
    options = {name: values.pop(name) for name in LAUNCH_OPTIONS if name in values}
    words = {"T": dtype, "A": factors, "R": "i16" if rank % 16 == 0 else "i32"}
    types = [re.sub("[TAR]", lambda m: words[m[0]], word) for word in case.signature.split()]
    arguments = dict(zip([name for name in kernel.arg_names if name not in values], types, strict=True))
    aligned = [name for name, t in arguments.items() if t == "i16" or t.startswith("*")]  # as torch allocates memory
    source = ASTSource(
        kernel,
        {name: t.replace("i16", "i32") for name, t in arguments.items()} | dict.fromkeys(values, "constexpr"),
        values,
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    row: Row = {
        "op": op, "kernel": case.kernel, "variant": case.variant, "matrix": case.matrix, "dtype": dtype,
        "factors": factors, "rank": rank if case.matrix else None, "arch": arch,
    }  # fmt: skip
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # a kernel from the cache has no log
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # of any kind: the other cases must still be compiled
        last_line = str(error).strip().rpartition("\n")[2]
        return {**row, "problems": [f"does not compile: {type(error).__name__}: {last_line}"]}
    if ptx is not None:
        parts = [case.kernel, case.variant, dtype, factors, str(rank), f"sm_{arch}"]
        (ptx / f"{' '.join(filter(None, parts)).replace(' ', '-')}.ptx").write_text(compiled.asm["ptx"])
    row |= {
        "num_warps": compiled.metadata.num_warps,
        "registers": _logged(log.getvalue(), r"Used (\d+) registers"),
        "spill_bytes": _logged(log.getvalue(), r"(\d+) bytes spill"),
        "shared_bytes": compiled.metadata.shared,
        "matrix_unit": _matrix_unit(compiled),
    }
    return {**row, "problems": _problems(row)}


def _logged(log: str, pattern: str) -> int:
    """The sum of a number that must occur in the log of ptxas."""
    counts = re.findall(pattern, log)
    assert counts, f"no {pattern!r} in the log of ptxas:\n{log}"
    return sum(map(int, counts))


def _matrix_unit(compiled: Any) -> str:
    """The instruction of the products; fma: the ordinary units."""
    units = [unit for unit in ("tcgen05", "wgmma", "mma.sync") if f"{unit}." in compiled.asm["ptx"]]
    if re.search(r"= tt\.dot .*-> tensor<[^>]*#(?!mma)", compiled.asm["ttgir"]):
        units.append("fma")
    return " and ".join(units)


def _problems(row: Row) -> list[str]:
    problems, limit = [], SHARED_LIMIT_BYTES[row["arch"]]
    if row["spill_bytes"]:
        problems.append(f"spills {row['spill_bytes']} bytes")
    if row["shared_bytes"] > limit:
        problems.append(f"needs {row['shared_bytes']} bytes of shared memory, but a block may have {limit}")
    expected = MATRIX_UNIT.get(row["arch"], "mma.sync")
    if row["matrix"] and row["dtype"] != "fp32" and row["matrix_unit"] != expected:
        problems.append(f"expected {expected}, found {row['matrix_unit'] or 'no product'}")
    return problems


def table(rows: list[Row]) -> str:
    """Registers per thread / KiB of shared memory per block, one column per architecture."""
    archs = list(SHARED_LIMIT_BYTES)
    heads = ["kernel", "type", "rank", "warps", *(f"sm_{arch}" for arch in archs)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    names = ("kernel", "variant", "dtype", "factors", "rank")
    for (kernel, variant, dtype, factors, rank), group in groupby(rows, key=lambda row: [row[name] for name in names]):
        of_arch = {row["arch"]: row for row in group}
        warps = str(next(iter(of_arch.values())).get("num_warps", ""))
        kernel = f"`{kernel}`" + (f" {variant}" if variant else "")
        dtype += f", {factors} factors" if factors != dtype else ""
        cells = [_cell(of_arch[arch]) if arch in of_arch else "" for arch in archs]
        lines.append(f"| {' | '.join([kernel, dtype, str(rank or ''), warps, *cells])} |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if row["problems"]:
        return "**" + "; ".join(row["problems"]).replace("|", "/") + "**"
    return f"{row['registers']} / {row['shared_bytes'] / 1024:.0f}"


def rewrite_readme(op: str, rows: list[Row], versions: str) -> None:
    """Writes the part between the markers. It shows only bf16: fp16 differs in the names of the instructions only."""
    path = FOLDER / op / "README.md"
    if not path.exists():
        path.write_text(f"# {op}\n\n<!-- compiled -->\n<!-- /compiled -->\n", encoding="utf-8")
    bad = sum(bool(row["problems"]) for row in rows)
    text = table([row for row in rows if row["dtype"] == "bf16" and row["rank"] != 8])
    units = "mma.sync, on sm_90 wgmma and on sm_100 and sm_103 tcgen05"
    text += "\n\nRegisters a thread / KiB of shared memory a block." + (
        f" Products run on the matrix unit ({units}); on sm_75, which has no such instructions, PyTorch does them.\n"
        if any(row["matrix"] for row in rows)
        else "\n"
    )
    text += f"{len(rows)} compilations (with fp16, fp32 and rank 8), {bad} with problems; {versions}.\n"
    pattern, old = "(?s)(<!-- compiled -->\n).*(<!-- /compiled -->)", path.read_text(encoding="utf-8")
    new, num_blocks = re.subn(pattern, lambda m: m[1] + text + m[2], old)
    assert num_blocks == 1, f"{path} lacks the lines <!-- compiled --> and <!-- /compiled -->"
    path.write_text(new, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write one row per case to this file")
    parser.add_argument("--table", action="store_true", help="rewrite the tables in the READMEs of the ops")
    parser.add_argument(
        "--quick", action="store_true", help="only rank 16, bf16 (on sm_90 also fp16) and one type of factors"
    )
    parser.add_argument("--arch", type=int, choices=SHARED_LIMIT_BYTES, action="append", help="only this architecture")
    parser.add_argument("--only", default="", help="cases whose op, kernel and variant match this expression")
    parser.add_argument("--ptx", type=Path, help="write the PTX of each case into this existing folder")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=INT", help="instead of the op's own value")
    arguments = parser.parse_args()
    changes = {name: int(value) for name, value in (change.split("=") for change in arguments.set)}
    if arguments.table and (arguments.quick or arguments.arch or arguments.only or changes):
        parser.error("--table needs all cases with the ops' own values")
    if (
        "TRITON_INTERPRET" in os.environ
    ):  # Triton reads it when a kernel is defined; with the interpreter there is nothing to compile
        del os.environ["TRITON_INTERPRET"]
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    work = jobs(quick=arguments.quick, only=arguments.only, archs=arguments.arch or list(SHARED_LIMIT_BYTES))
    if not work:
        parser.error(f"no case matches {arguments.only!r}")
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        with ProcessPoolExecutor() as pool:
            rest = [changes] * len(work), [arguments.ptx] * len(work)
            rows = list(pool.map(compile_case, *zip(*work, strict=True), *rest))
    import triton

    nvidia = triton.knobs.nvidia  # from sm_100 on Triton uses another ptxas
    versions = f"Triton {triton.__version__}, ptxas {nvidia.ptxas.version} and {nvidia.ptxas_blackwell.version}"
    for op, group in groupby(rows, key=lambda row: str(row["op"])):
        of_op = list(group)
        print(f"\n## {op}\n\n{table(of_op)}")
        if arguments.table:
            rewrite_readme(op, of_op, versions)
    bad = sum(bool(row["problems"]) for row in rows)
    print(f"\n{len(rows)} compilations, {bad} with problems; {versions}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"versions": versions, "cases": rows}, indent=1) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

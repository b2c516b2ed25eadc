"""Runs PEFT's own tests of its LoRA layers twice, with its layers and with the fused ones, and compares.

    git clone --branch v0.21.2 https://github.com/huggingface/peft
    python bench/peft_suite.py peft [TEST_FILE ...] [--json FILE]

The tests are read from that checkout and never copied. Its versions need not match the installed PEFT exactly: what
counts is that no test fails with the fused layers that passes without them. Tests that need a model hub fail on both
sides where there is none. PEFT's tests import diffusers and parameterized.

Exit codes: 0 no test got worse, 1 at least one did, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("test_custom_models.py",)
# Loaded by pytest in both runs: of tests that go through all methods, those of LoRA.
SELECTION = """
def pytest_collection_modifyitems(config, items):
    def is_lora(item):
        method = getattr(item, "callspec", None) and item.callspec.params.get("config_cls")
        return method.__name__ == "LoraConfig" if method else "lora" in item.nodeid.lower()
    config.hook.pytest_deselected(items=[item for item in items if not is_lora(item)])
    items[:] = [item for item in items if is_lora(item)]
"""
# And in the second run: every LoraConfig enters the fused layers.
FUSED = """
from peft import LoraConfig
from peftlab.adapters.fused import FusedLora, register
right, fused_calls = LoraConfig.__post_init__, []
def with_fused_layers(self):
    right(self)
    register(self)
LoraConfig.__post_init__ = with_fused_layers
forward = FusedLora._fused
def counted(self, x):
    fused_calls.append(1)
    return forward(self, x)
FusedLora._fused = counted
def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"fused forwards: {len(fused_calls)}")
"""


def run(checkout: Path, files: list[str], *, fused: bool) -> tuple[dict[str, str], str]:
    """Test name -> passed, failed or skipped, and pytest's last lines."""
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report.xml"
        (Path(work) / "lora_selection.py").write_text(SELECTION)
        (Path(work) / "fused_layers.py").write_text(FUSED)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([work, str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        command = [
            *(sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-o", "addopts="),
            *(f"--junitxml={report}", "-p", "lora_selection", *(("-p", "fused_layers") if fused else ())),
            *[f"tests/{name}" for name in files],
        ]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if not report.is_file():
            raise SystemExit(f"pytest did not run: {(done.stdout + done.stderr)[-2000:]}")
        outcomes = {}
        for case in ET.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
        lines = done.stdout.strip().splitlines()
        return outcomes, "; ".join([*(line for line in lines if line.startswith("fused forwards")), lines[-1]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("files", nargs="*", default=list(FILES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    missing = [name for name in arguments.files if not (arguments.checkout / "tests" / name).is_file()]
    if missing:
        parser.error(f"{arguments.checkout / 'tests'} has no {', '.join(missing)}: give the folder of a PEFT checkout")
    results = {}
    for name, fused in (("peft", False), ("fused", True)):
        started = time.perf_counter()
        results[name], tail = run(arguments.checkout, arguments.files, fused=fused)
        print(f"{name}: {tail} ({time.perf_counter() - started:.0f} s)", flush=True)
    worse = sorted(t for t, o in results["peft"].items() if o == "passed" and results["fused"].get(t) != "passed")
    counts = {
        name: {kind: list(r.values()).count(kind) for kind in ("passed", "failed", "skipped")}
        for name, r in results.items()
    }
    print(json.dumps(counts))
    for test in worse:
        print(f"worse with the fused layers: {test}")
    if arguments.json:
        from importlib.metadata import version

        versions = {name: version(name) for name in ("torch", "peft", "transformers")}
        arguments.json.write_text(json.dumps({"counts": counts, "worse": worse, "versions": versions}, indent=1) + "\n")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())

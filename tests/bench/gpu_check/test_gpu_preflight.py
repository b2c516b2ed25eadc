"""gpu-check's preflight: packages, versions, device, compiler and disk. It does not import torch."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.gpu_check import base, linears, preflight, run
from bench.gpu_check.sections import SECTIONS
from peftlab.measuring.journal import begin

ROOT = Path(__file__).resolve().parents[3]


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))


def findings_of(out: Path) -> dict[str, bool]:
    """Message -> whether it is fatal."""
    sections = [s for s in SECTIONS if not s.only_by_name]
    return {finding.what: finding.fatal for finding in preflight.look(sections, out, dry=True)}


def test_missing_package_reports_the_sections_it_costs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without(monkeypatch, "bitsandbytes")
    (message,) = (text for text in findings_of(tmp_path) if "bitsandbytes" in text)
    out, less = message.removeprefix("not installed: bitsandbytes; ").split("; ")
    assert out.startswith("left out: `NF4 linears, 8,192 rows`") and "`smoke recipe`" in out
    assert less.startswith("not whole: `lora_linear bfloat16`")
    assert not any(findings_of(tmp_path).values())


def test_missing_package_stops_timings_that_need_its_section(tmp_path: Path) -> None:
    section = base.Section
    sections = [
        section("whole", "a", "", 1, needs=("no_such",)),
        section("half", "a", "", 1, uses=("no_such",)),
        section("one", "b", "", 1, timing=True, stands_on=("whole",)),
        section("two", "b", "", 1, timing=True, stands_on=("half",), uses=("no_such",)),
        section("three", "b", "", 1, timing=True, stands_on=("other",)),
    ]
    (finding,) = (f for f in preflight.look(sections, tmp_path, dry=True) if "no_such" in f.what)
    assert finding.what == (
        "not installed: no_such; left out: `whole`; not whole: `half`, `two`; so not timed: `one`, `two`"
    )
    assert not finding.fatal


def test_missing_triton_is_fatal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without(monkeypatch, "triton")
    assert findings_of(tmp_path)["not installed: triton; nothing runs without it"] is True


def test_other_version_than_in_constraints_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("numpy==0.1\npeft==0.0.1\n")
    monkeypatch.setattr(preflight, "CONSTRAINTS", constraints)
    findings = findings_of(tmp_path)
    (peft,) = (text for text in findings if "constraints.txt pins" in text)
    assert (
        peft.startswith("peft ")
        and peft.endswith("is installed, but constraints.txt pins 0.0.1")
        and not findings[peft]
    )


def test_out_folder_may_be_new_but_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not any(findings_of(tmp_path / "new" / "folder").values())
    assert not (tmp_path / "new").exists(), "looking makes nothing"
    (message,) = (text for text, fatal in findings_of(tmp_path / "file").items() if fatal)
    assert message == f"{tmp_path / 'file'} is a file, not a folder; give another --out"


def test_full_disk_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10 * 2**20))
    findings = findings_of(tmp_path)
    assert findings[f"only 10 MiB are free for the rows in {tmp_path}; give another --out"] is True
    assert findings["only 0.0 GiB are free for temporary files, but recipes may need 2"] is False


class Driver:
    """The part of libcuda that preflight calls."""

    def __init__(self, code: int, count: int) -> None:
        self.code, self.count = code, count

    def cuInit(self, flags: int) -> int:  # noqa: N802 -- its name
        return self.code

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802 -- its name
        count._obj.value = self.count
        return 0


@pytest.mark.parametrize(
    ("driver", "messages"),
    [(Driver(0, 1), []), (Driver(100, 0), ["finds none (error 100)"]), (Driver(0, 0), ["finds none"])],
)
def test_device_without_a_working_driver_is_fatal(
    monkeypatch: pytest.MonkeyPatch, driver: Driver, messages: list[str]
) -> None:
    monkeypatch.setattr(preflight.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(preflight, "_torch_finds_one", lambda: False)
    findings = list(preflight._device())
    assert len(findings) == len(messages) and all(
        f.fatal and words in f.what for f, words in zip(findings, messages, strict=True)
    )


def test_device_that_only_torch_finds_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.ctypes, "CDLL", lambda name: Driver(100, 0))
    monkeypatch.setattr(preflight, "_torch_finds_one", lambda: True)
    assert not list(preflight._device())


def test_missing_compiler_is_fatal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(preflight.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    findings = list(preflight._compiler())
    assert [(f.what.split(",")[0], f.fatal) for f in findings] == [
        ("no C compiler (CC", True),
        (f"no Python.h in {tmp_path}", False),
    ]
    assert preflight.report(findings).startswith("preflight: FATAL: no C compiler")


def test_wheels_match_the_constraints() -> None:
    """A GPU machine without network gets the versions that everything else is tested with. Liger is no dependency of
    peftlab."""

    def pins(name: str) -> dict[str, str]:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        return dict(line.split("==") for line in lines if line and not line.startswith("#"))

    wheels, constraints = pins("bench/gpu_wheels.txt"), pins("constraints.txt")
    assert {"bitsandbytes", "peft", "datasets", "evaluate", "pydantic"} < wheels.keys()
    assert wheels.keys() - constraints.keys() == {"liger-kernel"}
    assert not {name: pin for name, pin in wheels.items() if constraints.get(name, pin) != pin}


def test_preflight_is_quick_and_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv[1:] = ['--preflight', '--dry-run-cpu', '--out', sys.argv[1]]\n"
        "from bench.gpu_check import __main__ as program; code = program.main()\n"
        "assert not {'torch', 'bitsandbytes', 'transformers'} & set(sys.modules), 'imported'\n"
        "sys.exit(code)"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "preflight: " in done.stdout
    assert time.perf_counter() - started < 10  # 0.5 s on an idle machine
    assert not list(tmp_path.iterdir())


def test_rows_without_their_package_are_not_red(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only bitsandbytes' own products of lora_linear need the package. A failed import from an installed package or
    from our own code stays red."""
    without(monkeypatch, "bitsandbytes")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it raises
    device, task = base.Device("cpu"), base.Task
    chosen = {"kind": "nf4", "factors": "float32", "dropout": 0.0}
    tasks = [t for t in linears.lora_correctness(device, "float32") if chosen.items() <= t.what.items()]
    tasks = [t for t in tasks if t.what["forward"] in ("library", "merged")]

    def no(module: str) -> Any:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    tasks += [task({"forward": name}, lambda name=name: no(name)) for name in ("torch.nothing", "_gpu_nothing")]
    monkeypatch.setattr(run, "tasks_of", lambda section, device: tasks)
    journal = begin(tmp_path / "rows.jsonl", {})
    section = base.Section("lora_linear float32", "a", "", 100)
    run.run_group([section], run.Rows(journal, device), base.Deadline(time.time() + 100))
    rows = {row["task"]["forward"]: row for row in journal.of("row")}
    assert rows["merged"]["ok"] is True
    assert (rows["library"]["ok"], rows["library"]["not_run"]) == (None, "not installed: bitsandbytes")
    assert rows["torch.nothing"]["ok"] is rows["_gpu_nothing"]["ok"] is False

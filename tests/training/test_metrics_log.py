"""The metrics log: lines, non-finite values, torn lines and resume; and the memory readings that it stores."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import numpy as np
import pytest

from peftlab.errors import ArtifactError
from peftlab.measuring import memory
from peftlab.measuring.memory import frozen_heap
from peftlab.training.metrics_log import MetricsLog, read_metrics


def _write(path: Path, steps: range, resume_step: int | None = None) -> None:
    with MetricsLog(path, resume_step=resume_step) as log:
        for step in steps:
            log.write({"step": step, "loss": 1 / (step + 1)})


def _steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_metrics_log_writes_each_record_as_a_flushed_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"step": 1, "eval": {"f1_sp\u00e4m": 0.5}, "lr": 2e-4, "note": None})
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert [json.loads(line) for line in text.splitlines()] == read_metrics(path)
    assert read_metrics(path) == [{"step": 1, "eval": {"f1_sp\u00e4m": 0.5}, "lr": 2e-4, "note": None}]
    log.close()


def test_metrics_log_writes_non_finite_values_as_strings(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 1, "loss": math.nan, "eval": {"perplexity": math.inf}, "all": [-math.inf, 1.0]})
        log.write({"step": 2, "loss": np.float64("nan")})
    records = read_metrics(path)
    assert records[0] == {"step": 1, "loss": "nan", "eval": {"perplexity": "inf"}, "all": ["-inf", 1.0]}
    assert records[1]["loss"] == "nan"
    assert math.isnan(float(records[1]["loss"]))


def test_metrics_log_refuses_a_record_that_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        with pytest.raises(TypeError):
            log.write({"step": 1, "loss": object()})
        log.write({"step": 2})
    assert _steps(path) == [2]


def test_metrics_log_appends_when_reopened(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(3))
    _write(path, range(3, 5))
    assert _steps(path) == [0, 1, 2, 3, 4]


def test_metrics_log_resume_drops_later_steps(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    _write(whole, range(8))
    _write(resumed, range(6))
    _write(resumed, range(4, 8), resume_step=3)
    assert resumed.read_bytes() == whole.read_bytes()
    _write(resumed, range(1, 2), resume_step=0)
    assert _steps(resumed) == [0, 1]
    assert sorted(os.listdir(tmp_path)) == ["resumed.jsonl", "whole.jsonl"]


def test_metrics_log_resume_keeps_records_without_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"device": "cpu"})
        log.write({"step": 9})
    MetricsLog(path, resume_step=1).close()
    assert read_metrics(path) == [{"device": "cpu"}]


@pytest.mark.parametrize("cut", range(1, 30))
def test_metrics_log_drops_a_torn_last_line_and_continues(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(2))
    kept = path.read_bytes()
    last = '{"step": 2, "name": "sp\u00e4m"}'.encode()
    path.write_bytes(kept + last[:cut])
    complete = [2] if cut >= len(last) else []
    assert _steps(path) == [0, 1, *complete]
    _write(path, range(3, 4))
    assert _steps(path) == [0, 1, *complete, 3]


@pytest.mark.parametrize("tail", [b"\x00" * 4096, b"\xff\xfe", b'"text"', b"12"])
def test_metrics_log_drops_a_last_line_that_is_no_record(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(2))
    path.write_bytes(path.read_bytes() + tail)
    assert _steps(path) == [0, 1]


def test_metrics_log_that_is_empty_has_no_records(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.touch()
    assert read_metrics(path) == []
    _write(path, range(1), resume_step=0)
    assert _steps(path) == [0]


def test_metrics_log_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)
    with pytest.raises(ArtifactError, match="line 2"):
        MetricsLog(path, resume_step=1)
    assert path.read_text().count("\n") == 3


def test_metrics_log_of_a_killed_writer_has_all_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    program = f"""
        import os, signal
        from peftlab.training.metrics_log import MetricsLog
        log = MetricsLog({str(path)!r})
        for step in range(50):
            log.write({{"step": step}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=Path(memory.__file__).parents[2])
    assert done.returncode == -9
    assert _steps(path) == list(range(50))


def test_memory_readings_of_this_process_are_bytes() -> None:
    now, peak = memory.memory_bytes("cpu"), memory.peak_memory_bytes("cpu")
    assert 5_000_000 < now <= peak * 1.01
    block = np.ones(8_000_000)
    assert memory.memory_bytes("cpu") > now + 0.9 * block.nbytes
    assert memory.peak_memory_bytes("cpu") >= peak


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_of_a_child_is_not_that_of_its_parent() -> None:
    block = np.ones(40_000_000)
    program = "from peftlab.measuring.memory import peak_memory_bytes; print(peak_memory_bytes('cpu'))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(memory.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 0.5 * block.nbytes


IN_A_THREAD = """
import ctypes, sys, threading
from peftlab.measuring.memory import share_one_heap
if sys.argv[1] == "one":
    share_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
found = []
thread = threading.Thread(target=lambda: found.append(libc.malloc(1000)))
thread.start(); thread.join()
heap = next(line for line in open("/proc/self/maps") if "[heap]" in line)
start, end = (int(x, 16) for x in heap.split()[0].split("-"))
print(start <= found[0] < end)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_share_one_heap_makes_threads_allocate_from_one_heap() -> None:
    def inside(how: str) -> str:
        env = {k: v for k, v in os.environ.items() if k != "MALLOC_ARENA_MAX"}
        command = [sys.executable, "-c", IN_A_THREAD, how]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    assert inside("one") == "True"
    assert inside("own") == "False", "the test must see a heap of the thread's own"


def test_frozen_heap_thaws_and_collects_new_garbage(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    class Node:
        pass

    def cycle() -> weakref.ref[Node]:
        node = Node()
        node.itself = node  # type: ignore[attr-defined]
        return weakref.ref(node)

    monkeypatch.setattr(memory, "_frozen", False)
    gc.unfreeze()  # what tests/conftest.py froze
    request.addfinalizer(gc.freeze)
    before = cycle()
    with frozen_heap():
        assert before() is None, "what was garbage at its beginning is gone, not kept"
        with frozen_heap():
            within = cycle()
        assert gc.get_freeze_count() > 10_000, "the inner one ends nothing"
        gc.collect()
        assert within() is None
    assert gc.get_freeze_count() == 0
    with pytest.raises(ValueError, match="inside"), frozen_heap():
        raise ValueError("inside")
    assert gc.get_freeze_count() == 0

"""The processes that tests start: they behave like new interpreters, and they end with pytest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import LIBRARIES, Processes

ROOT = Path(__file__).resolve().parents[1]
LOOK = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("COLOUR"), __name__, sys.stdin.read()]))
print("beside", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("way", ["code", "file", "module"])
def test_process_has_what_it_is_given(process: Processes, tmp_path: Path, way: str) -> None:
    (tmp_path / "looking.py").write_text(LOOK)
    arguments = {"code": ["-c", LOOK], "file": [str(tmp_path / "looking.py")], "module": ["-m", "looking"]}[way]
    done = process.run([*arguments, "one", "two"], cwd=tmp_path, env={**os.environ, "COLOUR": "red"})
    assert done.returncode == 3
    assert json.loads(done.stdout) == [["one", "two"], str(tmp_path), "red", "__main__", ""]
    assert done.stderr == "beside\n"
    with pytest.raises(AssertionError, match=r"ended with 3\s.*\"red\".*\s+beside"):
        process.run([*arguments], cwd=tmp_path, env={**os.environ, "COLOUR": "red"}, check=True)


def test_process_has_the_libraries_and_nothing_of_ours(process: Processes) -> None:
    code = """
import sys
ours = {name for name in sys.modules if name.split(".")[0] in ("peftlab", "peftlab_kernels", "_pytest", "conftest")}
print(sorted(ours), [name for name in sys.argv[1:] if name not in sys.modules])
"""
    if not process.forks:
        pytest.skip("no forks beside CUDA")
    assert process.run(["-c", code, *LIBRARIES]).stdout == "[] []\n"
    assert process.num_threads == 1


def test_process_of_another_hash_seed_is_a_new_interpreter(process: Processes) -> None:
    """This holds for every variable that is read once: a fork would show the seed of the server."""
    code = "import sys; print(sys.flags.hash_randomization, 'torch' in sys.modules)"
    assert process.run(["-c", code], env={**os.environ, "PYTHONHASHSEED": "0"}).stdout == "0 False\n"
    with (
        pytest.raises(AssertionError, match=r"a new interpreter is needed.*OMP_NUM_THREADS"),
        process.start(os.getpid, env={**os.environ, "OMP_NUM_THREADS": "7"}),
    ):
        pass


def test_process_leaves_nothing_to_the_next(process: Processes) -> None:
    code = """
import os, random, sys, numpy, torch
print(getattr(sys, "mark", 0), os.environ.get("MARK"), torch.initial_seed())
print(numpy.random.rand(), random.random(), file=sys.stderr)
sys.mark = os.environ["MARK"] = "1"
"""
    first, second = (process.run(["-c", code]) for _ in range(2))
    assert first.stdout == second.stdout and first.stdout.startswith("0 None")
    assert not set(first.stderr.split()) & set(second.stderr.split()), "seeded anew, as in a new interpreter"


def test_process_that_fails_says_why(process: Processes) -> None:
    done = process.run(["-c", "1 / 0"])
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    done = process.run(["-c", "raise SystemExit('told')"])
    assert (done.returncode, done.stderr) == (1, "told\n")
    assert process.run(["-c", "import os; os.kill(os.getpid(), 9)"]).returncode == -signal.SIGKILL


def test_process_with_other_hashes(process: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert process.run_with_other_hashes("print(hash('a'))") != f"{hash('a')}\n"
    monkeypatch.setenv("PYTHONHASHSEED", "4")
    assert process.run_with_other_hashes("import os; print(os.environ['PYTHONHASHSEED'])") == "5\n"


def test_process_that_takes_too_long_is_killed(process: Processes) -> None:
    with process.start(["-c", "import time; print('ready', flush=True); time.sleep(600)"]) as child:
        child.wait_for(lambda: child.stdout == "ready\n")
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            child.wait(timeout=0.1)
        assert _is_gone(child.pid) and caught.value.output == "ready\n"


def test_started_process_gets_signals(process: Processes) -> None:
    code = """
import time
try:
    print("ready", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("stopped")
"""
    with process.start(["-c", code]) as child:
        child.wait_for(lambda: child.stdout == "ready\n")
        child.send_signal(signal.SIGINT)
        assert child.wait().stdout == "ready\nstopped\n"
    with process.start(["-c", code]) as child:
        assert child.poll() is None
    assert child.poll() == -signal.SIGKILL, "the block has ended"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process outlives its parent")
def test_processes_end_with_a_killed_pytest(tmp_path: Path) -> None:
    code = """
from tests import processes
processes.LIBRARIES = []
with processes.Processes().start(["-c", "import os, time; print(os.getpid(), os.getppid(), flush=True); time.sleep(600)"]) as child:
    child.wait_for(lambda: child.stdout.count("\\n"))
    print(child.stdout, flush=True)
    child.wait()
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen([sys.executable, "-c", code], env=env, cwd=tmp_path, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        started = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(started) == 2 and not any(_is_gone(pid, 0) for pid in started)
        parent.kill()
    left = [pid for pid in started if not _is_gone(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def _is_gone(pid: int, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)

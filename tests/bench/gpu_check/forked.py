"""gpu_check whose processes are forks of the first one, without the seconds that each takes for its imports.

`python -c "from tests.bench.gpu_check.forked import run; run()" ARGUMENT ...` is `python -m bench.gpu_check ARGUMENT ...`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from bench.gpu_check import __main__ as gpu_check
from bench.gpu_check import processes


class Fork:
    """The part of ``subprocess.Popen`` that gpu_check uses."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        stdout: IO[bytes],
        env: Mapping[str, str] = os.environ,
        stderr: int | None = None,
        start_new_session: bool = False,
    ) -> None:
        assert list(command[: len(processes.PROGRAM)]) == processes.PROGRAM, command
        self.args, self.returncode = list(command), None
        self.pid = os.fork()
        if not self.pid:
            if start_new_session:
                os.setsid()
            os.dup2(stdout.fileno(), 1)
            if stderr == subprocess.STDOUT:
                os.dup2(1, 2)
            os.chdir(cwd)
            os.environ.update(env)
            sys.argv[1:] = command[len(processes.PROGRAM) :]
            os._exit(_exit_code())

    def wait(self, timeout: float = float("inf")) -> int:
        until = time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.args, timeout)
            else:
                time.sleep(0.01)
        return self.returncode


def run() -> None:
    """Runs gpu_check with the arguments of this process, and ends it."""
    use_forks()
    sys.exit(gpu_check.main())


def use_forks() -> None:
    names = {"STDOUT": subprocess.STDOUT, "PIPE": subprocess.PIPE, "TimeoutExpired": subprocess.TimeoutExpired}
    for module in (processes, gpu_check):
        module.subprocess = SimpleNamespace(Popen=Fork, run=_run, **names)  # type: ignore[attr-defined]


def _run(command: Sequence[str], *, cwd: Path, stdout: int, text: bool) -> subprocess.CompletedProcess[str]:
    assert stdout == subprocess.PIPE and text
    with tempfile.TemporaryFile() as output:
        code = Fork(command, cwd=cwd, stdout=output).wait()
        output.seek(0)
        return subprocess.CompletedProcess(command, code, output.read().decode())


def _exit_code() -> int:
    """Runs gpu_check to its end, as an interpreter would."""
    code: Any
    try:
        code = gpu_check.main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)

"""gpu-check: runs groups of its sections in processes. A crash of one loses only its own rows."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bench import ROOT
from bench.gpu_check.base import Deadline, Section

PROGRAM = [sys.executable, "-m", "bench.gpu_check"]
GRACE_S = 10.0  # beyond its deadline, for the task that a process is running


@dataclass
class Child:
    """A group in its own process. output: its output, kept for the row of a crash."""

    sections: list[Section]
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    deadline: Deadline


class Processes:
    """Starts them and waits for them. out: the folder of the journal."""

    def __init__(self, out: Path, *, dry: bool) -> None:
        self._out, self._dry = out, dry
        self._running: list[Child] = []

    def start(self, sections: list[Section], deadline: Deadline) -> Child:
        command = [*PROGRAM, "--child", str(deadline.until), "--only", *(s.name for s in sections)]
        command += ["--out", str(self._out.resolve()), *(["--dry-run-cpu"] if self._dry else [])]
        # Parallel processes get few threads each; timed ones run alone on the machine.
        timed = any(s.timing for s in sections)
        environment = os.environ | ({} if timed else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")})
        output = tempfile.TemporaryFile()  # noqa: SIM115 -- closed when its process has been waited for
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._running.append(Child(sections, process, output, deadline))
        return self._running[-1]

    def wait(self, child: Child) -> tuple[int | None, str]:
        """Its exit code, or None if it did not end in time and was stopped, and the end of its output."""
        try:
            code: int | None = child.process.wait(timeout=max(1.0, child.deadline.left() + GRACE_S))
        except subprocess.TimeoutExpired:
            _kill(child.process)
            code = None
        self._running.remove(child)
        child.output.seek(0)
        text = child.output.read().decode(errors="replace").strip()
        child.output.close()
        return code, text[-2000:]

    def stop(self) -> None:
        """Stops them after Ctrl-C, because they run in their own sessions."""
        for child in self._running:
            _kill(child.process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

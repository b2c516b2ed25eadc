"""Runs a job in a separate process and reports its outcome."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Error of a job -> status of its cell.
_STATUS = {"ResourceError": "memory", "VerificationError": "red", "RecipeError": "impossible"}
_TAIL = 600
# Environment variable with the id of the process that waits for the job.
PARENT = "PEFTLAB_BENCH_PARENT"


def launch(module: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Runs ``python -m MODULE JOB RESULT`` and returns its result with ``status``: ok, or with a ``reason``: red (wrong
    figures), memory (does not fit), impossible, failed (internal error)."""
    with tempfile.TemporaryDirectory(prefix="peftlab-bench-") as folder:
        job, result, log = (Path(folder) / name for name in ("job.json", "result.json", "log.txt"))
        job.write_text(json.dumps(spec), encoding="utf-8")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(job), str(result)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONWARNINGS": "ignore", PARENT: str(os.getpid())},
            )
            try:
                code = process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise
        written = json.loads(result.read_text(encoding="utf-8")) if result.exists() else None
        return outcome(written, code, log.read_text(encoding="utf-8", errors="replace"))


def outcome(result: dict[str, Any] | None, code: int, log: str) -> dict[str, Any]:
    """Returns the outcome. Args: result: the result file, None if missing. code: exit code; negative: the ending signal."""
    if result is not None and "error" not in result:
        return {"status": "ok", **result}
    if result is not None:
        error = result["error"]
        status = _STATUS.get(error["kind"], "failed")
        return {"status": status, "reason": f"{'' if error['known'] else error['kind'] + ': '}{error['message']}"}
    if code == -signal.SIGKILL:
        return {"status": "memory", "reason": "killed by the system (signal 9): its memory ran out"}
    last = log.strip()[-_TAIL:].splitlines()
    how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return {"status": "failed", "reason": f"{how}{': ' + last[-1] if last else ''}"}

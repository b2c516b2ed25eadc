"""Starts the Python processes of a test, as forks of one server that has loaded the libraries.

A new interpreter needs about five seconds of a core to import torch, transformers, peft, datasets, evaluate and
bitsandbytes. A fork of a process that has imported them needs a tenth of a second. The server imports none of our
modules and runs one thread.

A fork equals a new interpreter with two exceptions. The libraries are already imported, with the environment of the
server. Functions of ``atexit`` do not run. If a test sets another value for a variable that is read at an import, it
gets a new interpreter. Tests of imports, of startup and of ``python -m`` start a new interpreter themselves, with
``subprocess``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

LIBRARIES = [
    "torch.distributed", "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "accelerate", "peft", "datasets",
    "evaluate", "sklearn.metrics", "bitsandbytes", "safetensors.torch", "pydantic.json_schema", "typer", "rich.live", "rich.progress",
    "rich.table", "yaml", "psutil",
]  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
# Prefixes of the variables that the interpreter or a library reads only once.
READ_ONCE = (
    "ACCELERATE_TORCH", "BNB_", "CUDA_", "GOMP_", "HF_", "HOME", "HUGGINGFACE_", "LD_", "MALLOC_", "MKL_", "OMP_",
    "OPENBLAS_", "PYTHON", "TORCH", "TRANSFORMERS_", "TRITON_", "XDG_CACHE_HOME",
)  # fmt: skip
# Exceptions: a fork gets PYTHONPATH as a new interpreter does, nothing reads CUDA_VISIBLE_DEVICES without a GPU, a
# single thread does not spin, and Inductor writes its folder into the environment itself and reads it when it compiles.
NOT_READ = ("PYTHONPATH", "CUDA_VISIBLE_DEVICES", "GOMP_SPINCOUNT", "TORCHINDUCTOR_CACHE_DIR")
START_S = 300  # the imports take 5 s on an idle core


def _read_once(environment: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if k.startswith(READ_ONCE) and k not in NOT_READ}


class Child:
    """A running process, forked or new, and its output so far."""

    def __init__(self, process: BaseProcess | subprocess.Popen[bytes], arguments: Any, folder: Path) -> None:
        self._process, self._arguments, self._folder = process, arguments, folder
        assert process.pid is not None
        self.pid = process.pid

    @property
    def stdout(self) -> str:
        return (self._folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text()

    def poll(self) -> int | None:
        """The exit status, minus the signal number if a signal killed it, None while it runs."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return self._process.exitcode

    def wait(self, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """The finished process. One that takes longer is killed: ``subprocess.TimeoutExpired``."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if isinstance(self._process, subprocess.Popen):
                self._process.wait(timeout)
            else:
                self._process.join(timeout)
        status = self.poll()
        if status is None:
            self.kill()
            raise subprocess.TimeoutExpired(self._arguments, timeout, self.stdout, self.stderr)
        return subprocess.CompletedProcess(self._arguments, status, self.stdout, self.stderr)

    def wait_for(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Waits until ``condition()`` holds, while the process runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.poll() is None, f"ended with {self.poll()}: {self.stdout}{self.stderr}"
            assert time.monotonic() < deadline, f"after {timeout} s: {self.stdout}{self.stderr}"
            time.sleep(0.02)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        if isinstance(self._process, subprocess.Popen):
            self._process.wait()
        else:
            self._process.join()


class Processes:
    """Starts processes. ``arguments`` are those of ``python``: ``["-c", CODE, ...]``, ``["-m", MODULE, ...]`` or
    ``[FILE, ...]``; or a function that can be pickled with its arguments."""

    def __init__(self) -> None:
        self._running: list[Child] = []
        # CUDA does not survive a fork, and a query for a GPU loads it.
        torch = importlib.import_module("torch")
        self.forks = hasattr(os, "fork") and not torch.cuda.is_available()
        self._environment = _read_once(os.environ)
        if self.forks:
            self.num_threads = _start_server()

    def run(
        self,
        arguments: Sequence[str | Path],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Like ``subprocess.run([sys.executable, *arguments], text=True, capture_output=True, stdin=DEVNULL)``."""
        with self.start(arguments, cwd=cwd, env=env) as child:
            done = child.wait(timeout)
        if check and done.returncode:
            raise AssertionError(f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def run_with_other_hashes(self, code: str, *arguments: str | Path) -> str:
        """What the program prints in a process in which texts have other hashes than here, so that sets have another
        order."""
        environment, seed = dict(os.environ), os.environ.get("PYTHONHASHSEED", "random")
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        if seed != "random":
            environment["PYTHONHASHSEED"] = str(int(seed) + 1)
        return self.run(["-c", code, *arguments], env=environment, cwd=ROOT, check=True).stdout

    def run_ranks(
        self, arguments: Sequence[str | Path], *, env: Mapping[str, str], timeout: float = 120, num_ranks: int = 2
    ) -> None:
        """Runs the ranks of one process group on this machine. If one rank fails, all end."""
        with self.start_ranks(arguments, env=env, num_ranks=num_ranks) as ranks:
            deadline = time.monotonic() + timeout
            # If one rank fails, the other waits for it.
            while any(r.poll() is None for r in ranks) and not any(r.poll() for r in ranks):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.02)
            codes = [r.poll() for r in ranks]
            tails = "\n".join(f"rank {i}:\n{(r.stdout + r.stderr)[-3000:]}" for i, r in enumerate(ranks))
        assert codes == [0] * num_ranks, (
            f"exit codes {codes} (None: still running after {timeout} s or when the other failed)\n{tails}"
        )

    @contextlib.contextmanager
    def start_ranks(
        self,
        arguments: Sequence[str | Path],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str],
        num_ranks: int = 2,
    ) -> Iterator[list[Child]]:
        """The running ranks of one process group. They are killed at the end of the block if they still run."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with contextlib.ExitStack() as stack:
            yield [
                stack.enter_context(
                    self.start(arguments, cwd=cwd, env={**env, **group, "RANK": str(i), "LOCAL_RANK": str(i)})
                )
                for i in range(num_ranks)
            ]

    @contextlib.contextmanager
    def start(
        self,
        work: Sequence[str | Path] | Callable[[], Any],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Iterator[Child]:
        """The running process. It is killed at the end of the block if it still runs."""
        environment = dict(os.environ if env is None else env)
        folder = os.getcwd() if cwd is None else str(cwd)
        with tempfile.TemporaryDirectory() as written:
            out, err = (Path(written, name) for name in ("stdout", "stderr"))
            others = sorted(_read_once(environment).items() ^ self._environment.items())
            if self.forks and not others:
                arguments = work if callable(work) else [str(a) for a in work]
                process: Any = multiprocessing.get_context("forkserver").Process(
                    target=_child, args=(arguments, folder, environment, out, err)
                )
                out.touch()
                err.touch()
                process.start()
            else:
                assert not callable(work), f"a function is run in a fork, a new interpreter is needed: {others}"
                with out.open("w") as stdout, err.open("w") as stderr:
                    process = subprocess.Popen(
                        [sys.executable, *work], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=stdout,
                        stderr=stderr,
                    )  # fmt: skip
            child = Child(process, work, Path(written))
            try:
                yield child
            finally:
                child.kill()


def _start_server() -> int:
    """Loads the libraries in the server. Returns its number of threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    # pyarrow's allocator would start its own thread.
    before = os.environ.get("JE_ARROW_MALLOC_CONF")
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["JE_ARROW_MALLOC_CONF"]
        if before is not None:
            os.environ["JE_ARROW_MALLOC_CONF"] = before
    receiver, sender = context.Pipe(duplex=False)
    # Starting a process waits for the server, so a thread starts it.
    first = context.Process(target=_count_threads, args=(sender,))
    starter = threading.Thread(target=first.start, daemon=True)
    starter.start()
    assert receiver.poll(START_S), f"the server of processes has not answered within {START_S} s"
    num_threads = int(receiver.recv())
    starter.join()
    first.join()
    assert num_threads == 1, (
        f"the server of processes has {num_threads} threads; a fork would copy one of them and the locks of all"
    )
    return num_threads


def _count_threads(sender: Any) -> None:
    tasks = Path(f"/proc/{os.getppid()}/task")
    sender.send(len(list(tasks.iterdir())) if tasks.exists() else 1)


def _child(work: Any, folder: str, environment: dict[str, str], out: Path, err: Path) -> None:
    """Makes a fork of the server look like a new interpreter, and runs the work."""
    if sys.platform == "linux":
        # 1 is PR_SET_PDEATHSIG: the server ends with pytest, however pytest ends.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # A child holds what the server waits for before it ends, so that it can ask for more children. Our children may not
    # outlive the server.
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a suite in the background ignores
    server = forkserver._forkserver  # type: ignore[attr-defined]
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = server._forkserver_address = None
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    # A collection would scan the server's libraries, and copy the pages that they are on.
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    importlib.import_module("numpy").random.seed()
    if callable(work):
        work()
        return
    prefixes = (sys.prefix, sys.base_prefix)
    installed = [p for p in sys.path if p and any(Path(p).is_relative_to(prefix) for prefix in prefixes)]
    sys.path[:] = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *installed]
    if work[0] == "-c":
        sys.argv = ["-c", *work[2:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(work[1], "<string>", "exec"), main.__dict__)
    elif work[0] == "-m":
        sys.argv = ["-m", *work[2:]]
        sys.path.insert(0, folder)
        runpy.run_module(work[1], run_name="__main__", alter_sys=True)
    else:
        assert not work[0].startswith("-"), f"{work[0]} is an option of the interpreter: use subprocess"
        sys.argv = [*work]
        sys.path.insert(0, str(Path(work[0]).parent))
        runpy.run_path(work[0], run_name="__main__")

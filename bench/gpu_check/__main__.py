"""``make gpu-check``: checks and measures on a CUDA device in priority order. It writes each row as soon as it is measured.

    python -m bench.gpu_check [--out DIR] [--minutes 9] [--skip SECTION ...] [--only SECTION ...] [--resume]
                              [--commit SHA] [--dry-run-cpu]
    python -m bench.gpu_check --preflight  reports within a second what is missing, and measures nothing
    python -m bench.gpu_check --report     writes bench/results/PENDING.md and bench/RESULTS.md from rows and claims

First it checks every timed kernel against float64. Then it times the losses, NF4 linears, and whole training steps of an 8B
model and of its distillation. Then it runs the other checks (tests, whole tiny models, recipes) and the other timings.
A section is timed once the sections that it depends on (``stands_on`` in sections.py) are green. Other red rows do not stop it.
``--only`` also runs the sections that the named ones depend on. ``healing`` takes minutes and runs only when --only names it.
Nothing is downloaded. If a package is missing, its sections are reported and skipped.

Rows go to the journal ``DIR/gpu_check.jsonl`` (default bench/results; format: journal.py). ``ok`` is true, false or null
(not run), ``met`` is for targets, ``above_limit`` for figures beyond what the hardware can do. Each group of sections runs in
its own process, and groups without timing run in parallel: a crash loses only the rows of its own group. ``--resume`` continues
the journal of the same machine, versions and code, and measures every task that has no green row yet. results/claims.json says
what rows confirm. After a run into bench/results the report is written. ``--dry-run-cpu`` runs the same code on a CPU, in
Triton's interpreter, at tiny shapes that only show that it runs. It writes into build/gpu_check.

Exit codes: 0 no row is red, 2 wrong usage or a machine that can run nothing (no CUDA device, no C compiler, ...),
5 the journal is from another machine or state, 6 at least one row is red.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from bench import RESULTS, ROOT
from bench.gpu_check import preflight
from bench.gpu_check.base import Deadline, Device, Row, Section
from bench.gpu_check.conductor import Conductor
from bench.gpu_check.journal import JOURNAL, finished, header
from bench.gpu_check.processes import PROGRAM, Processes
from bench.gpu_check.run import Rows, run_group
from bench.gpu_check.sections import BY_NAME, SECTIONS, with_what_they_stand_on
from bench.gpu_check.summary import summary
from peftlab.errors import PeftlabError, RecipeError
from peftlab.measuring.journal import Journal, begin, read_records, resume_journal

DRY_RESULTS = ROOT / "build" / "gpu_check"
RESTART = "a run without --resume"


def described(options: argparse.Namespace) -> Row | None:
    """The journal's header, or None without a CUDA device. Another process finds out, so this one has no CUDA context."""
    command = [
        *PROGRAM,
        "--describe",
        _command(),
        *(["--dry-run-cpu"] if options.dry_run_cpu else []),
    ]
    command += ["--commit", options.commit] if options.commit else []
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode == 2:
        return None
    done.check_returncode()
    return dict(json.loads(done.stdout))


def _command() -> str:
    """The command line, without the folders of this machine."""
    folder = [word == "--out" or word.startswith("--out=") or before == "--out" for before, word in pairwise(sys.argv)]
    words = [word for word, left_out in zip(sys.argv[1:], folder, strict=True) if not left_out]
    return " ".join(["python -m bench.gpu_check", *(f"'{word}'" if " " in word else word for word in words)])


def describe(device: Device, options: argparse.Namespace) -> int:
    import torch

    if not device.dry and not torch.cuda.is_available():
        return 2
    print(json.dumps(header(device, options.describe, options.commit)))
    return 0


def opened(path: Path, described_now: Row, *, resume: bool) -> Journal:
    """Raises: RecipeError, ArtifactError, as ``resume_journal``."""
    if not resume:
        path.parent.mkdir(parents=True, exist_ok=True)
        return begin(path, described_now)
    journal = resume_journal(path, described_now, restart=RESTART)
    journal.write({"kind": "resumed", **{name: described_now[name] for name in ("command", "date", "clocks")}})
    return journal


def chosen_sections(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Section]:
    if unknown := sorted({*options.only, *options.skip} - set(BY_NAME)):
        parser.error(f"unknown section: {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    named = {*options.only} or {s.name for s in SECTIONS if not s.only_by_name}
    if options.child is None:
        named = with_what_they_stand_on(named)
    chosen = [s for s in SECTIONS if s.name in named - {*options.skip}]
    if not options.dry_run_cpu:
        return chosen
    # With few cores, importing the libraries takes most of the time: two processes for correctness, then one.
    models = ("models", "tests", "recipe", "kd")
    groups = {s.name: "timing" if s.timing else "models" if s.group in models else "kernels" for s in chosen}
    return [replace(s, group=groups[s.name], wave=1, least=0) for s in chosen]


def report(path: Path) -> int:
    """Raises: RecipeError (rows of a dry run), ArtifactError (a damaged file)."""
    from bench.gpu_check import pending  # imports torch, which a preflight does not need

    records = read_records(path, restart=RESTART) if path.is_file() else []
    if records and records[0]["dry_run"]:
        raise RecipeError(f"{path} is from a dry run, which confirms nothing; give another --out")
    pending.write(records)
    print(f"written: {pending.PENDING.relative_to(ROOT)}, {pending.PAGE.relative_to(ROOT)}", file=sys.stderr)
    return 0


def measure(options: argparse.Namespace, sections: list[Section], deadline: Deadline) -> int:
    if options.dry_run_cpu and options.out.resolve() == RESULTS:
        raise RecipeError("a dry run does not write into the folder of GPU rows; give another --out")
    path = options.out / JOURNAL
    findings = preflight.look(sections, options.out, dry=options.dry_run_cpu)
    if findings:
        print(preflight.report(findings), file=sys.stderr)
    if preflight.fatal(findings):
        return 2
    now = described(options)
    if now is None:
        print("gpu-check needs a CUDA device, but torch finds none; nothing was checked", file=sys.stderr)
        return 2
    journal = opened(path, now, resume=options.resume)
    done = finished(journal.records)
    if skipped := [s.name for s in sections if s.name in done]:
        print(f"already measured: {', '.join(skipped)}", file=sys.stderr)
    processes = Processes(options.out, dry=options.dry_run_cpu)
    conductor = Conductor(journal, [s for s in sections if s.name not in done], deadline, processes)
    conductor.run()
    rows = conductor.rows()
    print(summary(rows, seconds=60 * options.minutes - deadline.left()), file=sys.stderr)
    if not options.dry_run_cpu and options.out.resolve() == RESULTS:
        report(path)
    return 6 if any(row["ok"] is False for row in rows) else 0


def main() -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="default: bench/results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit for the whole run")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="SECTION", help="only these sections, and those they depend on"
    )
    parser.add_argument("--skip", nargs="+", default=[], metavar="SECTION", help="all sections but these")
    parser.add_argument("--resume", action="store_true", help="measure every task without a green row in DIR")
    parser.add_argument("--commit", metavar="SHA", help="commit of this code, if there is no git repository")
    parser.add_argument("--dry-run-cpu", action="store_true", help="the same code on a CPU at tiny shapes")
    parser.add_argument("--preflight", action="store_true", help="report what is missing; measure nothing")
    parser.add_argument("--report", action="store_true", help="write what the rows in DIR confirm; measure nothing")
    parser.add_argument("--child", type=float, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--describe", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    deadline, sections = Deadline(time.time() + 60 * options.minutes), chosen_sections(options, parser)
    if options.dry_run_cpu:
        # Triton reads the first when a kernel is defined. More threads would only wait for each other.
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options.out = options.out or (DRY_RESULTS if options.dry_run_cpu else RESULTS)
    device = Device("cpu" if options.dry_run_cpu else "cuda")
    if options.describe is not None:
        return describe(device, options)
    path = options.out / JOURNAL
    if options.child is not None:
        run_group(sections, Rows(Journal(path, read_records(path, restart=RESTART)), device), Deadline(options.child))
        return 0
    if options.preflight:
        findings = preflight.look(sections, options.out, dry=options.dry_run_cpu)
        print(preflight.report(findings) or "preflight: nothing is missing")
        return 2 if preflight.fatal(findings) else 0
    try:
        return report(path) if options.report else measure(options, sections, deadline)
    except PeftlabError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

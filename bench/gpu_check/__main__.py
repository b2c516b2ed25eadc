"""``make gpu-check``: what a machine with a CUDA device can confirm, in priority order, each row written when measured.

    python -m bench.gpu_check [--out DIR] [--minutes 9] [--skip SECTION ...] [--only SECTION ...] [--resume]
                              [--commit SHA] [--dry-run-cpu]
    python -m bench.gpu_check --preflight  says within a second what is missing, and measures nothing
    python -m bench.gpu_check --report     writes bench/results/PENDING.md and bench/RESULTS.md from rows and claims

First the correctness of what is timed: every kernel against float64. Then times: the losses, NF4 linears, whole training
steps of an 8B model and of its distillation. Then the other checks (tests, whole tiny models, recipes) and the other times.
A section is timed once the sections that it stands on (sections.py) are green; a red row elsewhere does not stop it.
``--only`` takes along what a section stands on. ``healing`` takes minutes of its own and runs when --only names it.
Nothing is downloaded; what an absent package would be needed for is said and left out.

Rows go to the journal ``DIR/gpu_check.jsonl`` (default bench/results; its form: journal.py): ``ok`` true, false or null
(not run), ``met`` for targets, ``above_limit`` for figures beyond what the hardware can do. Groups of sections run in
processes of their own, those without timing side by side: a crash of one costs its rows only. ``--resume`` goes on with the
journal of the same machine, versions and code, and measures what has no green row yet. What rows confirm is said by
results/claims.json; after a run into bench/results the report is written. ``--dry-run-cpu`` runs the same code on a CPU, in
Triton's interpreter, at shapes that prove nothing but that it runs; it writes into build/gpu_check.

Exit codes: 0 no row is red, 2 wrong usage or a machine on which nothing can run (no CUDA device, no C compiler, ...),
5 a journal of another machine or state, 6 at least one row is red.
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
from peftlab.measuring.journal import Journal, begin, go_on, read_records

DRY_RESULTS = ROOT / "build" / "gpu_check"
ANEW = "a run without --resume"


def described(options: argparse.Namespace) -> Row | None:
    """The journal's header, or None without a CUDA device; asked in another process: this one stays without a CUDA context."""
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
    """This call, without the folders of this machine."""
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
    """Raises: RecipeError, ArtifactError, as ``go_on``."""
    if not resume:
        path.parent.mkdir(parents=True, exist_ok=True)
        return begin(path, described_now)
    journal = go_on(path, described_now, anew=ANEW)
    journal.write({"kind": "resumed", **{name: described_now[name] for name in ("command", "date", "clocks")}})
    return journal


def chosen_sections(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Section]:
    if unknown := sorted({*options.only, *options.skip} - set(BY_NAME)):
        parser.error(f"no section is called {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    named = {*options.only} or {s.name for s in SECTIONS if not s.asked}
    if options.child is None:
        named = with_what_they_stand_on(named)
    chosen = [s for s in SECTIONS if s.name in named - {*options.skip}]
    if not options.dry_run_cpu:
        return chosen
    # On few cores importing the libraries is most of it: two processes for correctness, then one.
    models = ("models", "tests", "recipe", "kd")
    groups = {s.name: "timing" if s.timing else "models" if s.group in models else "kernels" for s in chosen}
    return [replace(s, group=groups[s.name], wave=1, least=0) for s in chosen]


def report(path: Path) -> int:
    """Raises: RecipeError (rows of a dry run), ArtifactError (a damaged file)."""
    from bench.gpu_check import pending  # with torch, which a preflight does without

    records = read_records(path, anew=ANEW) if path.is_file() else []
    if records and records[0]["dry_run"]:
        raise RecipeError(f"{path} is of a dry run, which confirms nothing; give another --out")
    pending.write(records)
    print(f"written: {pending.PENDING.relative_to(ROOT)}, {pending.PAGE.relative_to(ROOT)}", file=sys.stderr)
    return 0


def measure(options: argparse.Namespace, sections: list[Section], deadline: Deadline) -> int:
    if options.dry_run_cpu and options.out.resolve() == RESULTS:
        raise RecipeError("a dry run does not write where the rows of GPUs are; give another --out")
    path = options.out / JOURNAL
    findings = preflight.look(sections, options.out, dry=options.dry_run_cpu)
    if findings:
        print(preflight.message(findings), file=sys.stderr)
    if preflight.fatal(findings):
        return 2
    now = described(options)
    if now is None:
        print("gpu-check needs a CUDA device, and torch finds none; nothing was checked", file=sys.stderr)
        return 2
    journal = opened(path, now, resume=options.resume)
    done = finished(journal.records)
    if skipped := [s.name for s in sections if s.name in done]:
        print(f"measured before: {', '.join(skipped)}", file=sys.stderr)
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
    parser.add_argument("--minutes", type=float, default=9.0, help="the whole ends within this time")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="these, and what they stand on")
    parser.add_argument("--skip", nargs="+", default=[], metavar="SECTION", help="all sections but these")
    parser.add_argument("--resume", action="store_true", help="measure what has no green row in DIR yet")
    parser.add_argument("--commit", metavar="SHA", help="of this code, where it lies without git")
    parser.add_argument("--dry-run-cpu", action="store_true", help="the same code on a CPU at tiny shapes")
    parser.add_argument("--preflight", action="store_true", help="say what is missing; measure nothing")
    parser.add_argument("--report", action="store_true", help="measure nothing; write what the rows in DIR confirm")
    parser.add_argument("--child", type=float, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--describe", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    deadline, sections = Deadline(time.time() + 60 * options.minutes), chosen_sections(options, parser)
    if options.dry_run_cpu:
        # Triton reads the first when a kernel is defined; more threads than that only wait for each other.
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options.out = options.out or (DRY_RESULTS if options.dry_run_cpu else RESULTS)
    device = Device("cpu" if options.dry_run_cpu else "cuda")
    if options.describe is not None:
        return describe(device, options)
    path = options.out / JOURNAL
    if options.child is not None:
        run_group(sections, Rows(Journal(path, read_records(path, anew=ANEW)), device), Deadline(options.child))
        return 0
    if options.preflight:
        findings = preflight.look(sections, options.out, dry=options.dry_run_cpu)
        print(preflight.message(findings) or "preflight: nothing is missing")
        return 2 if preflight.fatal(findings) else 0
    try:
        return report(path) if options.report else measure(options, sections, deadline)
    except PeftlabError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

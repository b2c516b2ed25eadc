"""gpu-check: PENDING.md and the confirmed claims of bench/RESULTS.md, from claims and rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench import RESULTS, ROOT
from bench.gpu_check.base import Row
from bench.gpu_check.claims import Claim, Verdict, judge, load
from bench.gpu_check.loss_model import predictions as loss_predictions
from bench.gpu_check.roofline import predictions
from bench.tables import replace_section

PENDING, PAGE = RESULTS / "PENDING.md", ROOT / "bench" / "RESULTS.md"
MARKER = "gpu_check"
Judged = list[tuple[Claim, Verdict]]

_INTRO = """\
# Not yet confirmed on a GPU

{run} `make gpu-check` (bench/gpu_check) covers every claim with a section below. A claim whose rows are green and reach
its target moves from here to bench/RESULTS.md, with its prediction next to the measurement.
`python -m bench.gpu_check --report` writes this page from claims.json and gpu_check.jsonl."""

_MODEL = """\
Predictions: bytes over 4.08 TB/s (85 % of an H200's) plus FLOPs over 790 TFLOP/s, printed by `python -m bench.gpu_check.roofline` and
`python -m bench.gpu_check.loss_model`. *Floor* is kernels.md's, with a GEMM epilogue that costs nothing. *As built* counts the adapter's
parts of y and dX, written once, and the partial sums. Neither includes launches or random numbers: Philox for a mask of 8192 x
4096 may take 14 to 28 us, where reading x takes 16. A target is a bound that should be reached according to this arithmetic. A claim
with a card is about that card and stays open on others."""

_MEASURED_HEADS = ("what", "card", "section", "predicted or proven before", "measured")
_HEALING = """\
`healing` needs the 98 MB GGUF file of SmolLM2. That is too large for one transfer of 64 MiB to a GPU machine without network.
`python -m bench.gpu_check.healing` packs it into `build/heal/1` and `build/heal/2` for two transfers. It is not needed where
assets.txt is installed. Without either, the row says so and is not red."""


def _predictions() -> str:
    return "\n\n".join([predictions(), "\n".join(loss_predictions())])


def judged(records: Sequence[Row], claims: Sequence[Claim]) -> Judged:
    return [(claim, judge(claim, records)) for claim in claims]


def pending(records: Sequence[Row], claims: Sequence[Claim]) -> str:
    """PENDING.md: first the failed claims, then those that no green row confirms."""
    verdicts = judged(records, claims)
    run = f"Last run: {where(records)}." if records else "No GPU run has been made yet."
    parts = [_INTRO.format(run=run)]
    if failed := [(claim, verdict) for claim, verdict in verdicts if verdict.state == "failed"]:
        parts += [
            "## Failed",
            _table(failed, _MEASURED_HEADS, _measured_cells),
        ]
    still = [(claim, verdict) for claim, verdict in verdicts if verdict.state == "open"]

    def of(part: str) -> Judged:
        return [(claim, verdict) for claim, verdict in still if claim["part"] == part]

    heads: tuple[str, ...] = ("what", "section of gpu-check", "how it is proven so far")
    parts += ["## Correctness", _table(of("correctness"), heads, lambda c, v: [_section(c, v), c.get("so_far", "")])]
    parts += ["## Speed and memory", _MODEL, f"<!-- predictions -->\n{_predictions()}\n<!-- /predictions -->"]
    heads = ("target", "card", "section", "predicted")
    parts += [_table(of("speed"), heads, lambda c, v: [_card(c), _section(c, v), c.get("predicted", "")]), _HEALING]
    heads = ("what", "how it is proven so far")
    parts += ["## Not covered by gpu-check", _table(of("uncovered"), heads, lambda c, v: [c.get("so_far", "")])]
    return "\n\n".join(parts) + "\n"


def confirmed(records: Sequence[Row], claims: Sequence[Claim]) -> str:
    """The confirmed claims, for bench/RESULTS.md."""
    claims_confirmed = [(claim, verdict) for claim, verdict in judged(records, claims) if verdict.state == "confirmed"]
    if not records:
        return "No GPU run has been made yet."
    others = f"[results/PENDING.md](results/PENDING.md) has the other {len(claims) - len(claims_confirmed)}"
    summary = f"{len(claims_confirmed)} of {len(claims)} claims confirmed; {others}. {where(records)}."
    return f"{summary}\n\n{_table(claims_confirmed, _MEASURED_HEADS, _measured_cells)}"


def _measured_cells(claim: Claim, verdict: Verdict) -> list[str]:
    proven = str(claim.get("predicted", claim.get("so_far", "")))
    return [_card(claim), _section(claim, Verdict("open")), proven, verdict.measured]


def _card(claim: Claim) -> str:
    return str(claim.get("card", "any"))


def _table(rows: Judged, heads: tuple[str, ...], cells: Callable[[Claim, Verdict], list[str]]) -> str:
    if not rows:
        return "None."
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for claim, verdict in rows:
        texts = [claim["what"], *cells(claim, verdict)]
        lines.append(f"| {' | '.join(text.replace('|', '/') for text in texts)} |")
    return "\n".join(lines)


def _section(claim: Claim, verdict: Verdict) -> str:
    names = list(dict.fromkeys(f"`{rule['section']}`" for rule in claim["rules"]))
    text = " ".join(filter(None, (", ".join(names), claim.get("note", "")))) or "none yet"
    return f"{text}; {verdict.note}" if verdict.note else text


def where(records: Sequence[Row]) -> str:
    """Hardware, versions, commit and commands of a journal."""
    header = records[0]
    machine = header["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    commit = header["commit"][:9] + ("+" if header["commit"].endswith("+") else "") if header["commit"] else "unknown"
    calls = [r for r in records if r["kind"] in ("header", "resumed")]
    commands = ", then ".join(f"`{call['command']}` on {call['date'][:10]}" for call in calls)
    hardware = f"{machine['name']} ({machine['device']}), {machine['platform']}"
    return f"{hardware}; {versions}; commit {commit}, source {header['source']}; {commands}"


def write(records: Sequence[Row], *, pending_file: Path = PENDING, page: Path = PAGE) -> None:
    assert not records or not records[0]["dry_run"], "a dry run confirms nothing"
    claims = load()
    pending_file.write_text(pending(records, claims), encoding="utf-8")
    replace_section(page, MARKER, confirmed(records, claims))

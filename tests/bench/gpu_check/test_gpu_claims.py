"""bench/results/claims.json against the sections of gpu-check, and what synthetic GPU rows write to PENDING.md and
RESULTS.md."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_check import base, conductor, journal, loss_model, pending, roofline, run
from bench.gpu_check.claims import fits, judge, load
from bench.gpu_check.sections import BY_NAME, SECTIONS, tasks_of

ROOT = Path(__file__).resolve().parents[3]
HEADER = {
    "kind": "header", "format": 2, "name": "gpu-check", "dry_run": False, "command": "python -m bench.gpu_check",
    "date": "2026-01-02T03:04:05+00:00", "machine": {"name": "NVIDIA H200", "device": "sm_90", "platform": "Linux"},
    "versions": {"torch": "2.13.0"}, "commit": "0123456789abcdef", "source": "feedbeef", "clocks": {},
}  # fmt: skip
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def same_settings() -> Iterator[None]:
    settings = torch.backends.cuda.matmul  # listing the tasks of lora_linear sets these
    before = settings.allow_bf16_reduced_precision_reduction, settings.allow_fp16_reduced_precision_reduction
    yield
    settings.allow_bf16_reduced_precision_reduction, settings.allow_fp16_reduced_precision_reduction = before


def tasks(kind: str) -> dict[str, list[Row]]:
    """The tasks of every section, on a GPU or in a dry run. Nothing runs."""
    device = base.Device(kind)
    return {s.name: [journal.plain(task.what) for task in tasks_of(s, device)] for s in SECTIONS}


def put(row: Row, path: list[str], value: Any) -> None:
    for name in path[:-1]:
        row = row.setdefault(name, {})
    row[path[-1]] = value


def within(rule: Row) -> Any:
    """A figure that keeps the rule: a ratio with its interval, or a number."""
    if rule["figure"][0] == "us":
        return [11_900.0, 12_000.0, 12_500.0]
    value = rule.get("equals", rule.get("at_least", rule.get("at_most", 3.0)))
    if rule["figure"][0] in ("ratio", "ratios", "eager_ratio", "over_dequant"):
        return {"value": value, "low": 0.99 * value, "high": 1.01 * value, "differs": value != 1.0}
    return value


def good() -> list[Row]:
    """The journal of a run that confirms every claim it can."""
    claims = [claim for claim in load() if claim.get("card", "H200") == "H200"]
    rules = [rule for claim in claims for rule in claim["rules"]]
    records: list[Row] = [copy.deepcopy(HEADER)]
    for section, whats in tasks("cuda").items():
        records.append({"kind": "begin", "section": section, "tasks": whats})
        for what in whats:
            row = {"kind": "row", "section": section, "task": what, "ok": True}
            for rule in rules:
                if "figure" in rule and rule["section"] == section and fits(rule, what):
                    put(row, rule["figure"], within(rule))
            records.append(row)
    return records


def states(records: list[Row]) -> dict[str, Any]:
    return {claim["id"]: judge(claim, records) for claim in load()}


def judged(claim: str, records: list[Row]) -> Any:
    return next(judge(c, records) for c in load() if c["id"] == claim)


def rows(records: list[Row], section: str, **task: Any) -> list[Row]:
    matching = [
        r for r in records if r["kind"] == "row" and r["section"] == section and task.items() <= r["task"].items()
    ]
    assert matching
    return matching


def test_claims_name_sections_and_tasks_that_exist() -> None:
    claims = load()
    assert len({claim["id"] for claim in claims}) == len(claims)
    there, dry = tasks("cuda"), tasks("cpu")
    for claim in claims:
        assert claim["part"] in ("correctness", "speed", "uncovered")
        assert not (claim["part"] == "uncovered" and claim["rules"])
        for rule in claim["rules"]:
            assert rule["section"] in there, claim["id"]
            fitting = [task for task in there[rule["section"]] if fits(rule, task)]
            for name, wanted in rule["match"].items():  # every value of a list occurs in a task
                seen = [task[name] for task in fitting]
                assert all(value in seen for value in (wanted if isinstance(wanted, list) else [wanted])), claim["id"]
            assert any(rule["match"].keys() <= task.keys() for task in dry[rule["section"]]), claim["id"]
    wrong = {"section": "dequant", "match": {"check": "nf4_dequantt"}}
    assert not any(fits(wrong, task) for task in there["dequant"])


def test_task_identities_are_unique_in_a_section() -> None:
    for section, whats in [*tasks("cuda").items(), *tasks("cpu").items()]:
        assert len({journal.identity(what) for what in whats}) == len(whats), section


def test_targets_of_claims_equal_those_of_roofline() -> None:
    bounds = {
        claim["id"]: [rule[name] for rule in claim["rules"] for name in ("at_least", "at_most") if name in rule]
        for claim in load()
    }
    model = roofline
    for claim, M, dropout in (
        ("layer", 8192, False),
        ("layer-dropout", 8192, True),
        ("layer-2048", 2048, False),
        ("layer-dropout-2048", 2048, True),
    ):
        assert bounds[claim] == [model.TARGET[M][dropout]]
    assert bounds["layer-ranks"] == list(model.RANKS_TARGET.values())
    assert bounds["nf4-speed"] == bounds["int8-speed"] == [model.DEQUANT_TARGET["large"], model.DEQUANT_TARGET["small"]]
    assert bounds["merge-speed"] == [model.MERGE_LIMIT]
    assert bounds["dropout-memory"] == [model.DROPOUT_MEMORY_TARGET] * 3
    assert bounds["training-step"] == [model.STEP_TARGET]
    assert [bounds["unsloth"], bounds["unsloth-2048"]] == [list(model.UNSLOTH_TARGET[M].values()) for M in (8192, 2048)]


def test_targets_of_losses_equal_those_of_the_loss_model() -> None:
    claimed = {}
    for rule in (rule for claim in load() for rule in claim["rules"]):
        if rule["section"].startswith("loss speed") and rule["figure"][0] in ("ratios", "times_less_memory"):
            case = rule["match"]["case"].removesuffix(", forward + backward")
            claimed[case, *rule["figure"]] = rule["at_least"]
    wanted = {}
    for case, timed in loss_model.TIMED.items():
        for name, (ratio, memory) in timed.targets.items():
            wanted[case, "ratios", name] = ratio
            if memory:
                wanted[case, "times_less_memory", name] = memory
    assert claimed == wanted


def test_targets_of_layers_are_within_the_roofline() -> None:
    """The target is at most a tenth below the model, for every card that a claim names."""
    model, checked = roofline, 0
    for claim in load():
        for rule in claim["rules"]:
            match = rule["match"]
            if match.get("case") == "seven linears of a Llama-3-8B layer" and "at_least" in rule:
                for rank in match["R"] if isinstance(match["R"], list) else [match["R"]]:
                    peft, built = (
                        model.layer_us(who, match["M"], rank, dropout=match["dropout"] > 0, card=claim["card"])
                        for who in ("PEFT", "built")
                    )
                    assert 0.88 * peft / built <= rule["at_least"] <= peft / built, claim["id"]
                    checked += 1
    assert checked == 12


def test_claims_with_rules_are_confirmed_by_a_good_run() -> None:
    records, claims = good(), load()
    verdicts = states(records)
    here = {claim["id"] for claim in claims if claim["rules"] and claim.get("card", "H200") == "H200"}
    for claim in claims:
        state = "confirmed" if claim["id"] in here else "open"
        assert verdicts[claim["id"]].state == state, (claim["id"], verdicts[claim["id"]])
    confirmed_page, left = pending.confirmed(records, claims), pending.pending(records, claims)
    assert (
        "NVIDIA H200 (sm_90)" in confirmed_page
        and "commit 012345678" in confirmed_page
        and "`python -m bench.gpu_check` on 2026-01-02" in confirmed_page
    )
    for claim in claims:
        assert (f"| {claim['what']} |" in confirmed_page) is (claim["id"] in here)
        assert (f"| {claim['what']} |" in left) is (claim["id"] not in here)
    # The page shows the prediction next to the measurement. The keys in which the rows differ name it.
    assert (
        "| `NF4 linears, 8,192 rows` | 1.24 (1.18 to 1.24); per linear 1.15 (down) to 1.48 (k, v) | 1.20 (1.19..1.21) |"
        in confirmed_page
    )
    assert (
        "| M=16 dropout=0: 3.00 (2.97..3.03), M=16 dropout=0.05: 3.00 (2.97..3.03), M=1 dropout=0: " in confirmed_page
    )
    assert "| full logits 1.30 (1.29..1.31); us 12,000 (11,900..12,500) |" in confirmed_page
    assert "card_gb=16: 6.00 GB" in confirmed_page and "## Failed" not in left


def test_pending_lists_missed_targets_and_red_rows_first() -> None:
    records = good()
    layer = rows(records, "NF4 linears, 8,192 rows", case="seven linears of a Llama-3-8B layer")
    layer[0]["ratio"] = {"value": 1.11, "low": 1.08, "high": 1.13, "differs": True}
    rows(records, "smoke recipe", quantize="nf4")[0] |= {"ok": False, "failed": "ValueError: no\ntraceback"}
    records.append(
        {"kind": "row", "section": "training loop", "ok": False, "failed": "the process ended with exit code -9"}
    )
    verdicts = states(records)
    assert {name for name, verdict in verdicts.items() if verdict.state == "failed"} == {
        "layer",
        "smoke",
        "training-loop",
        "witness",
    }
    assert verdicts["layer-dropout"].state == "confirmed"
    left = pending.pending(records, load())
    failed = left.index("## Failed")
    assert failed < left.index("## Correctness")
    table = left[failed : left.index("## Correctness")]
    assert "1.11 (1.08..1.13), expected at least 1.2 |" in table
    assert "red: smoke recipe quantize=nf4 (ValueError: no)" in table
    assert "red: `training loop` (the process ended with exit code -9)" in table
    confirmed_page = pending.confirmed(records, load())
    assert "adapted NF4 layer >= 1.20 x" not in confirmed_page and "adapted NF4 layer with dropout" in confirmed_page


@pytest.mark.parametrize(
    ("section", "task", "change", "claim", "state"),
    [
        # A ratio within noise of 1 reaches no target.
        ("dequant speed", {"case": "nf4_dequant", "shape": [4096, 4096]},
         {"ratio": {"value": 1.06, "low": 0.97, "high": 1.2, "differs": False}}, "nf4-speed", "failed"),
        # More than the limit, but not beyond noise.
        ("dequant speed", {"case": "nf4_dequant + r=16 merge", "shape": [4096, 4096]},
         {"over_dequant": {"value": 1.42, "low": 1.38, "high": 1.45, "differs": True}}, "merge-speed", "confirmed"),
        ("dequant speed", {"case": "nf4_dequant + r=16 merge", "shape": [4096, 4096]},
         {"over_dequant": {"value": 1.5, "low": 1.45, "high": 1.6, "differs": True}}, "merge-speed", "failed"),
        # A figure without a comparison confirms nothing.
        ("dequant", {"check": "int8_dequant", "dtype": "float16"},
         {"bit_equal_to_bitsandbytes": "bitsandbytes is not installed"}, "dequant-exact", "failed"),
        # Eight of 32 layers fit every card.
        ("distillation steps", {"card_gb": 12.0}, {"layers": 8}, "kd-step", "failed"),
        ("loss speed", {"case": "top-64 + tail, frozen head, forward + backward"}, {"ratios": {}}, "kd-loss-sparse", "open"),
        ("training steps", {"length": 8192}, {"ok": None}, "training-step", "open"),
    ],
)  # fmt: skip
def test_claim_with_one_fault_is_not_confirmed_beyond_noise(
    section: str, task: Row, change: Row, claim: str, state: str
) -> None:
    records = good()
    rows(records, section, **task)[0].update(change)
    verdict = judged(claim, records)
    assert verdict.state == state, verdict


def test_claim_stays_open_when_a_row_is_missing() -> None:
    records = good()
    records.remove(rows(records, "order of addition")[0])
    verdict = judged("order-of-addition", records)
    assert (verdict.state, verdict.note) == ("open", "7 of 8 rows green")
    assert "`order of addition`; 7 of 8 rows green |" in pending.pending(records, load())


def test_figures_count_only_if_their_own_gate_is_green() -> None:
    """If a row of correctness is missing or red, figures that depend on it stay open. The other figures count."""
    for spoil in ("missing", "red"):
        records = good()
        (row, *_) = rows(records, "linear losses")
        if spoil == "red":
            row["ok"] = False
        else:
            records.remove(row)
        verdicts = states(records)
        for name in ("ce-frozen", "kd-loss", "training-step", "kd-step", "training-loop"):
            assert verdicts[name].state == "open"
            assert verdicts[name].note.startswith("measured, but `linear losses` ")
        for name in ("layer", "nf4-speed", "order-of-addition", "lora-float16"):
            assert verdicts[name].state == "confirmed", name


def test_sections_of_tests_gate_no_figure() -> None:
    """Sections that use several ops together cannot say which one is wrong. Claims that such a section decides itself
    fail."""
    gates = {gate for section in SECTIONS for gate in section.stands_on}
    assert gates == {"dequant", "lora_linear bfloat16", "linear losses", "distillation"}
    records = good()
    for section in ("tests", "smoke recipe", "tiny models"):
        rows(records, section)[0]["ok"] = False
    verdicts, before = states(records), states(good())
    speed = [claim["id"] for claim in load() if claim["part"] == "speed"]
    assert [verdicts[name] for name in speed] == [before[name] for name in speed]
    assert verdicts["smoke"].state == verdicts["compile"].state == "failed"


def test_gates_run_in_the_same_wave_or_an_earlier_one() -> None:
    by_name = BY_NAME
    for section in SECTIONS:
        for gate in section.stands_on:
            assert not by_name[gate].timing and by_name[gate].wave <= section.wave
            assert section.timing, section.name


def test_claim_of_a_card_is_open_on_another_card() -> None:
    records = good()
    (claim,) = [c for c in load() if c["id"] == "layer"]
    assert claim["card"] == "H200" and judge(claim, records).state == "confirmed"
    records[0]["machine"]["name"] = "NVIDIA GeForce RTX 3090"
    verdict = judge(claim, records)
    assert (verdict.state, verdict.note) == ("open", "for a card other than NVIDIA GeForce RTX 3090")
    assert judged("dropout-memory", records).state == "confirmed", "a claim about bytes holds for any card"
    confirmed_page, left = (part(records, load()) for part in (pending.confirmed, pending.pending))
    assert f"| {claim['what']} | H200 |" in left and claim["what"] not in confirmed_page


def test_dry_run_confirms_no_claim(tmp_path: Path) -> None:
    records = good()
    records[0]["dry_run"] = True
    assert {verdict.state for verdict in states(records).values()} == {"open"}
    with pytest.raises(AssertionError, match="a dry run confirms nothing"):
        pending.write(records, pending_file=tmp_path / "PENDING.md", page=tmp_path / "RESULTS.md")
    assert not list(tmp_path.iterdir())


def test_later_row_replaces_an_earlier_one() -> None:
    """The row is red at first and green after --resume. A new begin removes the section's own complaint."""
    records = good()
    (smoke, *_) = rows(records, "smoke recipe", quantize="none")
    again = copy.deepcopy(smoke)
    smoke["ok"] = False
    (begun,) = [r for r in records if r["kind"] == "begin" and r["section"] == "smoke recipe"]
    records.append({"kind": "row", "section": "smoke recipe", "ok": None, "stopped": "1 rows did not fit the time"})
    assert judged("smoke", records).state == "failed" and "smoke recipe" not in journal.finished(records)
    records += [
        {"kind": "resumed", "command": "python -m bench.gpu_check --resume", "date": "2026-01-03", "clocks": {}}
    ]
    records += [begun, again]
    assert judged("smoke", records).state == "confirmed" and "smoke recipe" in journal.finished(records)
    assert "then `python -m bench.gpu_check --resume` on 2026-01-03" in pending.where(records)


def test_still_to_do_repeats_tasks_that_make_objects() -> None:
    def still(*green: str) -> list[str]:
        task = base.Task
        made = [task({"case": "model"}, dict, makes=True), task({"case": "one"}, dict), task({"case": "leave"}, dict, makes=True),
                task({"case": "two"}, dict)]  # fmt: skip
        names = {journal.identity({"case": name}) for name in green}
        return [task.what["case"] for task in run.still_to_do(made, names)]

    assert still() == ["model", "one", "leave", "two"]
    assert still("model", "one") == ["model", "leave", "two"]
    assert still("model", "leave", "two") == ["model", "one"]
    assert still("model", "one", "leave", "two") == []


def test_conductor_lost_names_the_unfinished_sections() -> None:
    """The sections that have begun decide it, also with --resume, when a section may have nothing left to write."""
    sections = [s for s in SECTIONS if s.group == "ops"]
    names = [s.name for s in sections]

    def lost(code: int | None, *begun: str) -> list[str]:
        return [s.name for s in conductor.lost(sections, code, set(begun))]

    assert lost(0, *names) == []
    assert lost(0, *names[:-1]) == names[-1:]
    assert lost(-11, *names[:2]) == names[1:], "the one that it died in may lack rows"
    assert lost(None) == names


def test_pending_and_results_files_match_the_committed_rows(tmp_path: Path) -> None:
    rows_file = ROOT / "bench" / "results" / "gpu_check.jsonl"
    records = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.exists() else []
    pending_file, page = tmp_path / "PENDING.md", tmp_path / "RESULTS.md"
    page.write_text((ROOT / "bench" / "RESULTS.md").read_text())
    pending.write(records, pending_file=pending_file, page=page)
    hint = "python -m bench.gpu_check --report writes it"
    assert pending_file.read_text() == (ROOT / "bench" / "results" / "PENDING.md").read_text(), hint
    assert page.read_text() == (ROOT / "bench" / "RESULTS.md").read_text(), hint
    claims = load()
    claims[0]["so_far"] = "by hope"
    assert pending.pending(records, claims) != pending_file.read_text()

"""Formats tables of result files and writes them between markers."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def where(result: dict[str, Any]) -> str:
    """Hardware, versions and commit of a result, as text. They come from ``records.provenance``."""
    names = ("torch", "transformers", "peft", "trl")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in names if name in result["versions"])
    hardware = result["hardware"]
    changed = f" with {result['changed_files']} changed files" if result["changed_files"] else ""
    memory = f"{hardware['memory_bytes'] / 2**30:.0f} GiB"
    return f"{hardware['cpu']}, {hardware['cores']} cores, {memory}; {versions}; commit {result['commit'][:9]}{changed}"


def spread(figure: dict[str, float], digits: int, unit: float = 1) -> str:
    """``median (smallest..largest)``."""
    median, low, high = (figure[k] / unit for k in ("median", "min", "max"))
    texts = [f"{v:,.{digits}f}" for v in (median, low, high)]
    return texts[0] if texts[1] == texts[2] else f"{texts[0]} ({texts[1]}..{texts[2]})"


def replace_section(path: Path, name: str, body: str) -> None:
    """Writes ``body`` between the markers ``<!-- name -->`` and ``<!-- /name -->`` of the file."""
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    path.write_text(text.replace(f"{begin}{section(text, name)}{end}", f"{begin}{body}{end}"), encoding="utf-8")


def section(text: str, name: str) -> str:
    """The text between the markers."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"expected {begin.strip()} and {end.strip()} once each")
    return text.partition(begin)[2].partition(end)[0]

"""``doctor``: what is installed, what this machine has, and what really works on it."""

from __future__ import annotations

from typing import Any

from peftlab.diagnosing.facts import Fact, all_facts


def doctor() -> dict[str, Any]:
    """The report: ``{"sections": [{"title", "facts": [{"name", "value", "status", "detail"}]}], "problems": int}``.

    status: ``ok``; ``note`` for what is absent or limited and may be so; ``problem`` for what will stop or surprise.
    """
    sections: dict[str, list[Fact]] = all_facts()
    return {
        "sections": [{"title": title, "facts": facts} for title, facts in sections.items()],
        "problems": sum(fact["status"] == "problem" for facts in sections.values() for fact in facts),
    }

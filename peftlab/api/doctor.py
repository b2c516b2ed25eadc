"""``doctor``: checks the installation and what works on this machine."""

from __future__ import annotations

from typing import Any

from peftlab.diagnosing.facts import Fact, all_facts


def doctor() -> dict[str, Any]:
    """Returns the report: ``{"sections": [{"title", "facts": [{"name", "value", "status", "detail"}]}], "problems": int}``.

    status: ``ok``; ``note`` for something missing or limited that is optional; ``problem`` for what will fail or mislead.
    """
    sections: dict[str, list[Fact]] = all_facts()
    return {
        "sections": [{"title": title, "facts": facts} for title, facts in sections.items()],
        "problems": sum(fact["status"] == "problem" for facts in sections.values() for fact in facts),
    }

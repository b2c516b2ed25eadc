"""What a measurement records about the code that it measures."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from peftlab.measuring import machine


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package in a repository, next to a note."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "note.md").write_text("one\n")
    who = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return package


def test_git_commit_is_marked_only_by_changes_of_measured_files(checkout: Path) -> None:
    clean = machine.git_commit(checkout)
    assert clean and clean == machine.git_commit(checkout, "package")
    (checkout.parent / "note.md").write_text("two\n")
    assert machine.git_commit(checkout) == f"{clean}+"
    assert machine.git_commit(checkout, "package") == clean
    (checkout / "new.py").write_text("")
    assert machine.git_commit(checkout, "package") == f"{clean}+"
    assert machine.changed_files(checkout, "package") == 1
    assert machine.changed_files(checkout, "package", "note.md") == 2


def test_git_commit_outside_of_a_checkout_is_none(checkout: Path, tmp_path: Path) -> None:
    stranger = checkout.parent / "environment"
    stranger.mkdir()
    (stranger / "__init__.py").write_text("")
    assert machine.git_commit(stranger) is None


def test_source_digest_changes_with_the_code(checkout: Path) -> None:
    def digest() -> str:
        return machine.source_digest(checkout.parent, ("package/*.py",))

    before = digest()
    (checkout.parent / "note.md").write_text("three\n")
    assert digest() == before
    (checkout / "__init__.py").write_text("x = 1\n")
    changed = digest()
    assert changed != before
    (checkout / "__init__.py").rename(checkout / "other.py")
    assert digest() not in (before, changed)

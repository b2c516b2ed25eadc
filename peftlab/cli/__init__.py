"""The command line: parses arguments, calls the public functions and prints their results."""

from __future__ import annotations

from peftlab.cli.app import main

__all__ = ["main"]

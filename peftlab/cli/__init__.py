"""The command line: thin, it parses, calls the public functions, and prints."""

from __future__ import annotations

from peftlab.cli.app import main

__all__ = ["main"]

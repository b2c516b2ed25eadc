"""The only door to ``peftlab_kernels``: the rest of the engine imports its ops from here."""

from __future__ import annotations

from peftlab_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]

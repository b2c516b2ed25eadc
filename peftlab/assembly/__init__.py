"""Resolves what a recipe names and builds runs from it. The layers below take plain values, not recipes.

Start with ``Assembly``: the layers above take one, or plain values.
"""

import os

# Set before torch is first imported. By default OpenMP threads spin for milliseconds before they sleep, which slows a
# shared machine to a crawl. Measured on 2 cores with the step of bench/studies/spin.py: 5,000 costs a single process
# nothing (421 tokens/s) and gives two concurrent processes 140 each; 1,000 costs 7 % alone; 20,000 gives 83 each.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

from peftlab.assembly.assembly import Assembly

__all__ = ["Assembly"]

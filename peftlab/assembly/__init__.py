"""A recipe with what it names, each found once; and what a run is made of. The last floor that reads recipe values.

``Assembly`` is where a reader begins: everything above takes one, or plain values.
"""

import os

# Read when torch is first imported, which every module here does. By default OpenMP threads spin for milliseconds
# before they sleep; when another process needs the cores, that turns a shared machine to a crawl. Measured on 2 cores
# with the step of bench/studies/spin.py: 5,000 costs nothing alone (421 tokens/s) and leaves two processes side by side
# 140 each, 1,000 costs 7 % alone, 20,000 leaves 83 each.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

from peftlab.assembly.assembly import Assembly

__all__ = ["Assembly"]

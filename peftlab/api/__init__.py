"""Everything the command line does, as functions."""

import os

# Read when torch is first imported, which every module here does. By default OpenMP threads spin for milliseconds
# before they sleep; when another process needs the cores, that turns a shared machine to a crawl: two SmolLM2 steps
# side by side on 2 cores ran at 6 tokens/s each, and at 170 with a short spin (bench/README.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

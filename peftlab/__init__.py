"""peftlab adapts and distills transformer models on one GPU or CPU: one recipe, one verb, a verified result."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Name -> module it comes from: importing peftlab does no work, torch is loaded by what needs it.
_EXPORTS = {
    "benchmark": "peftlab.api.benchmarking",
    "benchmark_quality": "peftlab.api.bench_quality",
    "compare_benchmarks": "peftlab.api.benchmarking",
    "Chat": "peftlab.api.inference",
    "check": "peftlab.api.check",
    "PeftlabError": "peftlab.errors",
    "Run": "peftlab.api.run",
    "distill": "peftlab.api.distilling",
    "doctor": "peftlab.api.doctor",
    "evaluate": "peftlab.api.inference",
    "load_recipe": "peftlab.recipe",
    "merge": "peftlab.api.merging",
    "open_run": "peftlab.api.run",
    "predict": "peftlab.api.inference",
    "recipe_names": "peftlab.recipe",
    "teach": "peftlab.api.teaching",
    "train": "peftlab.api.training",
}
__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from peftlab.api.bench_quality import benchmark_quality as benchmark_quality
    from peftlab.api.benchmarking import benchmark as benchmark
    from peftlab.api.benchmarking import compare_benchmarks as compare_benchmarks
    from peftlab.api.check import check as check
    from peftlab.api.distilling import distill as distill
    from peftlab.api.doctor import doctor as doctor
    from peftlab.api.inference import Chat as Chat
    from peftlab.api.inference import evaluate as evaluate
    from peftlab.api.inference import predict as predict
    from peftlab.api.merging import merge as merge
    from peftlab.api.run import Run as Run
    from peftlab.api.run import open_run as open_run
    from peftlab.api.teaching import teach as teach
    from peftlab.api.training import train as train
    from peftlab.errors import PeftlabError as PeftlabError
    from peftlab.recipe import load_recipe as load_recipe
    from peftlab.recipe import recipe_names as recipe_names


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'peftlab' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])

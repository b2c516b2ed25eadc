"""peftlab fine-tunes and distills transformer models on one GPU or CPU: one recipe, one command, a verified result."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Name -> module. Importing peftlab is cheap: modules, and torch, are imported on first use.
_EXPORTS = {
    "benchmark": "peftlab.api.benchmark",
    "benchmark_quality": "peftlab.api.benchmark_quality",
    "combine_adapters": "peftlab.api.combine_adapters",
    "compare_benchmarks": "peftlab.api.compare_benchmarks",
    "convert_adapter": "peftlab.api.convert_adapter",
    "Chat": "peftlab.api.chat",
    "check": "peftlab.api.check",
    "distill": "peftlab.api.distill",
    "doctor": "peftlab.api.doctor",
    "evaluate": "peftlab.api.evaluate",
    "extract_adapter": "peftlab.api.extract_adapter",
    "merge": "peftlab.api.merge",
    "plan": "peftlab.api.plan",
    "predict": "peftlab.api.predict",
    "show_adapter": "peftlab.api.show_adapter",
    "shrink_adapter": "peftlab.api.shrink_adapter",
    "teach": "peftlab.api.teach",
    "train": "peftlab.api.train",
    "tune_kernels": "peftlab.api.tune_kernels",
    "Run": "peftlab.runs",
    "open_run": "peftlab.runs",
    "load_recipe": "peftlab.recipe",
    "recipe_names": "peftlab.recipe",
    "PeftlabError": "peftlab.errors",
}
__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from peftlab.api.benchmark import benchmark as benchmark
    from peftlab.api.benchmark_quality import benchmark_quality as benchmark_quality
    from peftlab.api.chat import Chat as Chat
    from peftlab.api.check import check as check
    from peftlab.api.combine_adapters import combine_adapters as combine_adapters
    from peftlab.api.compare_benchmarks import compare_benchmarks as compare_benchmarks
    from peftlab.api.convert_adapter import convert_adapter as convert_adapter
    from peftlab.api.distill import distill as distill
    from peftlab.api.doctor import doctor as doctor
    from peftlab.api.evaluate import evaluate as evaluate
    from peftlab.api.extract_adapter import extract_adapter as extract_adapter
    from peftlab.api.merge import merge as merge
    from peftlab.api.plan import plan as plan
    from peftlab.api.predict import predict as predict
    from peftlab.api.show_adapter import show_adapter as show_adapter
    from peftlab.api.shrink_adapter import shrink_adapter as shrink_adapter
    from peftlab.api.teach import teach as teach
    from peftlab.api.train import train as train
    from peftlab.api.tune_kernels import tune_kernels as tune_kernels
    from peftlab.errors import PeftlabError as PeftlabError
    from peftlab.recipe import load_recipe as load_recipe
    from peftlab.recipe import recipe_names as recipe_names
    from peftlab.runs import Run as Run
    from peftlab.runs import open_run as open_run


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'peftlab' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])

"""Shared fixtures: the error-budget rule, tiny models that need no files, and an Accelerator on the CPU."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

# These must be set before any library reads them. A test that uses the network then fails at once instead of waiting.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Tiny models gain nothing from threads. On a busy machine, waiting for them costs 20 x the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. Triton reads the variable when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests import tiers

AUTO_CLASS = {"tiny:llama": "AutoModelForCausalLM", "tiny:bert": "AutoModelForSequenceClassification"}


def _assert_within_budget(actual: Any, eager: Any, truth: Any, *, slack: float) -> None:
    """The error budget of Cut Cross Entropy: a fast path may err as much as eager code of its dtype, plus a little.

    Args:
        actual: what is tested. eager: the plain program in the same dtype. truth: the plain program in float64.
        slack: allowed beyond the eager error, relative to the largest |truth|.
    """
    import torch

    assert actual.shape == eager.shape == truth.shape
    assert truth.dtype == torch.float64
    assert torch.isfinite(actual).all()
    if not truth.numel():
        return
    scale = float(truth.abs().max())
    error, allowed = (float((x.double() - truth).abs().max()) for x in (actual, eager))
    mean_error, mean_allowed = (float((x.double() - truth).abs().mean()) for x in (actual, eager))
    assert error <= allowed + slack * scale, f"max error {error:.3g}, eager {allowed:.3g}, scale {scale:.3g}"
    assert mean_error <= mean_allowed + slack * scale, f"mean error {mean_error:.3g}, eager {mean_allowed:.3g}"


def pytest_configure(config: pytest.Config) -> None:
    for tier in tiers.TIERS:
        config.addinivalue_line("markers", f"{tier}: set by tests/tiers.py, by what a test uses")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function):
            item.add_marker(tiers.tier_of(item))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items[:] = tiers.long_files_first(items)


GUARD = tiers.Guard()


class SmallHeap:
    """Keeps imported modules out of the cycle collector, for the whole session. A run collects garbage a dozen times, and
    would scan all of them each time: half of the time of tests/api/test_api_train.py alone."""

    def __init__(self) -> None:
        from peftlab.measuring.memory import frozen_heap

        self._num_modules = 0
        # A run of the tests finds the heap frozen, and leaves it so.
        self._frozen = contextlib.ExitStack()
        self._frozen.enter_context(frozen_heap())

    def begin(self) -> None:
        # The first test that uses a library imports many of its modules.
        if len(sys.modules) != self._num_modules:
            self._num_modules = len(sys.modules)
            gc.collect()
            gc.freeze()


HEAP = SmallHeap()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    GUARD.begin()
    HEAP.begin()
    return (yield)


@pytest.fixture(autouse=True)
def as_its_tier(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    tier = next(name for name in tiers.TIERS if request.node.get_closest_marker(name))
    assert not GUARD.wrong(tier), f"a test of the tier `{tier}` does this: {GUARD.wrong(tier)}; see tests/tiers.py"


@pytest.fixture
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """``run.kernels`` cpu-bf16 and cpu-int8 also run on processors without the units, slowly. bfloat16 is then not
    rounded, and an exact product replaces an int8 product that would saturate."""
    from peftlab_kernels import runtime

    from peftlab import ops

    def exact_product(a: Any, b: Any, *, out: Any = None) -> Any:
        product = a.int() @ b.int()
        return product if out is None else out.copy_(product)

    for module in (ops, runtime):
        monkeypatch.setattr(module, "operands_problem", lambda backend: None)
    if runtime.int8_saturates():
        monkeypatch.setattr(torch, "_int_mm", exact_product)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``tests.trained_runs.TrainedRuns``: finished runs that tests read. The workers of a session share them."""
    from tests.trained_runs import TrainedRuns

    base = tmp_path_factory.getbasetemp()
    runs = TrainedRuns((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained")
    yield runs
    runs.check()


@pytest.fixture
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report card of a distillation times the models for a moment instead of seconds."""
    from peftlab.experiments import card_figures as comparing

    monkeypatch.setattr(comparing, "_TIMED_SECONDS", 0.05)


@pytest.fixture(scope="session")
def process() -> Any:
    """``tests.processes.Processes``: starts Python processes as forks of one that has loaded the libraries."""
    from tests.processes import Processes

    return Processes()


@pytest.fixture(scope="session")
def assert_within_budget() -> Callable[..., None]:
    return _assert_within_budget


def _tiny(name: str, *, adapter: bool = True, dropout: float = 0.0, seed: int = 0, **options: Any) -> Any:
    """A tiny model. With ``adapter`` it has LoRA whose matrices are all non-zero, so that every gradient is non-zero."""
    import torch

    from peftlab.adapters import inject
    from peftlab.models import find_pretrained, load_model

    rank = options.pop("rank", 4)
    lora = {k: options.pop(k) for k in ("targets", "rslora", "dora", "bias", "modules_to_save") if k in options}
    model = load_model(find_pretrained(name), auto_class=AUTO_CLASS[name], device="cpu", **options)
    if not adapter:
        return model
    peft_type = "CAUSAL_LM" if name == "tiny:llama" else "SEQ_CLS"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = inject(model, "lora", peft_type=peft_type, rank=rank, alpha=8, dropout=dropout, **lora)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    return _tiny


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[[str], Any]:
    def load(name: str) -> Any:
        from peftlab.models import find_pretrained, load_tokenizer

        return load_tokenizer(find_pretrained(name))

    return load


@pytest.fixture
def accelerator() -> Iterator[Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)

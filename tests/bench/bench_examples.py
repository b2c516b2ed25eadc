"""Measurements of a benchmark that were never taken. The jobs answer at once, with speeds that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CEILINGS = {"status": "ok", "dtype": "float32", "matmul_flops_per_s": 1e11, "copy_bytes_per_s": 1e10}


class FakeJobs:
    """Stands for ``processes.launch``: notes what was asked for, and answers with constants.

    Attributes:
        asked: ``job`` and cell of each call. step_s: seconds of a step by (kernels, quantize). broken: (job, kernels) ->
            the answer in place of figures. stop_after: calls after which Ctrl-C is pressed.
    """

    def __init__(self, step_s: Mapping[tuple[str, str], float] | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self.step_s = step_s or {}
        self.broken: dict[tuple[str, str], dict[str, Any]] = {}
        self.first_loss = {"auto": 2.0, "reference": 2.0}
        self.stop_after: int | None = None

    def __call__(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        recipe = spec["recipe"]
        kernels, quantize = recipe["run"]["kernels"], recipe["model"]["quantize"]
        self.asked.append((spec["job"], f"{quantize}/{kernels}"))
        if (spec["job"], kernels) in self.broken:
            return self.broken[spec["job"], kernels]
        if spec["job"] == "ceilings":
            return dict(CEILINGS)
        if spec["job"] == "gate":
            return {"status": "ok", "num_trained": 10, "num_total": 100, "flops_per_step": 1e9, "loss": 2.0}
        seconds = self.step_s.get((kernels, quantize), 1.0) * (1 + 0.01 * (len(self.asked) % 3))
        peak = 100e6 if quantize == "nf4" else 200e6
        memory = {"load_peak_bytes": 1.5 * peak, "before_bytes": 0, "peak_bytes": peak, "increase_bytes": 1}
        return {
            "status": "ok",
            "step_s": [seconds] * (spec["steps"] - spec["warm_up"]),
            "memory": memory | {"reserved_bytes": 0},
            "joules": None,
            "load": 0.0,
            "num_fused": 14 if kernels == "auto" else 0,
            "num_adapted": 14,
            "slow": [] if kernels == "auto" else ["run.kernels=reference"],
            "losses": [self.first_loss[kernels]],
            "micro_batches": 1,
            "rows_per_step": spec["batch"],
            "tokens_per_step": spec["batch"] * spec["length"],
            "draws": False,
            "matmul_flops_per_s": 2e11,
        }

"""`peftlab doctor`: every fact has four texts, and anything broken becomes a row, never an exception."""

from __future__ import annotations

import importlib.metadata
import json
import socket
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from peftlab.api.doctor import doctor
from peftlab.diagnosing import facts as doctor_module
from peftlab.diagnosing.facts import GIB, PACKAGES, _gpus

TITLES = ["software", "device", "memory and disk", "quantization", "attention", "kernels", "model hub"]


def _facts(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {f"{section['title']}: {fact['name']}": fact for section in report["sections"] for fact in section["facts"]}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return doctor()


def test_doctor_report_has_sections_and_facts(report: dict[str, Any]) -> None:
    assert [section["title"] for section in report["sections"]] == TITLES
    facts = _facts(report)
    assert len(facts) == sum(len(section["facts"]) for section in report["sections"]), "names are unique in a section"
    for fact in facts.values():
        assert set(fact) == {"name", "value", "status", "detail"}
        assert all(isinstance(text, str) for text in fact.values())
        assert fact["status"] in {"ok", "note", "problem"}
        assert fact["value"], fact
        assert fact["status"] == "ok" or fact["detail"], f"without a reason: {fact}"
        assert "\n" not in "".join(fact.values())
    assert report["problems"] == sum(fact["status"] == "problem" for fact in facts.values())


def test_doctor_survives_json(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report


def test_doctor_this_environment_is_in_order(report: dict[str, Any]) -> None:
    facts = _facts(report)
    for name in PACKAGES:
        assert facts[f"software: {name}"]["value"] == importlib.metadata.version(name)
        assert facts[f"software: {name}"]["status"] == "ok"
    for kind in ("nf4", "int8"):
        assert facts[f"quantization: {kind}"]["status"] == "ok", facts[f"quantization: {kind}"]
    assert facts["attention: sdpa"]["value"] == "usable"
    assert facts["model hub: reachable"]["value"] == "not tried"


def test_doctor_names_the_backend_of_every_op_and_tries_one(report: dict[str, Any]) -> None:
    import peftlab_kernels

    facts = _facts(report)
    folders = {p.name for p in Path(peftlab_kernels.__path__[0]).iterdir() if (p / "op.py").is_file()}
    assert folders == {"int8_dequant", "linear_cross_entropy", "linear_kl", "lora_linear", "nf4_dequant"}
    for name in folders:
        assert facts[f"kernels: {name}"]["value"].startswith(("PyTorch", "Triton"))
    assert facts["kernels: lora_linear trial"]["status"] == "ok"


def test_doctor_wrong_kernel_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftlab import ops

    right = ops.lora_linear
    monkeypatch.setattr(ops, "lora_linear", lambda *a, **k: right(*a, **{**k, "scale": 1.0}))
    fact = _facts(doctor())["kernels: lora_linear trial"]
    assert fact["status"] == "problem"
    assert "train with run.kernels=reference" in fact["detail"]


def test_doctor_opens_no_connection_and_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("doctor opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    doctor()
    assert capsys.readouterr().out == ""


def test_doctor_missing_package_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in {"peft", "triton"}:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    facts = _facts(doctor())
    assert (facts["software: peft"]["value"], facts["software: peft"]["status"]) == ("missing", "problem")
    assert "no adapter" in facts["software: peft"]["detail"]
    assert (facts["software: triton"]["value"], facts["software: triton"]["status"]) == ("missing", "note")


def test_doctor_too_old_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "peft" else real(name))
    fact = _facts(doctor())["software: peft"]
    assert fact["status"] == "problem"
    assert "peftlab needs peft>=" in fact["detail"]


@pytest.mark.parametrize(
    ("module", "name", "status"),
    [
        ("bitsandbytes", "quantization: nf4", "note"),
        ("triton", "kernels: triton", "note"),
        ("torch", "device: torch", "problem"),
        ("peftlab.ops", "kernels: ops", "problem"),
        ("psutil", "memory and disk: RAM", "problem"),
    ],
)
def test_doctor_module_that_does_not_import_is_a_row(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, status: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    fact = _facts(doctor())[name]
    assert fact["status"] == status
    assert module in fact["detail"]


def _torch_with_gpu(**cuda: Any) -> Any:
    """A stand-in for torch on a machine with one GPU."""
    working = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda _: SimpleNamespace(name="A GPU", major=9, minor=0),
        "mem_get_info": lambda _: (20 * GIB, 24 * GIB),
        "is_bf16_supported": lambda including_emulation: True,
    }
    return SimpleNamespace(
        cuda=SimpleNamespace(**{**working, **cuda}),
        device=lambda *args: args,
        ones=lambda *_, device: SimpleNamespace(sum=lambda: SimpleNamespace(item=lambda: 8.0)),
        version=SimpleNamespace(cuda=None),
    )


def test_doctor_gpu_has_rows_for_name_memory_and_bf16() -> None:
    name, memory, bf16 = _gpus(_torch_with_gpu())
    assert (name["value"], name["detail"]) == ("A GPU", "compute capability 9.0")
    assert memory["value"] == "20.0 GiB free of 24.0 GiB"
    assert (bf16["value"], bf16["status"]) == ("yes", "ok")
    *_, bf16 = _gpus(_torch_with_gpu(is_bf16_supported=lambda including_emulation: False))
    assert (bf16["value"], bf16["status"]) == ("no", "note")


def test_doctor_gpu_that_fails_is_a_problem() -> None:
    def crash(_: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available")

    (fact,) = _gpus(_torch_with_gpu(mem_get_info=crash))
    assert fact["status"] == "problem"
    assert "no kernel image" in fact["detail"]


def test_doctor_driver_without_a_cuda_build_of_torch_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/somewhere/{name}")
    (fact,) = _gpus(_torch_with_gpu(is_available=lambda: False))
    assert fact["status"] == "problem"
    assert "CPU build" in fact["detail"]


def test_doctor_quantization_that_gives_wrong_numbers_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional as functional

    real = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *args: 0.5 * real(*args))
    fact = _facts(doctor())["quantization: nf4"]
    assert fact["status"] == "problem"
    assert "relative error" in fact["detail"]


def test_doctor_quantization_that_crashes_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional as functional

    def crash(*_: object) -> None:
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setattr(functional, "int8_vectorwise_quant", crash)
    fact = _facts(doctor())["quantization: int8"]
    assert fact["status"] == "problem"
    assert "RuntimeError: no kernel image is available" in fact["detail"]


def test_doctor_import_of_bitsandbytes_gets_no_code_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_kernels = ModuleType("kernels")
    seen: list[object] = []
    real = importlib.import_module

    def spy(name: str) -> ModuleType:
        if name == "bitsandbytes":
            seen.append(sys.modules.get("kernels", "would be looked for"))
        return real(name)

    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.setattr(importlib, "import_module", spy)
    doctor()
    assert seen == [None, None]
    assert "kernels" not in sys.modules
    monkeypatch.setitem(sys.modules, "kernels", hub_kernels)
    doctor()
    assert sys.modules["kernels"] is hub_kernels


def test_doctor_reports_the_size_of_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache" / "deep").mkdir(parents=True)
    (tmp_path / "cache" / "deep" / "file").write_bytes(b"x" * (1 << 20) * 103)
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    fact = _facts(doctor())["memory and disk: cache"]
    assert fact["value"] == str(tmp_path / "cache")
    assert fact["detail"] == "0.1 GiB used"
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "not" / "there"))
    assert _facts(doctor())["memory and disk: cache"]["detail"] == "0.0 GiB used"


def test_doctor_reports_an_offline_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fact = _facts(doctor())["model hub: reachable"]
    assert (fact["value"], fact["status"]) == ("not tried", "note")


def test_doctor_reports_the_matrix_units_of_a_processor(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftlab import ops

    here = _facts(report)
    assert {f"kernels: {name}" for name in ops.CPU_OPERANDS} <= set(here) or _gpus_here()
    monkeypatch.setattr(
        ops, "operands_problem", lambda name: "the processor has none of AMX" if name == "cpu-bf16" else None
    )
    bf16, int8 = (doctor_module._operands(ops, name) for name in ("cpu-bf16", "cpu-int8"))
    assert (bf16["status"], bf16["detail"]) == ("note", "the processor has none of AMX")
    assert (int8["value"], int8["detail"]) == ("usable", "faster: run.kernels=cpu-int8 with model.quantize=int8")


def _gpus_here() -> bool:
    import torch

    return torch.cuda.is_available()

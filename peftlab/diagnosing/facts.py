"""The facts of ``peftlab doctor``: installed packages, hardware, and what works on this machine.

Everything that is quick to try is tried: quantization makes a round trip, attention and the GPU compute something small.
Nothing uses the network.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any, Literal, TypedDict

from peftlab.errors import ArtifactError
from peftlab.models import import_bitsandbytes
from peftlab.paths import cache_root, kernel_plans_file

Status = Literal["ok", "note", "problem"]

# Package -> what does not work without it.
PACKAGES = {
    "torch": "nothing can be trained or evaluated",
    "transformers": "no model can be loaded",
    "peft": "no adapter can be made",
    "accelerate": "training cannot start",
    "bitsandbytes": "model.quantize: nf4 and int8 cannot be used; quantize: none can",
    "triton": "fused kernels cannot run; the reference path in PyTorch is used",
    "datasets": "no data can be read",
    "evaluate": "no metric can be computed",
    "tokenizers": "no tokenizer can be loaded",
    "safetensors": "no weights can be read or saved",
}
USEFUL_WITHOUT = {"bitsandbytes", "triton"}

GIB = 1024**3
LOW_DISK_BYTES = 10 * GIB
# Relative root mean square error for normally distributed values; twice that of a working build.
ROUND_TRIP_BOUNDS = {"nf4": 0.2, "int8": 0.02}
# Maximum relative error of a small adapted linear in float32; on a GPU its products may run in TF32.
LORA_TRIAL_BOUND = 5e-3


class Fact(TypedDict):
    name: str
    value: str
    status: Status
    detail: str


def all_facts() -> dict[str, list[Fact]]:
    """Returns the facts by section."""
    # A library that prints to stdout would corrupt the JSON document.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            torch = importlib.import_module("torch")
        except Exception as error:
            # A broken installation raises OSError and others; report any error.
            device = [_fact("torch", "cannot be imported", "problem", _reason(error)), *_cpu()]
            quantization = attention = kernels = [_fact("all", "unknown", "note", "torch cannot be imported")]
        else:
            threads = _fact("CPU threads of torch", str(torch.get_num_threads()))
            device = [*_gpus(torch), *_cpu(), threads]
            quantization = [_round_trip(torch, kind) for kind in ROUND_TRIP_BOUNDS]
            attention = _attention(torch)
            kernels = _kernels(torch)
        return {
            "software": _software(),
            "device": device,
            "memory and disk": _space(),
            "quantization": quantization,
            "attention": attention,
            "kernels": kernels,
            "model hub": [_hub()],
        }


def _fact(name: str, value: str, status: Status = "ok", detail: str = "") -> Fact:
    return {"name": name, "value": value, "status": status, "detail": detail}


def _reason(error: BaseException) -> str:
    """Returns one line: the error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


def _software() -> list[Fact]:
    try:
        own = _fact("peftlab", importlib.metadata.version("peftlab"))
    except importlib.metadata.PackageNotFoundError:
        own = _fact("peftlab", "not installed", "note", "runs from a source folder")
    return [
        own,
        _fact("Python", platform.python_version(), detail=sys.executable),
        _fact("operating system", platform.platform()),
        *(_package(name, without) for name, without in PACKAGES.items()),
    ]


def _package(name: str, without: str) -> Fact:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _fact(name, "missing", "note" if name in USEFUL_WITHOUT else "problem", f"{without}; pip install {name}")
    wanted = _wanted(name)
    if wanted is not None and not wanted.contains(version, prereleases=True):
        return _fact(name, version, "problem", f"peftlab needs {name}{wanted}")
    return _fact(name, version)


def _wanted(name: str) -> Any:
    """Returns the version specifier for ``name`` in peftlab's metadata; None if missing."""
    with contextlib.suppress(ImportError, importlib.metadata.PackageNotFoundError):
        requirements = importlib.import_module("packaging.requirements")
        for text in importlib.metadata.requires("peftlab") or []:
            requirement = requirements.Requirement(text)
            if requirement.name == name and "extra" not in text:
                return requirement.specifier
    return None


def _gpus(torch: Any) -> list[Fact]:
    if torch.cuda.is_available():
        return [fact for index in range(torch.cuda.device_count()) for fact in _gpu(torch, index)]
    if not (Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")):
        return [_fact("GPU", "none", "note", "runs use the CPU: correct but slow")]
    cuda = torch.version.cuda
    why = (
        f"torch, built for CUDA {cuda}, finds no device" if cuda else "this torch is a CPU build: install a CUDA build"
    )
    return [_fact("GPU", "not usable", "problem", f"an NVIDIA driver is installed, but {why}")]


def _gpu(torch: Any, index: int) -> list[Fact]:
    name = f"GPU {index}"
    try:
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        torch.ones(8, device=device).sum().item()
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    except Exception as error:
        return [_fact(name, "fails", "problem", _reason(error))]
    half = _fact(f"{name} bfloat16", "yes")
    if not bf16:
        half = _fact(f"{name} bfloat16", "no", "note", "dtype and precision auto use float32; float16 can be requested")
    return [
        _fact(name, properties.name, detail=f"compute capability {properties.major}.{properties.minor}"),
        _fact(f"{name} memory", f"{_gib(free)} free of {_gib(total)}"),
        half,
    ]


def _cpu() -> list[Fact]:
    lines = _read("/proc/cpuinfo").splitlines()
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = set(entries.get("flags", entries.get("Features", "")).split())
    names = {"avx2": "AVX2", "avx512f": "AVX512", "avx512_bf16": "AVX512-bf16", "amx_bf16": "AMX-bf16", "bf16": "bf16"}
    present = [label for flag, label in names.items() if flag in flags]
    instructions = _fact("CPU instructions", ", ".join(present) or "unknown")
    if not any(label.endswith("bf16") for label in present):
        instructions["status"], instructions["detail"] = "note", "no native bfloat16: float32 is faster"
    return [
        _fact("CPU", entries.get("model name") or platform.processor() or platform.machine()),
        _fact("CPU cores", f"{usable} usable"),
        instructions,
    ]


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _space() -> list[Fact]:
    free = shutil.disk_usage(Path.cwd()).free
    disk = _fact("disk, working folder", f"{_gib(free)} free", detail=str(Path.cwd()))
    if free < LOW_DISK_BYTES:
        disk["status"], disk["detail"] = "note", f"{Path.cwd()}: a merged model is as large as the original"
    root = cache_root()
    existing = next(folder for folder in [root, *root.parents] if folder.exists())
    cache = _fact("cache", str(root), detail=f"{_gib(_folder_bytes(root))} used")
    if not os.access(existing, os.W_OK):
        cache["status"], cache["detail"] = "problem", "not writable; set PEFTLAB_CACHE to a writable folder"
    return [_ram(), disk, cache]


def _ram() -> Fact:
    try:
        memory = importlib.import_module("psutil").virtual_memory()
    except ImportError as error:
        return _fact("RAM", "unknown", "problem", _reason(error))
    # In a container the kernel reports the whole machine; the control group has the limit.
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdigit() and used.isdigit() and int(limit) < memory.total:
        free = min(memory.available, int(limit) - int(used))
        return _fact("RAM", f"{_gib(free)} free of {_gib(int(limit))}", detail="limit of this container")
    return _fact("RAM", f"{_gib(memory.available)} free of {_gib(memory.total)}")


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


def _round_trip(torch: Any, kind: str) -> Fact:
    """Quantizes and dequantizes 64 x 64 normally distributed values on the device of a run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        functional = import_bitsandbytes().functional
        values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
        if kind == "nf4":
            back = functional.dequantize_4bit(*functional.quantize_4bit(values, quant_type="nf4"))
        else:
            back = functional.int8_vectorwise_dequant(*functional.int8_vectorwise_quant(values)[:2])
        ratio = ((back.float() - values.float()).norm() / values.float().norm()).item()
    except ImportError as error:
        return _fact(kind, "not available", "note", f"bitsandbytes cannot be imported: {_reason(error)}")
    except Exception as error:
        return _fact(kind, "does not work", "problem", f"on {device}: {_reason(error)}")
    if not ratio < ROUND_TRIP_BOUNDS[kind]:
        detail = f"on {device}: relative error {ratio:.3f} in a round trip, expected below {ROUND_TRIP_BOUNDS[kind]}"
        return _fact(kind, "does not work", "problem", detail)
    return _fact(kind, f"works on {device}", detail=f"relative error {ratio:.3f} in a round trip")


def _attention(torch: Any) -> list[Fact]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.ones(1, 1, 4, 8, device=device)
        torch.nn.functional.scaled_dot_product_attention(probe, probe, probe, is_causal=True)
        sdpa = _fact("sdpa", "usable")
    except Exception as error:
        sdpa = _fact("sdpa", "does not work", "problem", _reason(error))
    flex = _fact("flex_attention", "usable")
    if device == "cpu":
        flex = _fact("flex_attention", "not usable", "note", "torch has no backward for it on the CPU")
    return [_fact("eager", "usable"), sdpa, _flash_attention(device), flex]


def _flash_attention(device: str) -> Fact:
    name = "flash_attention_2"
    if device != "cuda":
        return _fact(name, "not usable", "note", "needs a CUDA device")
    try:
        module = importlib.import_module("flash_attn")
    except Exception as error:
        return _fact(name, "not usable", "note", f"optional package flash-attn: {_reason(error)}")
    return _fact(name, "usable", detail=f"flash-attn {getattr(module, '__version__', 'of unknown version')}")


def _kernels(torch: Any) -> list[Fact]:
    try:
        ops = importlib.import_module("peftlab.ops")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        facts = [_fact(name, path, detail=why) for name, (path, why) in sorted(ops.kernel_paths(device).items())]
        facts += [_plans(torch, ops, device), _lora_trial(torch, ops, device)]
        facts += [_operands(ops, name) for name in ops.CPU_OPERANDS if device == "cpu"]
    except Exception as error:
        facts = [_fact("ops", "do not work", "problem", _reason(error))]
    try:
        facts.append(_fact("triton", "imports", detail=f"version {importlib.import_module('triton').__version__}"))
    except Exception as error:
        facts.append(_fact("triton", "cannot be imported", "note", _reason(error)))
    return facts


def _operands(ops: Any, name: str) -> Fact:
    problem = ops.operands_problem(name)
    weights = " with model.quantize=int8" if name == "cpu-int8" else ""
    return _fact(
        name,
        *(("not usable", "note", problem) if problem else ("usable", "ok", f"faster: run.kernels={name}{weights}")),
    )


def _plans(torch: Any, ops: Any, device: str) -> Fact:
    """Reports whether plans of adapted linears were measured for this device."""
    file = kernel_plans_file()
    if not os.path.exists(file):
        return _fact("plans", "by rule", detail=f"`peftlab bench tune-kernels` writes measured plans to {file}")
    try:
        rows = ops.read_plans(file)
    except ArtifactError as error:
        return _fact("plans", "damaged", "problem", str(error))
    own = ops.plan_key("dense", torch.device(device), M=1, N=1, K=1, dropout=False).device
    here = sum(row["device"] == own for row in rows)
    if not here:
        return _fact("plans", "by rule", detail=f"{file} has no plans for {own}")
    return _fact("plans", f"{here} measured plan{'' if here == 1 else 's'}", detail=str(file))


def _lora_trial(torch: Any, ops: Any, device: str) -> Fact:
    """Compares a small adapted linear, forward and backward, with the formula."""
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b = (
        torch.randn(shape, generator=generator).to(device) for shape in ((64, 128), (96, 128), (16, 128), (96, 16))
    )
    a.requires_grad_()
    fast = ops.lora_linear(x, ops.DenseWeight(weight), a, b, scale=0.5)
    plain = ops.lora_linear_reference(x, weight, a, b, scale=0.5)
    pairs = [(fast, plain), *zip(torch.autograd.grad(fast.sum(), a), torch.autograd.grad(plain.sum(), a), strict=True)]
    error = max(float((y - want).detach().abs().max() / want.detach().abs().max()) for y, want in pairs)
    good = error < LORA_TRIAL_BOUND
    detail = "" if good else f"expected at most {LORA_TRIAL_BOUND:g}; train with run.kernels=reference"
    return _fact("lora_linear trial", f"error {error:.1g}", "ok" if good else "problem", detail)


def _hub() -> Fact:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return _fact("reachable", "not tried", "note", "HF_HUB_OFFLINE is set: hub names work only from the cache")
    return _fact(
        "reachable", "not tried", detail="doctor does not use the network; a hub name is downloaded on first use"
    )

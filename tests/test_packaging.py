"""What is installed, and that our folder `kernels` never hides the package of that name which transformers imports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Where the files of a package are in the repository; `package-dir` must match.
SOURCES = {"peftlab": "peftlab", "peftlab.recipes": "recipes", "peftlab_kernels": "kernels/peftlab_kernels"}
# `python -m pytest` and `python -c` put the working folder first. pyproject's pythonpath adds the two roots.
SEARCH_PATH = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])


def _python(code: str, *, cwd: Path, path: str) -> str:
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def _pip(*arguments: str | Path, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _is_source(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


def _files_to_install() -> dict[str, Path]:
    """Path in the wheel -> path in the repository, for every file of our packages."""
    files: dict[str, Path] = {}
    for package, folder in SOURCES.items():
        for path in filter(_is_source, (ROOT / folder).rglob("*")):
            relative = path.relative_to(ROOT / folder)
            # The kernels' README.md files are for readers of the repository.
            if package != "peftlab_kernels" or path.suffix != ".md":
                files[f"{package.replace('.', '/')}/{relative.as_posix()}"] = path
    return files


def test_torch_adds_a_product_to_a_sum_in_float32() -> None:
    """The gradient of a trained head uses this on CUDA. Before 2.10, addmm required a sum of the type of the factors
    (pytorch#167931); 2.6 and 2.7 have no out_dtype."""
    (torch_requirement,) = (
        r for r in map(Requirement, PYPROJECT["project"]["dependencies"]) if canonicalize_name(r.name) == "torch"
    )
    assert not any(torch_requirement.specifier.contains(version) for version in ("2.6.0", "2.8.0", "2.9.1"))
    assert torch_requirement.specifier.contains("2.10.0")
    import torch

    total = torch.empty(8, 4, device="meta")
    one, other = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((8, 6), (6, 4)))
    for product in (
        torch.addmm(total, one, other, out_dtype=torch.float32, out=total),
        torch.mm(one, other, out_dtype=torch.float32, out=total),
    ):
        assert product.dtype == torch.float32 and product.shape == total.shape


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


def test_find_spec_kernels_never_gives_our_code(tmp_path: Path) -> None:
    """A folder without __init__.py is a namespace: it has no code, and any installed package takes precedence."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    origin = _python(code, cwd=ROOT, path=SEARCH_PATH)
    assert origin == "None" or ROOT not in Path(origin).parents or ".venv" in Path(origin).parts

    installed = tmp_path / "kernels" / "__init__.py"
    installed.parent.mkdir()
    installed.touch()
    assert _python(f"import sys; sys.path.append({str(tmp_path)!r}); {code}", cwd=ROOT, path=SEARCH_PATH) == str(
        installed
    )


def test_transformers_imports_a_model_from_the_root() -> None:
    code = (
        "from transformers import LlamaForCausalLM; from transformers.utils import is_kernels_available; "
        "print(is_kernels_available() in (True, False))"
    )
    assert _python(code, cwd=ROOT, path=SEARCH_PATH) == "True"


def test_package_list_equals_the_tree() -> None:
    setuptools = PYPROJECT["tool"]["setuptools"]
    assert setuptools["package-dir"] == SOURCES
    in_tree = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for package, folder in SOURCES.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) ^ in_tree == set(), "in the list or in the tree, but not in both"


def test_modules_all_lie_in_a_package() -> None:
    lost = [
        str(path.relative_to(ROOT))
        for path in _files_to_install().values()
        if path.suffix == ".py" and not (path.parent / "__init__.py").exists()
    ]
    assert not lost, f"no __init__.py beside {lost}: an installed peftlab would lack them"


def test_constraints_pin_what_the_project_asks_for() -> None:
    lines = [
        line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    loose = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*(\.post[0-9]+)?", line)]
    assert not loose, "each line is NAME==VERSION, without a local version such as +cpu"
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    project = PYPROJECT["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)], prereleases=True), text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree, because building leaves build/ and egg-info next to the sources."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in ("peftlab", "kernels", "recipes", "tests", "bench"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "-q", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, cwd=copy)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside ^ set(_files_to_install()) == set(), "in the wheel or in the tree, but not in both"
    assert "peftlab/py.typed" in inside
    assert {name.split("/")[0] for name in inside} == {"peftlab", "peftlab_kernels"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_installed_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    _pip("install", "-q", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    code = """
import importlib.resources, peftlab, peftlab_kernels
print(peftlab.__file__)
print(peftlab_kernels.__file__)
for file in importlib.resources.files("peftlab.recipes").iterdir():
    if file.name.endswith((".yaml", ".jsonl")):
        print(file.name, len(file.read_text(encoding="utf-8")) > 0)
"""
    first, second, *recipes = _python(code, cwd=tmp_path, path=str(target)).splitlines()
    assert target in Path(first).parents
    assert target in Path(second).parents
    shipped = sorted(p.name for p in (ROOT / "recipes").iterdir() if p.suffix in {".yaml", ".jsonl"})
    assert sorted(recipes) == [f"{name} True" for name in shipped]

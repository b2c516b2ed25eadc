"""The picture: a point for each measured cell, numbers that cover nothing, and valid files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from peftlab.bench.figure import build_figure, draw_picture
from peftlab.bench.summary import summarize
from peftlab.bench.sweep import Facts, cells_of, impossible, make_sweep
from tests.bench.bench_examples import CEILINGS, FakeJobs


@pytest.fixture
def document() -> dict[str, Any]:
    """Two methods, two storages, both paths, training and generation; full fine-tuning cannot exist on NF4."""
    sweep = make_sweep(
        what=["train", "generate"],
        methods=["lora", "full"],
        ranks=[8, 16],
        quantize=["none", "nf4"],
        kernels=["reference", "auto"],
        batch=[2],
        length=[16],
        adapters=[1],
    )
    jobs = FakeJobs({("auto", "none"): 0.5, ("auto", "nf4"): 0.8})
    cells, records = cells_of(sweep), [{"kind": "ceilings", **CEILINGS}]
    reasons = {c.key: why for c in cells if (why := impossible(c, Facts("causal_lm", 128, 32)))}
    for cell in cells:
        recipe = {"run": {"kernels": cell.kernels}, "model": {"quantize": cell.quantize}}
        spec = {"recipe": recipe, "batch": 2, "length": 16, "steps": 3, "warm_up": 1}
        if cell.key not in reasons:
            records.append({"kind": "gate", "cell": cell.key, **jobs({"job": "gate", **spec})})
            for i in range(3):
                records.append({"kind": "run", "cell": cell.key, "repetition": i, **jobs({"job": "run", **spec})})
    header = {
        "machine": {"device": "cpu", "name": "Some Processor", "threads": 2},
        "versions": {"torch": "2.13.0", "peft": "0.21.2"},
        "unit": {"model": "tiny:llama"},
        "protocol": {"repeats": 3, "steps": 2, "warm_up": 1},
    }
    return {"header": header, "ceilings": CEILINGS, "cells": summarize(cells, reasons, records)}


def test_figure_has_a_point_for_each_measured_cell(document: dict[str, Any]) -> None:
    figure = build_figure(document)
    measured = [c for c in document["cells"] if c["status"] == "ok"]
    assert len(measured) == 20 and len(document["cells"]) == 24
    points = [len(axes.containers) for axes in figure.axes]
    assert points == [10, 10], "an error-bar container is a point"
    train = figure.axes[0]
    assert train.get_xlabel() == "peak memory (MB), smaller is better"
    assert train.get_ylabel() == "tokens/s, larger is better"
    assert figure.get_suptitle() == "tiny:llama: speed against memory"
    assert any("Some Processor, 2 threads; torch 2.13.0" in text.get_text() for text in figure.texts)
    front = next(line for line in train.lines if line.get_label() == "_front")
    assert len(front.get_xdata()) == sum(c["pareto"] for c in measured if c["what"] == "train")


def test_figure_texts_are_whole_and_do_not_overlap(document: dict[str, Any]) -> None:
    figure = build_figure(document)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    width, height = figure.canvas.get_width_height()
    for axes in figure.axes:
        numbers = [text for text in axes.texts if text.get_text().isdigit()]
        boxes = [text.get_window_extent(renderer) for text in numbers]
        overlaps = [(i, j) for i in range(len(boxes)) for j in range(i) if boxes[i].overlaps(boxes[j])]
        assert not overlaps, [(numbers[i].get_text(), numbers[j].get_text()) for i, j in overlaps]
    for text in [*figure.texts, *(t for axes in figure.axes for t in [*axes.texts, axes.title, axes.xaxis.label])]:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text.get_text()


def test_draw_picture_writes_valid_repeatable_files(document: dict[str, Any], tmp_path: Path) -> None:
    png, svg = tmp_path / "bench.png", tmp_path / "bench.svg"
    assert draw_picture(document, png, svg)
    with Image.open(png) as image:
        image.verify()
        assert image.format == "PNG" and image.width == 1500
    assert svg.read_text().startswith("<?xml")
    assert sorted(tmp_path.iterdir()) == [png, svg]
    first = svg.read_bytes()
    draw_picture(document, png, svg)
    assert svg.read_bytes() == first


def test_draw_picture_without_figures_writes_nothing(document: dict[str, Any], tmp_path: Path) -> None:
    red = {**document, "cells": [c for c in document["cells"] if c["status"] != "ok"]}
    assert not draw_picture(red, tmp_path / "bench.png", tmp_path / "bench.svg")
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_imported_only_when_drawing() -> None:
    code = "import sys, peftlab.bench.figure; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Accuracy of a linear probe on a student's sentence embeddings, compared with its teacher's.

    python -m bench.studies.embedding_probe TEACHER STUDENT [--train 1500] [--test 700] [--seed 0] [--out FILE.json]

TEACHER and STUDENT: model folders or package:IMPORT_NAME/PATH. The probe is scikit-learn's logistic regression on the
vectors. It predicts which of eight packages a docstring comes from (their names are masked; see `docstrings:` in
peftlab/data/builtin.py). With the default sizes its rows are not those on which the recipe minilm-student evaluates.
The program prints JSON: both accuracies with 95 % intervals over the test rows, and the share that the student keeps.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from peftlab.api.predict import predict
from peftlab.data import load_rows
from peftlab.evaluation import row_metrics
from peftlab.measuring.intervals import bootstrap
from peftlab.training.progress import SilentProgress

PACKAGES = "torch,transformers,sympy,scipy,pandas,sklearn,networkx,numpy"


def vectors(model: str, texts: list[str]) -> np.ndarray:
    """[N, H] embeddings, with the pooling that the model's files name."""
    recipe = {
        "task": "embedding",
        "model": {"name": model},
        "data": {"train": f"docstrings:{PACKAGES}", "max_length": 64, "too_long": "truncate"},
        "run": {"device": "cpu"},
    }
    records = predict(model, texts, recipe=recipe, overrides=["run.device=cpu"], progress=SilentProgress())
    return np.array([record["vector"] for record in records])


def table(document: dict[str, Any]) -> str:
    def interval_text(interval: dict[str, Any], unit: float, digits: int) -> str:
        value, low, high = (f"{unit * interval[name]:.{digits}f}" for name in ("value", "low", "high"))
        return f"{value} ({low}..{high})"

    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    rows = document["rows"]
    accuracy = {who: interval_text(document[who]["accuracy"], 1, 3) for who in ("teacher", "student")}
    return "\n".join(
        [
            "| accuracy of the probe | teacher | student | kept, % | majority class |",
            "|---|---|---|---|---|",
            f"| {rows['train']:,} rows to fit, {rows['test']:,} to score | {accuracy['teacher']} | {accuracy['student']} | "
            f"{interval_text(document['kept'], 100, 1)} | {document['majority']:.3f} |",
            "",
            f"{document['cores']} cores; {versions}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("--train", type=int, default=1500, metavar="N")
    parser.add_argument("--test", type=int, default=700, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = {
        part: load_rows(f"docstrings:{PACKAGES}:{part}#{count}", seed=options.seed + 1)
        for part, count in (("train", options.train), ("test", options.test))
    }
    labels = {part: np.array(data.columns["label"]) for part, data in rows.items()}
    hits, report = {}, {}
    for who, model in (("teacher", options.teacher), ("student", options.student)):
        started = time.perf_counter()
        inputs = {part: vectors(model, data.columns["text"]) for part, data in rows.items()}
        probe = LogisticRegression(C=10.0, max_iter=2000).fit(inputs["train"], labels["train"])
        hits[who] = probe.predict(inputs["test"]) == labels["test"]
        report[who] = {"model": model, "width": inputs["train"].shape[1], "seconds": time.perf_counter() - started}
    accuracy = bootstrap({who: row_metrics.mean(hit) for who, hit in hits.items()}, options.test, shares=set(hits))
    document: dict[str, Any] = {
        **{who: {**report[who], "accuracy": accuracy[who].interval().as_dict()} for who in hits},
        "kept": accuracy["student"].over(accuracy["teacher"]).interval().as_dict(),
        "rows": {part: len(labels[part]) for part in labels},
        "majority": float(np.mean(labels["test"] == max(set(labels["train"]), key=list(labels["train"]).count))),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "scikit-learn")},
        "cores": os.cpu_count(),
    }
    text = json.dumps(document, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Hub data sets without a hub, with a stand-in for ``load_dataset``, and the errors if the hub is out of reach."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from peftlab.data import load_rows
from peftlab.errors import DataError


def error(name: str, **options: Any) -> tuple[str, str | None]:
    with pytest.raises(DataError) as info:
        load_rows(name, **options)
    return str(info.value), info.value.key


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls of load_dataset so far. Its hub has the data set owner/name, with 10 rows in train and 4 in test."""
    import datasets

    for split, count in (("train", 10), ("test", 4)):
        table = datasets.Dataset.from_dict({"text": [f"{split} {i}" for i in range(count)], "label": [0] * count})
        table.to_parquet(tmp_path / "hub" / f"{split}.parquet")
    load_dataset = datasets.load_dataset
    calls: list[tuple[Any, ...]] = []

    def from_disk(hub_id: str, subset: str | None, *, split: str) -> datasets.Dataset:
        calls.append((hub_id, subset, split))
        return load_dataset(str(tmp_path / "hub"), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_disk)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return calls


def test_hub_data_set_with_splits_subsets_and_samples(hub: list[tuple[Any, ...]]) -> None:
    rows = load_rows("owner/name")
    assert rows.columns == {"text": [f"train {i}" for i in range(10)], "label": [0] * 10}
    assert rows.where(9) == "owner/name:train, record 10"
    assert len(rows.fingerprint) >= 16
    assert load_rows("owner/name").fingerprint == rows.fingerprint
    assert len(load_rows("owner/name:test", subset="en")) == 4
    assert len(load_rows("name", default_split="test")) == 4
    assert len(load_rows("owner/name:train[:50%]#3")) == 3
    assert hub[2:] == [
        ("owner/name", "en", "test"),
        ("name", None, "test"),
        ("owner/name", None, "train[:50%]"),
    ]


def test_hub_split_that_is_missing_is_named(hub: list[tuple[Any, ...]]) -> None:
    message, key = error("owner/name:dev", key="data.eval")
    assert "looked for hub data set 'owner/name', split 'dev'; ValueError: " in message
    assert 'Unknown split "dev"' in message
    assert key == "data.eval"


def test_hub_split_that_is_empty_is_refused(hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": []}))
    assert error("owner/name")[0] == "the split 'train' of the hub data set 'owner/name' has no rows"


def test_hub_data_refuses_settings_without_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error("owner/name", column_names=["a"])[1] == "data.column_names"
    assert error("owner/name", encoding="latin-1")[1] == "data.encoding"
    assert error("owner/name", delimiter=";")[1] == "data.delimiter"


def test_hub_that_is_unreachable_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: refuses connections
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
        start = time.monotonic()
        message, key = error("owner/name")
        assert time.monotonic() - start < 5
    assert message.startswith(
        "'owner/name' is not a local file or folder; looked for hub data set 'owner/name', split 'train'; "
        f"{endpoint} cannot be reached ("
    )
    assert "files, folders and package:IMPORT_NAME/PATH work without network" in message
    assert key == "data.train"


def test_hub_is_reached_through_a_proxy(monkeypatch: pytest.MonkeyPatch, hub: list[tuple[Any, ...]]) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://hub.invalid")
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert len(load_rows("owner/name")) == 10
    assert "cannot be reached" in error("owner/name")[0]


def test_hub_error_names_offline_mode(process: Any, tmp_path: Path) -> None:
    program = "from peftlab.data import load_rows\ntry: load_rows('owner/name')\nexcept ValueError as e: print(e)"
    result = process.run(
        ["-c", program], cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=60, check=True
    )
    assert "HF_HUB_OFFLINE=1 allows only cached data sets; files, folders and package:" in result.stdout

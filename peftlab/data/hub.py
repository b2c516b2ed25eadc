"""Loads the rows of a hub data set."""

from __future__ import annotations

import re
import socket
import urllib.request
from urllib.parse import urlsplit

import numpy as np

from peftlab.data.columnar import class_names_of, named
from peftlab.data.rows import Origin, Rows
from peftlab.errors import DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_CONNECT_TIMEOUT_S = 5.0


def load_hub(name: str, base: str, key: str, subset: str | None, default_split: str) -> Rows:
    """The rows of ``ID`` or ``ID:SPLIT``. Raises: DataError: no such data set or split, or the hub is out of reach."""
    hub_id, _, split = base.partition(":")
    if not _HUB_ID.fullmatch(hub_id):
        raise DataError(f"{base!r} is not an existing file or folder, nor a valid hub data set id", key=key)
    import datasets

    split = split or default_split
    tried = f"{base!r} is not a local file or folder; looked for hub data set {hub_id!r}, split {split!r}"
    advice = "files, folders and package:IMPORT_NAME/PATH work without network"
    offline = datasets.config.HF_HUB_OFFLINE
    if not offline and (reason := _why_unreachable(datasets.config.HF_ENDPOINT)):
        raise DataError(
            f"{tried}; {datasets.config.HF_ENDPOINT} cannot be reached ({reason}); {advice}, "
            "and so does a cached hub data set with HF_HUB_OFFLINE=1",
            key=key,
        )
    try:
        table = datasets.load_dataset(hub_id, subset, split=split)
    except Exception as exc:  # datasets, huggingface_hub, httpx and pyarrow raise too many types to list
        offline_note = "; HF_HUB_OFFLINE=1 allows only cached data sets" if offline else ""
        raise DataError(f"{tried}; {type(exc).__name__}: {exc}{offline_note}; {advice}", key=key) from exc
    if len(table) == 0:
        raise DataError(f"the split {split!r} of the hub data set {hub_id!r} has no rows", key=key)
    carried = class_names_of(table.features.to_dict())
    columns = {
        column: named(values, carried[column], f"{hub_id}:{split}, column {column!r}", key)
        if column in carried
        else values
        for column, values in table.to_dict().items()
    }
    return Rows(
        name=name,
        columns=columns,
        fingerprint=table._fingerprint,
        origins=(Origin(f"{hub_id}:{split}", "record"),),
        origin_index=np.zeros(len(table), dtype=np.int64),
        positions=np.arange(1, len(table) + 1),
        class_names=carried,
    )


def _why_unreachable(endpoint: str) -> str | None:
    """Why the hub (or the proxy to it) is unreachable; None: it is reachable.

    ``datasets`` itself makes six attempts with pauses first: 23 s without DNS, minutes behind a firewall.
    """
    target = urlsplit(endpoint)
    if not urllib.request.proxy_bypass(target.hostname or ""):
        proxies = urllib.request.getproxies()
        proxy = proxies.get(target.scheme) or proxies.get("all")
        target = urlsplit(proxy) if proxy else target
    port = target.port or (80 if target.scheme == "http" else 443)
    try:
        socket.create_connection((target.hostname, port), timeout=_HUB_CONNECT_TIMEOUT_S).close()
    except OSError as exc:
        return str(exc)
    return None

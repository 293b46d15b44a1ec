"""A whole cluster of real processes whose models are plain functions: it starts in seconds and computes by heart."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import httpx
import redis

from motet.local.cluster import Cluster, registered
from motet.protocol.manifest import Manifest
from motet.protocol.redis_url import redis_py_url
from tests.torchless import hide_torch

Found = TypeVar("Found")

PATIENCE_S = 90.0


@contextmanager
def small_cluster(
    folder: Path,
    code: str,
    functions: tuple[str, ...],
    *,
    cpus: int = 1,
    flower: bool = False,
    env: Mapping[str, str] | None = None,
) -> Iterator[Cluster]:
    """A running cluster that knows each of these functions of ``code`` as a model of the same name."""
    modules = folder / "modules"
    package = modules / "plain_functions-1.0.dist-info"
    package.mkdir(parents=True)
    (modules / "plain_functions.py").write_text(code)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: plain-functions\nVersion: 1.0\n")
    points = "".join(f"{name} = plain_functions:{name}\n" for name in functions)
    (package / "entry_points.txt").write_text(f"[motet.engines]\n{points}")
    hide_torch(modules)
    data = folder / "data"
    data.mkdir()
    # No model of ours is needed.
    registered(data).touch()
    path = os.pathsep.join(filter(None, (str(modules), os.environ.get("PYTHONPATH"))))
    with surrounded(PYTHONPATH=path, **(env or {})):
        cluster = Cluster(data, cpus=cpus, port=0, flower_port=0 if flower else None)
        with cluster:
            for name in functions:
                register(cluster, name)
            yield cluster


@contextmanager
def surrounded(**more: str) -> Iterator[None]:
    """This process' environment with these variables, which its children inherit."""
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def register(cluster: Cluster, function: str) -> None:
    model = Manifest(
        name=function,
        version="1",
        engine=function,
        answers="json",
        source={"function": f"plain_functions:{function} plain-functions 1.0"},
    )
    headers = {"Authorization": f"Bearer {cluster.tokens['admin']}"}
    answer = httpx.post(f"{cluster.url}/v1/models", json=model.to_json(), headers=headers)
    assert answer.is_success, answer.text


def redis_of(cluster: Cluster, role: str) -> redis.Redis:
    """A connection as this role: ``scheduler``, ``worker`` or ``flower``."""
    valkey = next(one.service for one in cluster._watched if one.service.name == "valkey")
    return redis.Redis.from_url(redis_py_url(getattr(valkey.urls, role)), socket_timeout=10)  # type: ignore[attr-defined]


def eventually(what: Callable[[], Found], within_s: float = PATIENCE_S, words: str = "it") -> Found:
    """Ask until the answer is true, and return it."""
    until = time.monotonic() + within_s
    while not (found := what()):
        assert time.monotonic() < until, f"{words} did not come about within {within_s:.0f} s"
        time.sleep(0.02)
    return found

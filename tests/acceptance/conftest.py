"""One whole cluster of real processes, with the shipped models, for all acceptance tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from motet import Client
from motet.local.cluster import Cluster
from tests.conftest import copy_of


@pytest.fixture(scope="session")
def cluster(with_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    data = copy_of(with_models, tmp_path_factory.mktemp("cluster"))
    modules = with_functions(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(modules)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (modules, os.environ.get("PYTHONPATH")))))
        # An application's webhook is received on this machine.
        with Cluster(data, cpus=2, port=0, settings={"MOTET_WEBHOOK_HOSTS": "127.0.0.1"}) as running:
            yield running


def with_functions(folder: Path) -> str:
    """Install tests/acceptance/functions.py and an example there, with entry points, as an operator does."""
    shutil.copy(Path(__file__).with_name("functions.py"), folder / "acceptance_functions.py")
    shutil.copy(Path(__file__).parents[2] / "examples" / "recommend.py", folder)
    package = folder / "acceptance_functions-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: acceptance-functions\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[motet.engines]\ntold = acceptance_functions:told\nrecommend = recommend:recommend\nnames = acceptance_functions:Names\n"
        "capitals = acceptance_functions:capitals\n"
    )
    return str(folder)


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.url, cluster.tokens["user"]) as connected:
        yield connected

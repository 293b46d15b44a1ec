"""Other people's clients against a whole cluster with a real language model; `make clients-test` runs them.

They live in an environment of their own, which MOTET_CLIENTS names; without it this file skips itself.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from motet.local.cluster import Cluster
from tests.conftest import copy_of
from tests.registering import register
from tests.tiny_language import a_llama

PYTHON = os.environ.get("MOTET_CLIENTS", "")
NAME, VECTORS = "tiny-language", "all-MiniLM-L6-v2"
HERE = Path(__file__).parent
#: Scenario -> the distributions that it is about.
SCENARIOS = {
    "with_openai": ("openai",),
    "with_litellm": ("litellm",),
    "with_litellm_proxy": ("litellm",),
    "with_langchain": ("langchain-openai",),
    "with_llama_index": ("llama-index-llms-openai-like",),
}

pytestmark = pytest.mark.skipif(not PYTHON, reason="MOTET_CLIENTS is not set; make clients-test sets it")


@pytest.fixture(scope="module")
def surroundings(with_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A running cluster with the model, as variables of a scenario."""
    data = copy_of(with_models, tmp_path_factory.mktemp("cluster"))
    with Cluster(data, cpus=1, port=0) as cluster:
        made = a_llama(tmp_path_factory.mktemp(NAME))
        done = register(cluster.url, cluster.tokens["admin"], str(made), "--name", NAME)
        assert done.returncode == 0, done.stderr
        yield {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "OPENAI_BASE_URL": f"{cluster.url}/openai/v1",
            "OPENAI_API_KEY": cluster.tokens["user"],
            "MODEL": NAME,
            "VECTORS": VECTORS,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_client_is_answered(surroundings: dict[str, str], scenario: str) -> None:
    done = subprocess.run(
        [PYTHON, str(HERE / f"{scenario}.py")], capture_output=True, text=True, timeout=300, env=surroundings
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    for name in SCENARIOS[scenario]:
        shown = "from importlib.metadata import version as v; import sys; print(sys.argv[1], v(sys.argv[1]))"
        subprocess.run([PYTHON, "-c", shown, name], check=True)

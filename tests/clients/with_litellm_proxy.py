"""LiteLLM's proxy with motet behind it, asked by OpenAI's client: chat, vectors, and a batch whose files motet holds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from with_openai import MODEL, VECTORS, run_batch

KEY = "sk-of-the-proxy"


def settings() -> dict[str, Any]:
    at = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}
    return {
        "model_list": [
            {
                "model_name": called,
                "litellm_params": {"model": f"openai/{name}", **at},
                "model_info": {"mode": mode},
            }
            for called, name, mode in (
                (MODEL, MODEL, "chat"),
                (VECTORS, VECTORS, "embedding"),
                ("batches", MODEL, "batch"),
            )
        ],
        "files_settings": [{"custom_llm_provider": "openai", **at}],
        "general_settings": {"master_key": KEY},
        "litellm_settings": {"telemetry": False},
    }


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # JSON is YAML too.
        config, log, port = Path(folder) / "config.yaml", Path(folder) / "log", free_port()
        config.write_text(json.dumps(settings()))
        command = [Path(sys.executable).with_name("litellm"), "--config", config, "--host", "127.0.0.1"]
        # What it would take from the environment is in its settings.
        own = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
        with log.open("wb") as out:
            proxy = subprocess.Popen(
                [*command, "--port", str(port)], stdout=out, stderr=subprocess.STDOUT, env=own
            )
        try:
            wait(proxy, f"http://127.0.0.1:{port}/health/liveliness")
            with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0) as client:
                ask(client)
        except BaseException:
            print(log.read_text()[-8000:], file=sys.stderr)
            raise
        finally:
            proxy.terminate()
            proxy.wait(30)


def wait(proxy: subprocess.Popen[bytes], url: str) -> None:
    end = time.monotonic() + 180
    while True:
        assert proxy.poll() is None, "the proxy ended"
        assert time.monotonic() < end, "the proxy does not start"
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)


def ask(client: OpenAI) -> None:
    said = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=4
    )
    assert said.usage is not None
    assert said.usage.completion_tokens <= 4
    assert len(client.embeddings.create(model=VECTORS, input=["one", "two"]).data) == 2
    assert client.files.list(extra_query={"provider": "openai"}) is not None
    run_batch(client, 5, extra_headers={"custom-llm-provider": "openai"})
    at: dict[str, Any] = {"extra_headers": {"custom-llm-provider": "openai"}}
    [made] = client.batches.list(limit=1, extra_query={"provider": "openai"}, **at).data
    assert client.batches.cancel(made.id, **at).status == "completed"
    assert client.files.retrieve(made.input_file_id, **at).purpose == "batch"
    assert client.files.delete(made.input_file_id, **at).deleted
    # Its own look at what is behind it: a chat, a vector and the list of batches.
    health = httpx.get(
        f"{client.base_url}".replace("/v1/", "/health"),
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=120,
    )
    assert health.json()["healthy_count"] == 3, health.text


if __name__ == "__main__":
    main()

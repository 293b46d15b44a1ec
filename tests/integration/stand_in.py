"""Stands in for scheduler and workers, so that the cluster around them is tested alone: no model, no table.

Run as ``stand_in.py up <data>`` it is `motet up` itself, with these stand-ins.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from motet.local.children import Child
from motet.local.cluster import Cluster


class StandIn(Cluster):
    def command(self, module: str, *arguments: str) -> list[str]:
        if module not in ("scheduler", "workers"):
            return super().command(module, *arguments)
        return [sys.executable, __file__, module, *arguments]


def main(*arguments: str) -> None:
    match arguments:
        case ["up", data]:
            logging.basicConfig(level="INFO")
            StandIn(Path(data), cpus=1, port=0).run_forever()
            return
    note_start("-".join(arguments[:2]))
    match arguments:
        case [_, command, *_] if command == os.environ.get("STAND_IN_FAILS"):
            sys.exit(f"{command} has no luck today")
        case ["scheduler", "migrate"]:
            pass
        case ["scheduler", "bootstrap", "--tokens", file]:
            Path(file).write_text(
                json.dumps({scope: f"token of {scope}" for scope in ("admin", "user", "worker")})
            )
        case ["scheduler", "api"]:
            HTTPServer(("127.0.0.1", int(os.environ["MOTET_API_PORT"])), Ready).serve_forever()
        case ["workers", "register", *_]:
            pass
        case ["workers", "--cpus", _]:
            worker = Child("worker", [sys.executable, __file__, "worker"])
            worker.start()
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            try:
                worker.wait()
            finally:
                worker.stop(5)
        case _:
            time.sleep(600)


def note_start(name: str) -> None:
    """Write down what this process was given, and how often it was started."""
    file = Path(os.environ["MOTET_RUN"], "seen", f"{name}.jsonl")
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps({**os.environ, "PID": os.getpid()}) + "\n")


class Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The compose file on a real engine: start, run the demo's job, kill and freeze what there is, scale, take down.

    make compose-test
    make compose-test PYTHON_IMAGE=python:3.11-slim WHEELS=/opt/wheels
    .venv/bin/python tests/compose/check.py --rows 500 --keep

Needs `docker compose` with an engine on this machine (DOCKER_HOST is heeded), and no more: it works on a copy of
the checkout, under a project of its own, with secrets, ports and volumes of its own, and leaves nothing but images.
Not part of `make check`: building the images takes minutes and downloads PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: Of the images, which stay: their layers make the next run faster.
TAG = "compose-test"
#: Long enough for a machine that does other things too.
JOB_S = 600.0
HEAL_S = 120.0
TASKS = {
    "topic": "classify:news-topics",
    "sentiment": "classify:review-sentiment",
    "tone": "classify:tone",
    "vector": "embed:all-MiniLM-L6-v2,dtype=fp16",
}
#: Services that stay up.
STANDING = {"postgres", "redis", "api", "dispatcher", "aggregator", "worker-cpu", "flower"}


class Failed(Exception):
    """A promise that was not kept."""


@dataclass
class Stack:
    """One project of docker compose, made from a copy of the checkout."""

    folder: Path
    project: str
    env: Mapping[str, str]
    passed: list[str] = field(default_factory=list)

    def ok(self, promise: str, kept: bool, got: object = "") -> None:
        """Count a promise. Raises Failed unless it is kept."""
        if not kept:
            raise Failed(f"{promise}; got {got}")
        self.passed.append(promise)
        print(f"  ok  {promise}", flush=True)

    def compose(self, *arguments: str, check: bool = True, timeout_s: float = 300) -> str:
        """What `docker compose …` prints."""
        return _run(
            ["docker", "compose", "-p", self.project, *arguments],
            cwd=self.folder,
            env=self.env,
            check=check,
            timeout_s=timeout_s,
        )

    def containers(self, service: str) -> list[dict[str, Any]]:
        """`docker inspect` of the containers of a service."""
        ids = self.compose("ps", "-aq", service).split()
        return json.loads(_run(["docker", "inspect", *ids], env=self.env)) if ids else []

    def state(self, service: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.containers(service)[0]["State"]
        return found

    def sql(self, statement: str) -> str:
        """What psql prints for a statement, unaligned."""
        return self.compose(
            *("exec", "-T", "postgres", "psql", "-U", "postgres", "-d", "motet", "-Atc", statement)
        ).strip()

    def client(self, *arguments: str, mounts: Sequence[str] = ()) -> list[str]:
        """The command line of motet, in a container of its own."""
        volumes = [part for mount in mounts for part in ("-v", mount)]
        return [
            *("docker", "compose", "-p", self.project, "run", "--rm", "-T", *volumes, "motet"),
            *arguments,
        ]

    def python(self, service: str, code: str, check: bool = True) -> str:
        """What a line of Python prints inside a container."""
        return self.compose("exec", "-T", service, "python", "-c", code, check=check).strip()

    def signal(self, service: str, number: int) -> None:
        """Send a signal to the first process of a container as the kernel would, from its engine's host.

        Not `docker kill`: a container killed that way is one that somebody has stopped, and stays down.
        """
        pid = self.state(service)["Pid"]
        _run(
            [
                *("docker", "run", "--rm", "--pid=host", "--user=0", "--network=none", "--cap-drop=ALL"),
                *(
                    "--cap-add=KILL",
                    self.env["IMAGE"],
                    "python",
                    "-c",
                    f"import os; os.kill({pid}, {number})",
                ),
            ],
            env=self.env,
        )


@dataclass
class Job:
    """One job under way, and the client that waits for it."""

    stack: Stack
    name: str
    rows: int
    client: subprocess.Popen[str]

    def cells(self) -> int:
        """Cells that are recorded as ok."""
        found = self.stack.sql(f"SELECT coalesce(sum(cells_ok), 0) FROM job WHERE name = '{self.name}'")
        return int(found or 0)

    def await_cells(self, more_than: int) -> None:
        _until(lambda: self.cells() > more_than, JOB_S, f"job {self.name} has more than {more_than} cells")

    def end(self) -> dict[str, Any]:
        """The job's record, as the client got it. Raises Failed unless every cell is ok and stands there once."""
        try:
            out, err = self.client.communicate(timeout=JOB_S)
        except subprocess.TimeoutExpired:
            self.client.kill()
            raise Failed(f"job {self.name} does not end") from None
        if self.client.returncode:
            raise Failed(f"job {self.name}: the client said: {err.strip()[-500:]}")
        record: dict[str, Any] = json.loads(out)
        wanted = self.rows * len(TASKS)
        cells = record["cells"]
        self.stack.ok(
            f"{self.name}: {cells['ok']:,} of {wanted:,} cells are ok, none is an error or skipped",
            (cells["ok"], cells["error"], cells["skipped"]) == (wanted, 0, 0),
            cells,
        )
        stored = self.stack.sql(
            "SELECT count(*), count(DISTINCT (row, task)), count(*) FILTER (WHERE status = 'ok')"
            f" FROM results WHERE job_id = '{record['id']}'"
        )
        self.stack.ok(
            f"{self.name}: the database has each of them once",
            stored == f"{wanted}|{wanted}|{wanted}",
            stored,
        )
        return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where every promise was kept."""
    options = _options(arguments)
    with _staged(options) as stack:
        try:
            _check(stack, options.rows)
        except Failed as failure:
            print(f"FAILED  {failure}", file=sys.stderr)
            print(stack.compose("logs", "--tail", "30", "--no-color", check=False)[-20_000:], file=sys.stderr)
            print(f"\n{len(stack.passed)} passed, 1 failed")
            return 1
        finally:
            if options.keep:
                print(f"kept: cd {stack.folder}; IMAGE_TAG={TAG} docker compose -p {stack.project} …")
            else:
                stack.compose("--profile", "*", "down", "--volumes", "--remove-orphans", check=False)
        if not options.keep:
            _check_nothing_is_left(stack)
    print(f"\n{len(stack.passed)} passed, 0 failed")
    return 0


def _check(stack: Stack, rows: int) -> None:
    stack.compose("--profile", "*", "config", "--quiet")
    stack.ok("the compose file is valid, all profiles", True)
    with _timed("built") as built:
        stack.compose("build", "migrate", "worker-cpu", timeout_s=3600)
    with _timed("healthy after") as up:
        stack.compose("up", "-d", "--wait", "--wait-timeout", "300", timeout_s=400)
    print(f"      built in {built()}, all healthy {up()} after `up`")
    _check_promises(stack)
    for state in ("registered", "unchanged"):
        told = json.loads(stack.compose("run", "--rm", "-T", "models", "--builtin", "--json"))["models"]
        stack.ok(f"models: {len(told)} are {state}", len(told) > 4, told)

    _check_doctor(stack)
    record = _submit(stack, "demo", rows).end()
    print(f"      {rows:,} rows × {len(TASKS)} tasks, {record['usage']['busy_s']:.1f} s of device time")
    for service in ("worker-cpu", "redis", "dispatcher", "aggregator", "api", "postgres"):
        _check_kill(stack, service, rows)
    _check_freeze(stack, "dispatcher", "dispatch")
    _check_freeze(stack, "aggregator", "aggregate")
    _check_frozen_worker(stack)
    _check_scale(stack, rows)
    _check_several_apis(stack)
    _check_restart(stack, record["id"])


def _check_promises(stack: Stack) -> None:
    """What the compose file says, as the engine sees it."""
    published: dict[str, Any] = {}
    drawn = [path for path in (stack.folder / "secrets").iterdir() if "." not in path.name]
    for service in sorted(STANDING):
        (one,) = stack.containers(service)
        host = one["HostConfig"]
        uid = _run(["docker", "exec", one["Id"], "id", "-u"], env=stack.env).strip()
        wrote = _run(["docker", "exec", one["Id"], "sh", "-c", "echo x >/x"], env=stack.env, check=False)
        status = _run(
            ["docker", "exec", one["Id"], "cat", "/proc/1/status"], env=stack.env
        )  # of the process that Docker started
        facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        hard = (
            uid != "0"
            and host["ReadonlyRootfs"]
            and "Read-only" in wrote
            and facts["CapEff"].strip("0") == facts["CapBnd"].strip("0") == ""
            and facts["NoNewPrivs"] == "1"
            and "0" not in facts["Uid"].split()
        )
        stack.ok(f"{service}: uid {uid}, no capability, a read-only root", hard, (uid, wrote, facts))
        bounded = host["Memory"] > 0 and host["PidsLimit"] and host["LogConfig"]["Config"].get("max-size")
        stack.ok(f"{service}: has limits of memory, processes and logs", bool(bounded), host["LogConfig"])
        shown = [path.name for path in drawn if path.read_text("utf-8") in json.dumps(one)]
        stack.ok(f"{service}: `docker inspect` shows no secret", not shown, shown)
        for port, at in one["NetworkSettings"]["Ports"].items():
            if at:
                published[f"{service} {port}"] = [a["HostIp"] for a in at]
    stack.ok(
        "only the API and Flower are published, on loopback",
        published == {"api 8700/tcp": ["127.0.0.1"], "flower 5555/tcp": ["127.0.0.1"]},
        published,
    )
    for service, path, status in (
        ("api", "/readyz", 200),
        ("flower", "/healthcheck", 200),
        ("flower", "/", 401),
    ):
        port = stack.compose("port", service, {"api": "8700", "flower": "5555"}[service]).strip()
        code = (
            "import http.client as h; "
            f"c = h.HTTPConnection('{port}'); c.request('GET', '{path}'); print(c.getresponse().status)"
        )
        # The host's network is the engine's, which is not always ours.
        got = _run(
            ["docker", "run", "--rm", "--network=host", stack.env["IMAGE"], "python", "-c", code],
            env=stack.env,
        ).strip()
        stack.ok(f"{service}{path} answers {status} where it is published", got == str(status), got)
    reach = "import socket; socket.create_connection(('postgres', 5432), 3)"
    got = stack.python("worker-cpu", reach, check=False)
    stack.ok("a worker does not even find Postgres", "gaierror" in got, got)
    mine = stack.compose("exec", "-T", "worker-cpu", "ls", "/run/secrets").split()
    stack.ok("a worker has its two secrets and no others", mine == ["redis_worker_url", "worker_token"], mine)


def _check_doctor(stack: Stack) -> None:
    """`motet doctor`, beside the API and with the administrator's token, looks at Postgres, Redis and disk as well."""
    token = (stack.folder / "secrets/admin_token").read_text("utf-8")
    said = _run(
        ["docker", "compose", "-p", stack.project, "run", "--rm", "-T", "-e", "MOTET_TOKEN", "motet", "doctor", "--json"],
        cwd=stack.folder,
        env={**stack.env, "MOTET_TOKEN": token},
        check=False,
    )  # fmt: skip
    found = json.JSONDecoder().raw_decode(said)[0]["findings"]
    # The data folder of a `motet up`, which nobody runs in this container.
    found = [one for one in found if not one["name"].startswith("data ")]
    for one in found:
        if one["state"] == "warn":
            print(f"      doctor: {one['name']}: {one['what']}; {one['remedy']}")
    broken = [one for one in found if one["state"] == "fail"]
    stack.ok(f"doctor: nothing to mend in {len(found)} findings", not broken, broken)


def _submit(stack: Stack, name: str, rows: int) -> Job:
    tasks = [part for task, what in TASKS.items() for part in ("--task", f"{task}={what}")]
    command = stack.client(
        *("submit", "/rows.jsonl", "--name", name, "--no-reuse", "--wait", "--json", *tasks),
        mounts=[f"{stack.folder}/rows.jsonl:/rows.jsonl:ro"],
    )
    client = subprocess.Popen(
        command, cwd=stack.folder, env=stack.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    return Job(stack, name, rows, client)


def _check_kill(stack: Stack, service: str, rows: int) -> None:
    """Kill a service in the middle of a job: it comes back by itself, and the job misses nothing."""
    job = _submit(stack, f"kill-{service}", rows)
    job.await_cells(0)
    before = stack.containers(service)[0]
    stack.signal(service, 9)
    killed = time.monotonic()

    def back() -> bool:
        now = stack.containers(service)[0]
        return bool(now["RestartCount"] > before["RestartCount"] and now["State"]["Running"])

    _until(back, HEAL_S, f"{service} runs again")
    running_s = time.monotonic() - killed
    _until(lambda: _answers(stack), HEAL_S, "Postgres answers")
    cells = job.cells()
    was_over = cells == rows * len(TASKS)
    if not was_over:
        job.await_cells(cells)
    going_s = time.monotonic() - killed
    record = job.end()
    _until(lambda: stack.state(service)["Health"]["Status"] == "healthy", HEAL_S, f"{service} is healthy")
    healthy_s = time.monotonic() - killed
    stack.ok(f"kill-{service}: it was killed in the middle of the job", not was_over, cells)
    lost = record["usage"]["attempts_lost"]
    print(
        f"      {service}: runs again after {running_s:.1f} s, cells come again after {going_s:.1f} s,"
        f" all done and healthy after {healthy_s:.1f} s; {lost} attempts lost"
    )


def _check_freeze(stack: Stack, service: str, module: str) -> None:
    """A process that is there and does nothing is unhealthy: the checks look at its work, not at its process id."""
    began = time.monotonic()
    stack.python(service, _SIGNAL.format(module=module, signal="SIGSTOP"))
    try:
        _until(
            lambda: stack.state(service)["Health"]["Status"] == "unhealthy", HEAL_S, f"{service} is unhealthy"
        )
        words = stack.state(service)["Health"]["Log"][-1]["Output"].strip()
        stack.ok(f"{service}: frozen, it is unhealthy after {time.monotonic() - began:.0f} s: {words}", True)
    finally:
        stack.python(service, _SIGNAL.format(module=module, signal="SIGCONT"))
    _until(
        lambda: stack.state(service)["Health"]["Status"] == "healthy", HEAL_S, f"{service} is healthy again"
    )
    stack.ok(f"{service}: thawed, it is healthy", True)


def _check_frozen_worker(stack: Stack) -> None:
    """A worker that stands still is replaced by its launcher."""
    began, before = time.monotonic(), set(stack.python("worker-cpu", _WORKERS).split())
    stack.python("worker-cpu", _SIGNAL.format(module="workers.run.app", signal="SIGSTOP"))

    def replaced() -> bool:
        now = set(stack.python("worker-cpu", _WORKERS).split())
        return len(now) == len(before) and not now & before

    _until(replaced, HEAL_S, "the frozen workers are replaced")
    _until(
        lambda: stack.state("worker-cpu")["Health"]["Status"] == "healthy", HEAL_S, "worker-cpu is healthy"
    )
    stack.ok(f"worker-cpu: frozen, it is replaced after {time.monotonic() - began:.0f} s", bool(before))


#: The process ids of a container's workers.
_WORKERS = """
import pathlib
for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    if 'workers.run.app' in path.read_bytes().decode().split('\\0'):
        print(path.parent.name)
"""

#: Sends a signal to the processes of a container that run a module.
_SIGNAL = """
import os, pathlib, signal
found = [p for p in pathlib.Path('/proc').glob('[0-9]*/cmdline') if {module!r} in p.read_bytes().decode().split('\\0')]
for path in found:
    os.kill(int(path.parent.name), signal.{signal})
assert found
"""


def _check_scale(stack: Stack, rows: int) -> None:
    stack.compose("up", "-d", "--wait", "--no-recreate", "--scale", "worker-cpu=2")
    seen = [w for w in _workers(stack) if w["state"] == "ready"]
    names = {w["worker"] for w in seen}
    stack.ok("two containers of worker-cpu are two workers", len(names) == 2, seen)
    before = {w["worker"]: w["rows_done"] for w in seen}
    _submit(stack, "two-workers", rows).end()
    after = {w["worker"]: w["rows_done"] for w in _workers(stack) if w["worker"] in names}
    done = {name: after[name] - before[name] for name in sorted(names)}
    stack.ok(f"both did some of it: {done} rows", all(done.values()), done)
    stack.compose("up", "-d", "--wait", "--no-recreate", "--scale", "worker-cpu=1")


#: Asks each API process that the name stands for, under one key; prints how many there are and the rows they told.
_ASK_ALL = """
import json, socket, urllib.request
from pathlib import Path
token = Path("/run/secrets/user_token").read_text().strip()
def call(host, path, body, **headers):
    request = urllib.request.Request(f"http://{host}:8700{path}", json.dumps(body).encode(),
        {"Authorization": f"Bearer {token}", "Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
task = {"kind": "classify", "model": "news-topics"}
job = call("api", "/v1/jobs", {"tasks": {"topic": task}, "open": True, "priority": "interactive"})["id"]
hosts = sorted({one[4][0] for one in socket.getaddrinfo("api", 8700)})
rows = [call(host, f"/v1/jobs/{job}/ask", {"rows": ["one text"], "key": "same"})["rows"] for host in hosts]
call("api", f"/v1/jobs/{job}/close", {})
print(json.dumps({"processes": len(hosts), "rows": rows}))
"""


def _check_several_apis(stack: Stack) -> None:
    """One name, three processes, each of which gathers by itself."""
    stack.compose("up", "-d", "--wait", "--no-recreate", "--scale", "api=3")
    asked = _run(
        [
            *(
                "docker",
                "compose",
                "-p",
                stack.project,
                "run",
                "--rm",
                "-T",
                "--entrypoint",
                "python",
                "motet",
            ),
            *("-c", _ASK_ALL),
        ],
        cwd=stack.folder,
        env=stack.env,
    )
    told = json.loads(asked.splitlines()[-1])
    stack.ok("three API processes answer to one name", told["processes"] == 3, told)
    stack.ok(
        "each gives the same answer for a key",
        told["rows"][0][0]["row"] == 0 and told["rows"] == told["rows"][:1] * 3,
        told,
    )
    stack.compose("up", "-d", "--wait", "--no-recreate", "--scale", "api=1")


def _check_restart(stack: Stack, job: str) -> None:
    """Take everything down and up again: what was done is there, and the same secrets open it."""
    stack.compose("down")
    made = _run([sys.executable, "deploy/compose/prepare.py"], cwd=stack.folder, env=stack.env)
    stack.ok("`make env` again makes nothing", made.startswith("everything is there already"), made)
    stack.compose("up", "-d", "--wait", "--wait-timeout", "300", timeout_s=400)
    lines = _run(
        stack.client("results", job, "--format", "jsonl"), cwd=stack.folder, env=stack.env
    ).splitlines()
    rows = {json.loads(line)["row"] for line in lines}
    stack.ok(
        f"down and up again: all {len(rows):,} rows of the first job are there", len(rows) == len(lines) > 0
    )


def _check_nothing_is_left(stack: Stack) -> None:
    label = f"label=com.docker.compose.project={stack.project}"
    for what, command in (
        ("containers", ["ps", "-aq"]),
        ("volumes", ["volume", "ls", "-q"]),
        ("networks", ["network", "ls", "-q"]),
    ):
        left = _run(["docker", *command, "--filter", label], env=stack.env).split()
        stack.ok(f"taken down: no {what} are left", not left, left)


def _workers(stack: Stack) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        _run(stack.client("workers", "--json"), cwd=stack.folder, env=stack.env)
    )
    return found


def _answers(stack: Stack) -> bool:
    try:
        return stack.sql("SELECT 1") == "1"
    except Failed:
        return False


@contextmanager
def _staged(options: argparse.Namespace) -> Iterator[Stack]:
    """A copy of what git would take, with secrets and texts of its own."""
    sys.path.insert(0, str(ROOT))
    from motet.demo.texts import choose

    folder = Path(tempfile.mkdtemp(prefix="motet-compose-"))
    try:
        listed = _run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
        for file in filter(None, listed.split("\0")):
            if (ROOT / file).is_file():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, folder / file)
        for wheel in sorted(options.wheels.glob("torch-*.whl")) if options.wheels else ():
            shutil.copy2(wheel, folder / "deploy/compose/wheels" / wheel.name)
        _run([sys.executable, "deploy/compose/prepare.py"], cwd=folder)
        texts = choose(options.rows)
        lines = "".join(json.dumps({"text": t.text}) + "\n" for t in texts)
        (folder / "rows.jsonl").write_text(lines, "utf-8")
        (folder / "rows.jsonl").chmod(0o644)
        options.rows = len(texts)
        env = {
            **os.environ,
            "IMAGE_TAG": TAG,
            "IMAGE": f"motet-scheduler:{TAG}",
            "API_LISTEN": "127.0.0.1:0",
            "FLOWER_LISTEN": "127.0.0.1:0",
            "PYTHON_IMAGE": options.python_image,
            "CPU_TORCH_PIP_OPTIONS": options.torch_pip_options,
        }
        yield Stack(folder, f"motet-test-{secrets.token_hex(3)}", env)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _timed(_: str) -> Iterator[Callable[[], str]]:
    began, took = time.monotonic(), [0.0]
    yield lambda: f"{took[0]:.0f} s"
    took[0] = time.monotonic() - began


def _until(true: Callable[[], bool], limit_s: float, words: str) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(Failed):
            if true():
                return
        if time.monotonic() > deadline:
            raise Failed(f"after {limit_s:.0f} s still not: {words}")
        time.sleep(0.2)


def _run(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    timeout_s: float = 300,
) -> str:
    """What a command prints; with ``check=False`` also what it complains about. Raises Failed."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=env,
            text=True,
            capture_output=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(command[:8])}: not done after {timeout_s:.0f} s") from None
    if check and done.returncode:
        raise Failed(f"{' '.join(command[:8])}: exit code {done.returncode}: {done.stderr.strip()[-1500:]}")
    return done.stdout if check else done.stdout + done.stderr


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1500, help="texts of each job (default: 1500)")
    parser.add_argument(
        "--python-image",
        default=os.environ.get("PYTHON_IMAGE", "python:3.12-slim"),
        help="what the images are made from (default: $PYTHON_IMAGE, or python:3.12-slim)",
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        default=os.environ.get("WHEELS"),
        help="folder whose PyTorch wheel goes into the image, such as one for CPUs only (default: $WHEELS)",
    )
    parser.add_argument(
        "--torch-pip-options",
        default=os.environ.get("CPU_TORCH_PIP_OPTIONS", ""),
        help="further options of pip, such as an index that has PyTorch for CPUs (default: $CPU_TORCH_PIP_OPTIONS)",
    )
    parser.add_argument("--keep", action="store_true", help="leave the stack up, to look at it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""The embedded servers and the cluster around them: what survives which death, who may do what, what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import site
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import celery
import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from motet.errors import SetupError
from motet.local import postgres as embedded_postgres
from motet.local.children import Child, marked
from motet.local.cluster import Cluster, Watched
from motet.local.places import SocketDir
from motet.local.postgres import Postgres, _installations
from motet.local.valkey import Valkey, ValkeyUrls
from motet.protocol.redis_url import redis_py_url
from tests.integration import stand_in
from tests.integration.stand_in import StandIn

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")


def until(probe: Callable[[], object], within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not probe():
        assert time.monotonic() < deadline, f"waited {within_s} s in vain"
        time.sleep(0.01)


def gone(pids: Iterable[int]) -> bool:
    """Whether these processes have ended; a zombie that nobody has reaped yet has ended too."""

    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "gone"

    return all(state(pid) in ("gone", "Z", "X") for pid in pids)


def query(url: str, sql: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        cursor = connection.execute(sql)
        return cursor.fetchall() if cursor.description else []


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    server = Postgres(tmp_path / "postgres")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    server = Valkey(tmp_path / "valkey")
    server.start()
    yield server
    server.stop()


def as_role(urls: ValkeyUrls, role: str) -> redis.Redis:
    return redis.Redis.from_url(redis_py_url(getattr(urls, role)), decode_responses=True)


# -- any child


def test_a_child_that_ignores_the_request_to_end_is_killed(tmp_path: Path):
    deaf = Child("deaf", ["/bin/sh", "-c", "trap '' TERM; echo ready; sleep 600"], log=tmp_path / "deaf.log")
    deaf.start()
    until(lambda: deaf.tail() == "ready")
    deaf.stop(0.1)
    assert deaf.exit_code == -signal.SIGKILL


def test_a_log_that_has_grown_is_set_aside_when_its_process_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("motet.local.children.LOG_BYTES", 3)
    talker = Child("talker", ["/bin/echo", "hello"], log=tmp_path / "talker.log")
    for _ in range(2):
        talker.start()
        talker.wait()
    assert (tmp_path / "talker.log.1").read_text() == talker.log.read_text() == "hello\n"


def test_a_log_that_grows_while_its_process_runs_is_cut_and_the_process_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("motet.local.children.LOG_BYTES", 6)
    cluster = StandIn(tmp_path)
    log = tmp_path / "logs/echo.log"
    # Says a line whenever its queue has one.
    os.mkfifo(tmp_path / "queue")
    echo = Child(
        "echo", ["/bin/sh", "-c", f"while read line; do echo $line; done <>{tmp_path}/queue"], log=log
    )
    cluster._watched.append(Watched(echo, grace_s=1))
    echo.start()
    try:
        for line, kept in (
            ("first", ""),
            ("second", "first second"),
            ("third", "first second"),
            ("fourth", "third fourth"),
        ):
            with (tmp_path / "queue").open("w") as queue:
                queue.write(f"{line}\n")
            until(lambda line=line: echo.tail().endswith(line))
            cluster.step(0)
            old = Path(f"{log}.1")
            assert (" ".join(old.read_text().split()) if old.exists() else "") == kept
        assert log.read_text() == "", "and no hole where the old lines were"
    finally:
        echo.stop(0)


def test_a_program_that_is_missing_is_named():
    with pytest.raises(SetupError, match="ghost: cannot run /no/such/program: No such file"):
        Child("ghost", ["/no/such/program"]).start()


# -- Postgres


def test_postgres_keeps_its_rows_over_stop_and_start(postgres: Postgres):
    query(postgres.url, "CREATE TABLE kept AS SELECT generate_series(1, 1000)")
    postgres.stop()
    assert not postgres.alive
    assert query(postgres.start(), "SELECT count(*) FROM kept") == [(1000,)]


def test_a_killed_postgres_starts_again_at_the_same_url_though_a_backend_of_it_is_still_busy(
    postgres: Postgres,
):
    url = postgres.url
    query(url, "CREATE TABLE kept AS SELECT generate_series(1, 1000)")
    busy = psycopg.connect(url.replace("+psycopg", ""), autocommit=True)
    loop = threading.Thread(target=run_until_cut_off, args=[busy])
    loop.start()
    until(lambda: query(url, "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'DO%'"))

    os.kill(postgres.pid, signal.SIGKILL)

    assert postgres.start() == url
    assert query(url, "SELECT count(*) FROM kept") == [(1000,)]
    loop.join()


def run_until_cut_off(connection: psycopg.Connection) -> None:
    with pytest.raises(psycopg.OperationalError):
        connection.execute("DO $$BEGIN LOOP END LOOP; END$$")


def test_a_stale_pid_file_with_the_number_of_a_living_process_does_not_stop_postgres(
    postgres: Postgres, tmp_path: Path
):
    postgres.stop()
    (tmp_path / "postgres/pgdata/postmaster.pid").write_text(f"{os.getpid()}\n/nowhere\n1\n5432\n/tmp\n\n")
    assert query(postgres.start(), "SELECT 1") == [(1,)]


@linux
def test_a_shell_that_stands_in_the_data_folder_is_left_alone(postgres: Postgres, tmp_path: Path):
    with subprocess.Popen(["sleep", "600"], cwd=tmp_path / "postgres/pgdata") as shell:
        postgres.stop()
        postgres.start()
        assert shell.poll() is None
        shell.kill()


def test_an_initdb_that_was_cut_off_is_done_again(tmp_path: Path):
    (tmp_path / "postgres/pgdata.new/base").mkdir(parents=True)
    server = Postgres(tmp_path / "postgres")
    assert query(server.start(), "SELECT 1") == [(1,)]
    server.stop()


def test_postgres_is_reached_only_through_a_private_folder_that_goes_when_it_stops(
    postgres: Postgres, tmp_path: Path
):
    sockets = (tmp_path / "postgres/run").resolve()
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    assert query(postgres.url, "SHOW listen_addresses") == [("",)]
    postgres.stop()
    assert not sockets.exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("fsync", "on"),
        ("full_page_writes", "on"),
        ("synchronous_commit", "on"),
        ("idle_in_transaction_session_timeout", "5s"),
        ("log_parameter_max_length_on_error", "0"),
        ("log_error_verbosity", "terse"),
        ("server_encoding", "UTF8"),
        # All who commit wait while a new file of it is written.
        ("wal_segment_size", "4MB"),
    ],
)
def test_postgres_holds_what_motet_promises(postgres_url: str, setting: str, value: str):
    assert query(postgres_url, f"SHOW {setting}") == [(value,)]


def test_a_data_folder_has_one_server_at_a_time(postgres: Postgres, tmp_path: Path):
    second = Postgres(tmp_path / "postgres")
    with pytest.raises(SetupError, match=f"in use by process {os.getpid()}"):
        second.start()
    second.stop()
    assert query(postgres.url, "SELECT 1") == [(1,)]


# -- Valkey


def test_valkey_comes_back_at_the_same_urls_and_empty(valkey: Valkey):
    urls = valkey.urls
    as_role(urls, "scheduler").set("canary", 1)
    os.kill(valkey.pid, signal.SIGKILL)
    assert valkey.start() == urls
    assert as_role(urls, "scheduler").get("canary") is None


def test_valkey_keeps_its_passwords_from_one_run_to_the_next_and_shows_them_to_nobody(
    valkey: Valkey, tmp_path: Path
):
    file = tmp_path / "valkey/passwords.json"
    passwords = json.loads(file.read_text())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    shown = (
        Path(f"/proc/{valkey.pid}/cmdline").read_text()
        + (tmp_path / "valkey/valkey.log").read_text()
        + repr(valkey.urls)
    )
    assert not any(password in shown for password in passwords.values())
    valkey.stop()
    assert passwords["worker"] in valkey.start().worker


@pytest.mark.parametrize(
    "login", [{}, {"username": "worker", "password": "wrong"}, {"username": "default", "password": ""}]
)
def test_valkey_answers_nobody_without_a_password(valkey: Valkey, login: dict[str, str]):
    with pytest.raises(redis.exceptions.RedisError, match=r"authenticated|invalid username-password"):
        redis.Redis(port=valkey.port, **login, retry=Retry(NoBackoff(), 0)).ping()


def test_kombu_takes_the_same_url_of_a_socket_as_redis_py(redis_urls: ValkeyUrls):
    with celery.Celery(broker=redis_urls.scheduler).connection_for_write() as connection:
        assert connection.ensure_connection(max_retries=1).connected


@pytest.mark.parametrize(
    "command",
    [
        "GET motet:w:w0:payload",
        "SET motet:w:w0:beat 1 PX 5000",
        "DEL motet:w:w0:payload",
        "SADD motet:workers w0",
        "XADD motet:outcomes * entry 1",
        "LLEN motet.gpu.w0",
    ],
)
def test_a_worker_may(redis_urls: ValkeyUrls, redis_url: str, command: str):
    as_role(redis_urls, "worker").execute_command(*command.split())


@pytest.mark.parametrize("role", ["worker", "flower"])
@pytest.mark.parametrize(
    "command",
    [
        "FLUSHALL",
        "FLUSHDB",
        "CONFIG GET *",
        "EVAL return(1) 0",
        "KEYS *",
        "SCAN 0",
        "GET motet:leader",
        "SET _kombu.binding.x 1",
        "LPUSH motet.gpu.w0 {}",
        "DEL motet.gpu.w0",
        "XRANGE motet:outcomes - +",
        "DEL motet:outcomes",
        "PUBLISH /0.other 1",
        "CLIENT LIST",
        "ACL LIST",
        "MONITOR",
        "SHUTDOWN",
    ],
)
def test_neither_a_worker_nor_flower_may(redis_urls: ValkeyUrls, role: str, command: str):
    with pytest.raises(redis.exceptions.NoPermissionError):
        as_role(redis_urls, role).execute_command(*command.split())


@pytest.mark.parametrize("command", ["FLUSHALL", "CONFIG GET *", "EVAL return(1) 0", "ACL LIST", "SHUTDOWN"])
def test_even_the_scheduler_may_not(redis_urls: ValkeyUrls, command: str):
    with pytest.raises(redis.exceptions.NoPermissionError):
        as_role(redis_urls, "scheduler").execute_command(*command.split())


# The settings of motet's own workers, and Flower's.
CELERY = """
    import os
    from celery import Celery

    app = Celery("motet", broker=os.environ["MOTET_REDIS_URL"])
    app.conf.update(
        broker_transport_options={
            "ack_emulation": False, "priority_steps": [0], "socket_timeout": 5, "socket_connect_timeout": 3,
            "health_check_interval": 5, "socket_keepalive": True,
        },
        broker_connection_retry_on_startup=True, broker_connection_max_retries=None,
        worker_disable_prefetch=True, worker_prefetch_multiplier=1, worker_pool="threads", worker_concurrency=4,
        task_ignore_result=True, result_backend=None, accept_content=["json"], task_publish_retry=False,
        worker_enable_remote_control=False, worker_send_task_events=True,
        event_queue_expires=None, control_queue_expires=None,
    )

    @app.task(name="motet.run")
    def run(): ...
"""


def test_a_celery_worker_works_and_reports_to_flower_with_the_rights_of_these_roles(
    redis_urls: ValkeyUrls, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "acl_app.py").write_text(textwrap.dedent(CELERY))
    flags = [
        "--queues=motet.gpu.test",
        "--hostname=w@test",
        "--without-gossip",
        "--without-mingle",
        "--loglevel=INFO",
    ]
    worker = Child(
        "worker",
        [sys.executable, "-m", "celery", "--app=acl_app", "worker", *flags],
        env={**os.environ, "MOTET_REDIS_URL": redis_urls.worker, "PYTHONPATH": str(tmp_path)},
        log=tmp_path / "worker.log",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MOTET_REDIS_URL", redis_urls.flower)
    from acl_app import app

    seen: list[str] = []
    sent = False
    deadline = time.monotonic() + 30
    with app.connection_for_read() as flower:
        receiver = app.events.Receiver(flower, handlers={"*": lambda event: seen.append(event["type"])})
        worker.start()
        try:
            for _ in receiver.itercapture(timeout=20, wakeup=False):
                if seen and not sent:
                    celery.Celery(broker=redis_url).send_task(
                        "motet.run", queue="motet.gpu.test", retry=False
                    )
                    sent = True
                if "task-succeeded" in seen:
                    break
                assert time.monotonic() < deadline, worker.tail()
        finally:
            worker.stop(10)
    assert worker.exit_code == 0
    assert "NoPermission" not in worker.log.read_text()


# -- the cluster, with stand-ins for its processes


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "data"
    yield folder
    # A cluster that was killed leaves its folders for sockets to the next one; here there is none.
    for link in folder.glob("*/run"):
        SocketDir(link.parent).remove()


def starts(data: Path, name: str) -> list[dict[str, Any]]:
    """The environment, and the PID, of the process of this name at each of its starts."""
    file = data / "seen" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def ready(cluster: Cluster) -> bool:
    with contextlib.suppress(OSError), urlopen(f"{cluster.url}/readyz") as answer:
        return answer.status == 200
    return False


class Up(Protocol):
    def __call__(self, data: Path, python: str = sys.executable, **how: Any) -> subprocess.Popen[bytes]: ...


@pytest.fixture
def up() -> Iterator[Up]:
    """Run a whole `motet up` in another process, and return when clients could come."""
    with contextlib.ExitStack() as stack:

        def start(data: Path, python: str = sys.executable, **how: Any) -> subprocess.Popen[bytes]:
            command = [python, stand_in.__file__, "up", str(data)]
            process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, **how))
            stack.callback(process.kill)
            until(
                lambda: (
                    ((data / "client.json").exists() and starts(data, "worker")) or process.poll() is not None
                )
            )
            assert process.poll() is None, process.stderr.read().decode()
            return process

        yield start


def test_a_cluster_starts_everything_and_gives_each_process_what_it_needs(data: Path):
    with StandIn(data, cpus=2, port=0) as cluster:
        assert ready(cluster)
        assert cluster.pids.keys() == {"valkey", "postgres", "api", "dispatch", "aggregate", "workers"}
        assert cluster.tokens["admin"] == "token of admin"
        client = data / "client.json"
        assert json.loads(client.read_text()) == {
            "url": cluster.url,
            "token": "token of user",
            "admin_token": "token of admin",
        }
        assert stat.S_IMODE(client.stat().st_mode) == 0o600
        # The API may answer before the others have begun.
        until(lambda: starts(data, "scheduler-dispatch") and starts(data, "workers---cpus"))
        [dispatch], [worker] = starts(data, "scheduler-dispatch"), starts(data, "workers---cpus")
        assert query(dispatch["MOTET_DATABASE_URL"], "SELECT 1") == [(1,)]
        assert redis.Redis.from_url(redis_py_url(dispatch["MOTET_REDIS_URL"])).info("server")
        assert worker["MOTET_TOKEN"] == "token of worker"
        assert worker["MOTET_REDIS_URL"].startswith("redis+socket://worker:")
        assert worker["MOTET_URL"] == cluster.url
        assert "MOTET_DATABASE_URL" not in worker
        pids = list(cluster.pids.values())
    assert gone(pids)
    assert not client.exists()


def test_flower_starts_with_the_cluster_and_asks_for_a_password(data: Path):
    with StandIn(data, port=0, flower_port=0) as cluster:
        address = urlsplit(cluster.flower_url)
        until(lambda: status(f"http://127.0.0.1:{address.port}/api/tasks", "") == 401)
        login = b64encode(f"{address.username}:{address.password}".encode()).decode()
        assert status(f"http://127.0.0.1:{address.port}/api/tasks", f"Basic {login}") == 200
        assert address.password not in Path(f"/proc/{cluster.pids['flower']}/cmdline").read_text()


def status(url: str, authorization: str) -> int | None:
    try:
        return urlopen(Request(url, headers={"Authorization": authorization})).status
    except HTTPError as error:
        return error.code
    except OSError:
        return None


def test_a_cluster_hands_on_settings_but_not_what_belongs_to_another_cluster(
    data: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MOTET_LEASE_S", "9")
    monkeypatch.setenv("MOTET_DATABASE_URL", "postgresql://elsewhere")
    monkeypatch.setenv("MOTET_TOKEN_FILE", "/elsewhere")
    monkeypatch.setenv("PGSERVICE", "elsewhere")
    with StandIn(data, cpus=2, port=0):
        [env] = starts(data, "workers---cpus")
    assert env["MOTET_LEASE_S"] == "9"
    assert "elsewhere" not in str(env)


def test_models_are_registered_once_and_rows_stay_from_one_run_to_the_next(data: Path):
    for _ in range(2):
        with StandIn(data, port=0):
            url = starts(data, "scheduler-api")[-1]["MOTET_DATABASE_URL"]
            query(url, "CREATE TABLE IF NOT EXISTS kept (at timestamptz DEFAULT now())")
            query(url, "INSERT INTO kept DEFAULT VALUES")
            rows = query(url, "SELECT count(*) FROM kept")
    assert rows == [(2,)]
    assert len(starts(data, "workers-register")) == 1


def test_whatever_is_killed_starts_again_where_it_was(data: Path, caplog: pytest.LogCaptureFixture):
    with StandIn(data, cpus=1, port=0) as cluster:
        before = cluster.pids
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)
        until(
            lambda: (
                cluster.pids.keys() == before.keys() and not set(cluster.pids.values()) & set(before.values())
            )
        )
        env = starts(data, "scheduler-api")[-1]
        until(lambda: ready(cluster))
        assert query(env["MOTET_DATABASE_URL"], "SELECT 1") == [(1,)]
        assert redis.Redis.from_url(redis_py_url(env["MOTET_REDIS_URL"])).ping()
    assert sorted(record.args[0] for record in caplog.records if record.levelname == "WARNING") == sorted(
        before
    )


def test_what_keeps_dying_is_started_ever_more_slowly_but_at_least_every_4_seconds(data: Path):
    cluster = StandIn(data)
    broken = Child("broken", ["/bin/false"])
    cluster._watched.append(Watched(broken, grace_s=1, started_at=0.0))
    now, pauses = 0.0, []
    for _ in range(10):
        broken.wait(5)
        cluster.step(now)
        pauses.append(cluster._watched[0].restart_at - now)
        now = cluster._watched[0].restart_at
        cluster.step(now)
    assert pauses[0] < 0.5
    assert pauses == sorted(pauses)
    assert max(pauses) == 4


def test_a_process_that_cannot_start_is_shown_with_the_end_of_its_log_and_nothing_stays(
    data: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STAND_IN_FAILS", "api")
    with pytest.raises(SetupError, match=r"api ended with exit code 1; the end of .*\n.*no luck today"):
        StandIn(data, cpus=1, port=0).start()
    assert not marked(str(data))
    assert not (data / "client.json").exists()


def test_a_second_cluster_on_the_same_folder_is_refused_and_harms_nothing(data: Path):
    with StandIn(data, port=0) as cluster:
        with pytest.raises(SetupError, match=f"{data} is in use by process {os.getpid()}"):
            StandIn(data, port=0).start()
        assert (data / "client.json").exists()
        assert ready(cluster)


def test_a_port_that_is_taken_is_named_with_the_remedy(data: Path, tmp_path: Path):
    with StandIn(tmp_path / "other", port=0) as other:
        port = int(other.url.rpartition(":")[2])
        with pytest.raises(SetupError, match=rf"port {port}: .* `--port 0`"):
            StandIn(data, port=port).start()


@linux
def test_kill_9_of_motet_up_leaves_nothing_running_and_the_next_one_starts_at_once_with_all_rows(
    up: Up, data: Path
):
    process = up(data)
    url = starts(data, "scheduler-api")[-1]["MOTET_DATABASE_URL"]
    query(url, "CREATE TABLE kept AS SELECT generate_series(1, 1000)")
    family = descendants(process.pid)
    assert len(family) >= 12  # Postgres' own processes and the launcher's worker are among them

    process.kill()
    process.wait()

    until(lambda: gone(family))
    with StandIn(data, port=0):
        url = starts(data, "scheduler-api")[-1]["MOTET_DATABASE_URL"]
        assert query(url, "SELECT count(*) FROM kept") == [(1000,)]


@linux
def test_a_new_motet_up_does_not_wait_for_the_processes_of_a_killed_one_to_end(up: Up, data: Path):
    process = up(data)
    [worker] = starts(data, "worker")
    os.kill(worker["PID"], signal.SIGSTOP)  # deaf to SIGTERM, as one in a long kernel would be

    process.kill()
    process.wait()

    with StandIn(data, port=0):
        assert gone([worker["PID"]])


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_motet_up_in_order(up: Up, data: Path, sign: signal.Signals):
    process = up(data)
    family = descendants(process.pid)
    process.send_signal(sign)
    assert process.wait(20) == 0
    assert gone(family)
    assert not (data / "client.json").exists()
    assert "database system is shut down" in (data / "logs/postgres.log").read_text()


@linux
def test_a_second_signal_kills_what_does_not_stop(up: Up, data: Path):
    process = up(data)
    [worker] = starts(data, "worker")
    os.kill(worker["PID"], signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    until(lambda: not (data / "client.json").exists())
    process.send_signal(signal.SIGINT)
    assert process.wait(4) == 0  # its launcher alone would wait 5 s for it
    assert gone([worker["PID"]])


def descendants(pid: int) -> set[int]:
    children: set[int] = set()
    with contextlib.suppress(OSError):  # it ends just now
        for task in Path(f"/proc/{pid}/task").iterdir():
            children.update(map(int, (task / "children").read_text().split()))
    return children.union(*map(descendants, children))


# -- other users


def python_of(user: str) -> tuple[str, dict[str, str]]:
    """An interpreter that this user may run, and the environment in which it finds what we find."""
    folders = [Path(stand_in.__file__).parents[2], *site.getsitepackages()]
    env = {"PYTHONPATH": os.pathsep.join(map(str, folders)), "PATH": os.defpath}
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        command = [python, "-c", "import motet.local.cluster, psycopg"]
        with contextlib.suppress(OSError):
            if subprocess.run(command, user=user, env=env, cwd="/", capture_output=True).returncode == 0:
                return python, env
    pytest.skip(f"no Python {sys.version_info.major}.{sys.version_info.minor} that the user {user} may run")


@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can become another user; this run itself is the test"
)
def test_an_ordinary_user_can_run_it_too(up: Up):
    python, env = python_of("nobody")
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
        data = Path(folder) / "data"
        for _ in range(2):
            process = up(data, python, user="nobody", env=env, cwd="/")
            url = starts(data, "scheduler-api")[-1]["MOTET_DATABASE_URL"]
            assert query(url, "SELECT 1") == [(1,)]
            family = descendants(process.pid)
            assert {Path(f"/proc/{pid}").stat().st_uid for pid in family if not gone([pid])} == {
                pwd.getpwnam("nobody").pw_uid
            }
            process.terminate()
            assert process.wait(20) == 0
            assert gone(family)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root must become another user for Postgres")
def test_root_runs_postgres_as_another_user_also_from_folders_that_only_root_may_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    [wheel, *_] = _installations()
    packages, private = wheel.parents[2], tmp_path / "private"
    for folder in (wheel.parent, *packages.glob(f"{wheel.parent.parent.name}.libs")):
        shutil.copytree(folder, private / folder.relative_to(packages))
    private.chmod(0o700)
    monkeypatch.setattr(
        embedded_postgres, "_installations", lambda: iter([private / wheel.relative_to(packages)])
    )
    with tempfile.TemporaryDirectory() as copies:
        monkeypatch.setattr(embedded_postgres, "COPIES", Path(copies))
        server = Postgres(tmp_path / "data")
        try:
            assert query(server.start(), "SELECT 1") == [(1,)]
            assert Path(f"/proc/{server.pid}").stat().st_uid != 0
            assert Path(f"/proc/{server.pid}/exe").readlink().is_relative_to(copies)
        finally:
            server.stop()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700

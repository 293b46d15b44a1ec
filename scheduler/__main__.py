"""``python -m scheduler api | dispatch | aggregate | migrate | bootstrap``: one process each.

The leader starts ``python -m scheduler publish`` itself where there are very many workers.
``python -m scheduler health api | dispatch | aggregate`` asks from beside one whether it does its work, and
``python -m scheduler simulate`` tries jobs on a cluster that is only numbers.
"""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import threading
from pathlib import Path

from motet.errors import MotetError, SetupError
from motet.protocol import traces
from motet.protocol.imports import importing_for_good
from motet.protocol.logs import configure
from motet.protocol.settings import Settings

log = logging.getLogger("scheduler")


def main(argv: list[str] | None = None) -> int:
    """Run one of the scheduler's processes until it is told to stop. The exit status."""
    argv = sys.argv[1:] if argv is None else argv
    # All that follows is for simulate itself.
    known = argv[:1] if argv[:1] == ["simulate"] else argv
    parser = argparse.ArgumentParser(prog="python -m scheduler", description=__doc__)
    parser.add_argument("process", choices=sorted(PROCESSES))
    parser.add_argument("of", nargs="?", metavar="PROCESS", help="health: the process that is asked about")
    parser.add_argument("--tokens", type=Path, help="bootstrap: file that the first tokens are written to")
    arguments = parser.parse_args(known)
    arguments.more = argv[len(known) :]
    try:
        settings = Settings.from_env()
        configure(arguments.process, settings.log_level)
        PROCESSES[arguments.process](settings, arguments)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MotetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception:
        log.exception("stopped by an unexpected error")
        return 1
    return 0


def _api(settings: Settings, _: argparse.Namespace) -> None:
    with importing_for_good():
        from scheduler.api import serve

    traces.configure("api", settings.traces)
    serve(settings.need("database_url", "redis_url", "blob_dir"))


def _dispatch(settings: Settings, _: argparse.Namespace) -> None:
    with importing_for_good():
        from motet.protocol.transport import RedisTransport
        from scheduler.dispatcher import Dispatcher
        from scheduler.leading import run
        from scheduler.publishing import Publisher
        from scheduler.store.database import Database
        from scheduler.store.listening import Listener

    settings.need("database_url", "redis_url")
    database = Database(settings.database_url, pool=2)
    transport = RedisTransport(settings.redis_url, payload_ttl_s=settings.payload_ttl_s)
    traces.configure("dispatch", settings.traces)
    dispatcher = Dispatcher(database, transport, settings, publisher=Publisher())
    run(dispatcher, Listener(database), _stopping())
    database.close()


def _publish(settings: Settings, _: argparse.Namespace) -> None:
    with importing_for_good():
        from motet.protocol.transport import RedisTransport
        from scheduler.payloads import Payloads
        from scheduler.publishing import serve
        from scheduler.store.database import Database
        from scheduler.store.manifests import Manifests

    # It ends with the leader, which may have orders for it until then.
    _stopping()
    settings.need("database_url", "redis_url")
    database = Database(settings.database_url, pool=1)
    transport = RedisTransport(settings.redis_url, payload_ttl_s=settings.payload_ttl_s)
    traces.configure("dispatch", settings.traces)
    serve(socket.socket(fileno=sys.stdin.fileno()), transport, Payloads(database, Manifests()))
    database.close()


def _aggregate(settings: Settings, _: argparse.Namespace) -> None:
    with importing_for_good():
        from motet.protocol.transport import RedisTransport
        from scheduler.aggregator import Aggregator, run
        from scheduler.store.database import Database

    settings.need("database_url", "redis_url")
    database = Database(settings.database_url, pool=2)
    traces.configure("aggregate", settings.traces)
    run(Aggregator(database, RedisTransport(settings.redis_url), settings), _stopping())
    database.close()


def _migrate(settings: Settings, _: argparse.Namespace) -> None:
    from scheduler.migrate import upgrade

    upgrade(settings.need("database_url").database_url)


def _bootstrap(settings: Settings, arguments: argparse.Namespace) -> None:
    """Migrate, and make the first tokens: one process where both are wanted, for an import costs a second."""
    from scheduler.bootstrap import bootstrap

    if arguments.tokens is None:
        raise SetupError("bootstrap needs --tokens FILE, where the first tokens are written to")
    _migrate(settings, arguments)
    bootstrap(settings.database_url, arguments.tokens)


def _health(settings: Settings, arguments: argparse.Namespace) -> None:
    from scheduler import health

    if arguments.of not in health.PROCESSES:
        raise SetupError(f"health: got {arguments.of!r}; expected one of {', '.join(health.PROCESSES)}")
    print(health.check(arguments.of, settings))


def _simulate(_: Settings, arguments: argparse.Namespace) -> None:
    from scheduler.simulation.trial import run

    run(arguments.more)


PROCESSES = {
    "api": _api,
    "dispatch": _dispatch,
    "aggregate": _aggregate,
    "publish": _publish,
    "migrate": _migrate,
    "bootstrap": _bootstrap,
    "health": _health,
    "simulate": _simulate,
}


def _stopping() -> threading.Event:
    """An event that SIGTERM and SIGINT set."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    return stopping


if __name__ == "__main__":
    sys.exit(main())

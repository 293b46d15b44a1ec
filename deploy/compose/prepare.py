"""Make what docker-compose.yml needs and no repository may hold: secrets/ and .env. Nothing is ever overwritten.

    make env                                    what it runs: any Python from 3.11, nothing installed
    python3 deploy/compose/prepare.py --root /srv/motet

The folder secrets/ is closed to everybody but its owner. The files in it are not: a container gets single ones of
them, where another user id than the owner's must be able to read them.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

REPOSITORY = Path(__file__).resolve().parents[2]

# motet's own __init__ needs packages that a bare host lacks; the one function that is shared with `motet up` does not.
if "motet" not in sys.modules:
    package = types.ModuleType("motet")
    package.__path__ = [str(REPOSITORY / "motet")]
    sys.modules["motet"] = package
from motet.local.valkey import RIGHTS, acl  # noqa: E402

SCOPES = ("admin", "user", "worker")
#: What Redis' health check is: somebody who may ask whether it is there.
HEALTH = "user health on nopass resetchannels -@all +ping"

ENV = """\
# Read by docker compose; see docs/operations.md. Made once by `make env`, then yours: it is never written again.

# Where the API and Flower are reached. Beyond loopback, put a proxy with TLS in front: tokens and
# texts go over this line. A range, such as 127.0.0.1:8700-8702, is for `--scale api=3`.
API_LISTEN=127.0.0.1:8700
FLOWER_LISTEN=127.0.0.1:5555

# Containers of worker-cpu (0 where only GPUs work), slots in each, cores of each (0: all), memory of each.
CPU_WORKERS=1
CPU_SLOTS=1
CPU_WORKER_CPUS=0
CPU_WORKER_MEMORY=4g

# With `docker compose --profile gpu up`: which GPUs, as `motet worker --gpus` takes them, and memory of the host.
#GPUS=all
#GPU_WORKER_MEMORY=32g

# Days after its end at which a job is deleted; 0 keeps all.
RETENTION_DAYS=0

# Share of a device that interactive rows, such as asks of open jobs, may take from bulk that waits: 0.1 to 0.9.
#LANE_SHARE=0.3

#POSTGRES_MEMORY=2g
#REDIS_MAXMEMORY=512mb
#REDIS_MEMORY=1g
#API_MEMORY=2g
#WORKER_CACHE_MB=20000
#LOG_LEVEL=INFO

# An OTLP/HTTP receiver of traces, such as http://collector:4318/v1/traces: a service that an override file puts on
# the network `wire`, which has no way out.
#TRACES=

# Of the images: the Python they are made from, and further options of pip for PyTorch, such as an index that has
# its build for CPUs. Without any, PyTorch comes with CUDA, several GB of it; wheels that lie in
# deploy/compose/wheels are preferred.
#PYTHON_IMAGE=python:3.12-slim
#CPU_TORCH_PIP_OPTIONS=
#GPU_TORCH_PIP_OPTIONS=
#IMAGE_TAG=local
"""


def prepare(root: Path) -> list[Path]:
    """Make what is missing below ``root``; return what was made. Raises OSError."""
    folder = root / "secrets"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    made = [folder / name for name, draw in FIRST.items() if _create(folder / name, draw())]
    for name, of in DERIVED.items():
        if _renew(folder / name, of(folder)):
            made.append(folder / name)
    if _create(root / ".env", ENV):
        made.append(root / ".env")
    return made


def _url(scheme: str, user: str, where: str) -> Callable[[], str]:
    return lambda: f"{scheme}://{user}:{_password()}@{where}"


def _password() -> str:
    return secrets.token_urlsafe(32)


def _token() -> str:
    """As scheduler.api.auth draws them: an id to find it by, and a secret."""
    return f"{secrets.token_hex(6)}.{secrets.token_urlsafe(32)}"


#: Drawn once.
FIRST: Mapping[str, Callable[[], str]] = {
    "postgres_password": _password,
    "database_url": _url("postgresql+psycopg", "motet", "postgres:5432/motet"),
    **{f"redis_{role}_url": _url("redis", role, "redis:6379/0") for role in RIGHTS},
    "flower_password": lambda: secrets.token_urlsafe(12),
    "flower_cookie_secret": lambda: secrets.token_urlsafe(48),
    **{f"{scope}_token": _token for scope in SCOPES},
}


def _redis_acl(folder: Path) -> str:
    passwords = {role: _password_of(folder / f"redis_{role}_url") for role in RIGHTS}
    return "\n".join((*acl(passwords), HEALTH, ""))


def _postgres_init(folder: Path) -> str:
    return f"""\
CREATE ROLE motet LOGIN PASSWORD '{_password_of(folder / "database_url")}';
CREATE DATABASE motet OWNER motet;
REVOKE ALL ON DATABASE motet FROM PUBLIC;
"""


def _tokens(folder: Path) -> str:
    return json.dumps({scope: (folder / f"{scope}_token").read_text("utf-8").strip() for scope in SCOPES})


#: Follow from the first ones and from this version of motet: its rights in Redis may have changed.
DERIVED: Mapping[str, Callable[[Path], str]] = {
    "redis.acl": _redis_acl,
    "postgres_init.sql": _postgres_init,
    "tokens.json": _tokens,
}


def _password_of(path: Path) -> str:
    password = urlsplit(path.read_text("utf-8").strip()).password
    if not password or not password.replace("-", "").replace("_", "").isalnum():
        raise SystemExit(f"error: {path}: expected a URL with a password of letters, digits, - and _")
    return password


def _create(path: Path, text: str) -> bool:
    """Write a file that is not there yet, in one step. False where it is."""
    if path.exists():
        return False
    _write(path, text)
    return True


def _renew(path: Path, text: str) -> bool:
    """Write a file that is not there or says something else."""
    if path.exists() and path.read_text("utf-8") == text:
        return False
    _write(path, text)
    return True


def _write(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, "utf-8")
    # Whatever the umask is: see the head of this file.
    new.chmod(0o644)
    os.replace(new, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 where a file cannot be written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root", type=Path, default=REPOSITORY, help="where docker-compose.yml is (default: this repository)"
    )
    root = parser.parse_args(arguments).root.resolve()
    try:
        made = prepare(root)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    print(
        f"made {', '.join(str(p.relative_to(root)) for p in made)}" if made else "everything is there already"
    )
    print(
        f"""
secrets/ belongs into your backup: the database knows these passwords. Next:
  docker compose up -d --build --wait       the whole cluster; the first time takes some minutes
  docker compose run --rm models            the model and the heads that come with motet, once
  export MOTET_URL=http://127.0.0.1:8700 MOTET_TOKEN_FILE={root}/secrets/user_token
  motet workers                             or, without motet on this host: docker compose run --rm motet workers
Flower: http://127.0.0.1:5555, user motet, password in secrets/flower_password"""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

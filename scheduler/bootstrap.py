"""Bootstrap: the tenant and the first tokens of a fresh installation."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from motet.errors import SetupError
from scheduler.api.auth import NewToken, new_token, split_token
from scheduler.store.database import Database
from scheduler.store.registry import add_token, tenant_named

TENANT = "default"
FIRST_SCOPES = ("admin", "user", "worker")


def bootstrap(database_url: str, path: str | Path) -> dict[str, str]:
    """Make sure of the tenant "default" and of its first tokens; return scope -> token.

    The tokens stand in the file ``path``, mode 0600, as {"admin", "user", "worker"}: the only place that holds
    them in clear. A file that is there is kept, and its tokens are stored again where the database has lost
    them; one that was revoked stays revoked. Again is harmless. Raises SetupError for a file of another form.
    """
    path = Path(path)
    tokens = _read(path) or _write(path, {scope: new_token() for scope in FIRST_SCOPES})
    database = Database(database_url, pool=1)
    try:
        with database.transaction() as connection:
            tenant = tenant_named(connection, TENANT)
            for scope, token in tokens.items():
                add_token(
                    connection,
                    token_id=token.id,
                    tenant=tenant,
                    name=f"first {scope}",
                    scope=scope,
                    secret_sha256=token.digest,
                )
    finally:
        database.close()
    return {scope: token.shown for scope, token in tokens.items()}


def _read(path: Path) -> dict[str, NewToken] | None:
    """The tokens of the file, or None where there is no file."""
    try:
        said = json.loads(path.read_text("utf-8"))
        found = {scope: split_token(said[scope]) for scope in FIRST_SCOPES}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SetupError(
            f"{path}: got {type(error).__name__}; expected the tokens of motet; delete it"
        ) from None
    tokens = {scope: token for scope, token in found.items() if token is not None}
    if len(tokens) < len(found):
        raise SetupError(f"{path}: got something else; expected tokens of the form <id>.<secret>; delete it")
    return tokens


def _write(path: Path, tokens: dict[str, NewToken]) -> dict[str, NewToken]:
    """Write the file in one step, before the database knows of it: a crash in between is mended by the next run.

    Where another process was faster, its tokens are the ones.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    shown = {scope: token.shown for scope, token in tokens.items()}
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(shown, file)
            file.flush()
            os.fsync(file.fileno())
        os.link(new, path)
    except FileExistsError:
        return _read(path) or tokens
    finally:
        new.unlink(missing_ok=True)
    return tokens

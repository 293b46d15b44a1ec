"""The distributions that are installed here: motet, and the cluster's (docs/decisions/0016)."""

from __future__ import annotations

from importlib.util import find_spec

from motet.errors import SetupError

#: Scheduler, workers and migrations. Packages of these names prove nothing: they may be another project's.
CLUSTER = "motet-cluster"


def installed(distribution: str = "motet") -> str | None:
    """The version that is installed; None where there is none, as in a bare folder."""
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def need(extra: str, *packages: str) -> None:
    """Raise SetupError unless the cluster's distribution and these packages are installed here."""
    missing = [] if installed(CLUSTER) else [CLUSTER]
    missing += [name for name in packages if find_spec(name) is None]
    if missing:
        raise SetupError(
            f"this needs {' and '.join(missing)}, not installed here; pip install 'motet[{extra}]'"
        )

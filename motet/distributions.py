"""The distributions that are installed here: motet, and the cluster's (docs/decisions/0016)."""

from __future__ import annotations

from importlib import metadata

#: Scheduler, workers and migrations. Packages of these names prove nothing: they may be another project's.
CLUSTER = "motet-cluster"


def installed(distribution: str = "motet") -> str | None:
    """The version that is installed; None where there is none, as in a bare folder."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None

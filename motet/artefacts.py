"""Artefacts: files of data that functions read, described and sent to the registry."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from motet.errors import NotFound, SetupError
from motet.http import Http
from motet.protocol.manifest import ARTEFACT, ARTEFACT_SUFFIXES, Manifest

#: Seconds in which the API must take the next piece of a file, or answer behind the last one.
FILE_S = 300.0


def artefact_files(source: Path) -> dict[str, Path]:
    """The files of an artefact, by name: a file, or all files of a folder. Raises SetupError for what is no data."""
    if not source.exists():
        raise SetupError(f"{source}: no such file; expected one, or a folder of them, for an artefact")
    found = sorted(source.iterdir()) if source.is_dir() else [source]
    files = {path.name: path for path in found if not path.name.startswith(".")}
    if not files:
        raise SetupError(f"{source}: an empty folder; expected files that end in {_SUFFIXES}")
    for name, path in files.items():
        if path.suffix not in ARTEFACT_SUFFIXES or not path.is_file():
            raise SetupError(
                f"{name}: got {'a folder' if path.is_dir() else path.suffix or 'no ending'}; an artefact is data, of files "
                f"that end in {_SUFFIXES}; a pickle would run code, so store its numbers as safetensors or JSON"
            )
    return files


def describe_artefact(files: Mapping[str, Path], *, name: str, version: str, licence: str = "") -> Manifest:
    """The manifest under which these files are registered."""
    return Manifest(
        name=name,
        version=version,
        engine=ARTEFACT,
        answers="artefact",
        files=digests(files),
        sizes=sizes(files),
        licence=licence,
    )


def digests(files: Mapping[str, Path]) -> dict[str, str]:
    """Sha256 of each file, by its relative path."""
    found = {}
    for name, path in files.items():
        with path.open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def sizes(files: Mapping[str, Path]) -> dict[str, int]:
    """Bytes of each file, by its relative path."""
    return {name: path.stat().st_size for name, path in files.items()}


def send_file(http: Http, sha256: str, path: Path) -> None:
    """Store a file of the registry, unless the API has it."""
    try:
        http.request("HEAD", f"/v1/blobs/{sha256}")
    except NotFound:
        http.request("PUT", f"/v1/blobs/{sha256}", content=path, answer_s=FILE_S)


def add_artefact(http: Http, source: Path, *, name: str, version: str | None, licence: str = "") -> Manifest:
    """Register files; ``version`` None counts up, and the same content under the newest version stays that one."""
    files = artefact_files(source)
    newest = _newest(http, name) if version is None else None
    manifest = describe_artefact(files, name=name, version=version or "1", licence=licence)
    if newest is not None and newest.digest == manifest.digest:
        return newest
    if newest is not None:
        manifest = describe_artefact(files, name=name, version=_next(newest), licence=licence)
    for file, path in files.items():
        send_file(http, manifest.files[file], path)
    return Manifest.from_json(http.post("/v1/models", manifest.to_json()))


def _newest(http: Http, name: str) -> Manifest | None:
    try:
        return Manifest.from_json(http.get(f"/v1/models/{quote(name, safe='')}"))
    except NotFound:
        return None


def _next(newest: Manifest) -> str:
    if not newest.version.isdecimal():
        raise SetupError(f"{newest.ref} has no number for a version; name the version of the next one")
    return str(int(newest.version) + 1)


_SUFFIXES = ", ".join(ARTEFACT_SUFFIXES)

"""Sentences with a translation by people: what Django says to its users, in English and in Brazilian Portuguese (BSD-3)."""

from __future__ import annotations

import ast
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from motet.datasets import Archive, fetch
from motet.errors import SetupError

DJANGO = Archive(
    package="Django",
    version="5.2.8",
    filename="django-5.2.8-py3-none-any.whl",
    sha256="37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
)
#: Messages with fewer words say little; those with places for values, or markup, are not sentences.
_LEAST_WORDS, _NO_SENTENCE = 5, re.compile(r"[%{}<>\n]")
_QUOTED = re.compile(r'^(msgid|msgstr)?\s*(".*")$')


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePair:
    """A sentence, and how people said it in Portuguese."""

    english: str
    portuguese: str


def sentences() -> list[SentencePair]:
    """Some 200 of them, always in the same order. Raises SetupError."""
    return read(fetch(DJANGO))


def read(path: Path) -> list[SentencePair]:
    """The sentences of a wheel of Django. Raises SetupError where it has another layout."""
    found: dict[str, str] = {}
    try:
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                if re.search(r"/pt_BR/LC_MESSAGES/django(js)?\.po\Z", name):
                    found.update(messages(wheel.read(name).decode("utf-8")))
    except (zipfile.BadZipFile, SyntaxError, ValueError) as error:
        raise SetupError(f"{path} has another layout than expected ({error}); delete it") from None
    pairs = [
        SentencePair(english=english, portuguese=portuguese)
        for english, portuguese in found.items()
        if len(english.split()) >= _LEAST_WORDS
        and portuguese
        and not _NO_SENTENCE.search(english + portuguese)
    ]
    if not pairs:
        raise SetupError(f"{path} holds no sentences in Portuguese; delete it, and it is fetched again")
    return pairs


def messages(catalogue: str) -> dict[str, str]:
    """English -> its translation, of a gettext catalogue; forms of the plural and doubtful ones are left out."""
    found: dict[str, str] = {}
    for entry in re.split(r"\n\s*\n", catalogue):
        if "msgid_plural" in entry or re.search(r"^#,.*\bfuzzy\b", entry, re.MULTILINE):
            continue
        said: dict[str, str] = {"msgid": "", "msgstr": ""}
        part = ""
        for line in entry.splitlines():
            if quoted := _QUOTED.match(line):
                part = quoted[1] or part
                said[part] = said.get(part, "") + ast.literal_eval(quoted[2])
        if said["msgid"]:
            found[said["msgid"]] = said["msgstr"]
    return found

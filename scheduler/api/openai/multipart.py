"""A form with one file, read as it comes: the file goes on in pieces, the other fields are kept."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from motet.words import visible
from scheduler.api.bodies import chunks
from scheduler.api.openai.refusals import DoorError

#: Bytes of the fields beside the file, and how many there may be.
_FIELD_BYTES, _MOST_FIELDS = 64 * 1024, 64


class UploadForm:
    """A form that is being received; ``fields`` and ``filename`` are whole once ``file`` has ended."""

    def __init__(self, request: Request) -> None:
        """Raises DoorError where the request is no form."""
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        if kind != b"multipart/form-data" or not (boundary := options.get(b"boundary")):
            raise DoorError("expected multipart/form-data with a file and a purpose", param="file")
        if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise DoorError(
                "a form is read as it is; send it without a Content-Encoding", param="Content-Encoding"
            )
        self.fields: dict[str, str] = {}
        #: What the file is called; None: there was none.
        self.filename: str | None = None
        self._request = request
        try:
            self._parser = MultipartParser(boundary, _Events(self).callbacks())
        except FormParserError as error:
            raise _broken(error) from None
        self._pieces: list[bytes] = []
        self._whole = False

    async def file(self) -> AsyncIterator[bytes]:
        """The file's bytes, as they come. Raises DoorError for a broken form, also at its end."""
        try:
            async for chunk in chunks(self._request):
                self._parser.write(chunk)
                for piece in self._pieces:
                    yield piece
                self._pieces.clear()
        except FormParserError as error:
            raise _broken(error) from None
        if not self._whole:
            raise DoorError("the form breaks off before its end; send it again", param="file")
        if self.filename is None:
            raise DoorError("the form has no file", param="file", code="missing_required_parameter")


def _broken(error: FormParserError) -> DoorError:
    return DoorError(f"a broken form: {error}", param="file")


class _Events:
    """What the parser finds, one part after the other."""

    def __init__(self, form: UploadForm) -> None:
        self._form = form
        self._begin()

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._ended,
        }

    def _begin(self) -> None:
        self._name, self._is_file = "", False
        self._field = bytearray()
        self._header = (bytearray(), bytearray())
        self._disposition = b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])
        self._bound(len(self._header[0]))

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])
        self._bound(len(self._header[1]))

    def _header_end(self) -> None:
        name, value = self._header
        if bytes(name).lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = (bytearray(), bytearray())

    def _headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        self._is_file = self._name == "file"
        if self._is_file:
            if self._form.filename is not None:
                raise DoorError("the form has two files; send one", param="file")
            self._form.filename = _shown((filename or b"file").decode("utf-8", "replace"))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._form._pieces.append(data[start:end])
            return
        self._field += data[start:end]
        self._bound(len(self._field))

    def _end(self) -> None:
        if not self._is_file:
            if len(self._form.fields) >= _MOST_FIELDS:
                raise DoorError(f"more than {_MOST_FIELDS} fields in a form", param="file")
            self._form.fields[self._name] = self._field.decode("utf-8", "replace")

    def _ended(self) -> None:
        self._form._whole = True

    def _bound(self, size: int) -> None:
        if size > _FIELD_BYTES:
            raise DoorError(f"a field of more than {_FIELD_BYTES:,} bytes", param="file")


def _shown(name: str) -> str:
    """A file's name, as it may be stored and shown: its last part, printable and short."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return visible(last)[:200] or "file"

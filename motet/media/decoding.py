"""A stranger's bytes as one upright picture in RGB, or the reason why not: for the client that shrinks and for workers.

Needs Pillow, imported when the first picture is decoded. The order is that of growing cost: the length of the bytes, the
file's head (format, width and height), then the pixels. What a large picture takes is bounded: a JPEG is decoded no larger
than it is wanted, any other is brought to RGB and made smaller strip by strip, and the threads of a process share the room of
one picture of the largest size.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from motet.errors import SetupError
from motet.media.medium import MAX_MEDIUM_BYTES

if TYPE_CHECKING:
    from PIL.Image import Image

#: Kinds of files that are read. Pillow knows more: one starts another program (EPS), others are no pictures of today.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
#: Width times height. A larger picture would take more than 4 bytes a pixel while it is decoded: 50 million are 200 MB.
MAX_PIXELS = 50_000_000
#: Formats whose decoders hold the whole picture three to four times, from when the file is opened: fewer pixels of them are
#: read, and each takes as much more of the threads' room.
MAX_PIXELS_OF = {"WEBP": 16_000_000, "AVIF": 16_000_000}
#: The longer side may be so many times the shorter one. Resizing to a square would leave nothing of a thinner picture.
MAX_RATIO = 100
#: Bytes of a block of pixels: above 32 MiB, the most that glibc takes from a heap.
_BLOCK_BYTES = 48 << 20
#: Bytes of an AVIF file within which its boxes of sizes are looked for.
_AVIF_HEAD = 64 * 1024
#: Rows of pixels that are brought to RGB at once.
STRIP = 256

BAD_IMAGE, TOO_LARGE = "bad_image", "too_large"
SMALLER = "make it smaller"
READ = "JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF are read"
#: What is no picture of a kind that is read, by a mark within its first bytes -> what it is, and what to do.
KNOWN = (
    (b"ftyphei", "a HEIC picture, as telephones store them; save it as JPEG"),
    (b"ftypmif1", "a HEIF picture, as telephones store them; save it as JPEG"),
    (b"<svg", "an SVG drawing; save it as PNG in the size that is wanted"),
    (b"%!PS", "a PostScript page; save it as PNG"),
    (b"%PDF", "a PDF; save its pages as PNG"),
    (b"<html", "a page of HTML, such as a server's message in place of a picture"),
    (b"<!DOCTYPE", "a page of HTML, such as a server's message in place of a picture"),
)


class _Room:
    """Pixels that the threads of a process decode at the same time: as many as one picture may have."""

    def __init__(self, pixels: int) -> None:
        self._free = pixels
        self._changed, self._turn = threading.Condition(), threading.Lock()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait for room for so many, and hold it. At most as many as there are in all."""
        # Whoever waits is the next: small pictures overtake no large one.
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_room = _Room(MAX_PIXELS)


class BadMedium(ValueError):
    """A medium that cannot be read. ``code``: ``bad_image`` or ``too_large``; the words name no address, path or content."""

    def __init__(self, code: str, words: str) -> None:
        self.code = code
        super().__init__(words)


def decode(data: bytes, side: int | None = None) -> Image:
    """The picture in RGB: upright, the first frame, on white where it is transparent.

    ``side``: the shorter side is needed with at least so many pixels; what is larger may come smaller, never below
    that. None: in its own size. Raises BadMedium, and SetupError where Pillow is missing.
    """
    pillow = _pillow()
    if not data:
        raise BadMedium(BAD_IMAGE, "the picture is empty: it has no bytes")
    if len(data) > MAX_MEDIUM_BYTES:
        raise BadMedium(
            TOO_LARGE, f"the picture's file has {len(data):,} bytes; at most {MAX_MEDIUM_BYTES:,} are read"
        )
    try:
        return _decode(pillow, data, side)
    except BadMedium:
        raise
    except pillow.UnidentifiedImageError:  # its own words hold a memory address
        raise BadMedium(BAD_IMAGE, _unknown(data)) from None
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning):
        words = f"the picture has more than {MAX_PIXELS:,} pixels; {SMALLER}"
        raise BadMedium(TOO_LARGE, words) from None
    except MemoryError:
        raise BadMedium(TOO_LARGE, f"the picture needs more memory than there is; {SMALLER}") from None
    except Exception:  # noqa: BLE001 - a stranger's bytes: Pillow raises OSError, SyntaxError, struct.error and others
        raise BadMedium(
            BAD_IMAGE, "the picture is damaged or cut off: it cannot be read to its end"
        ) from None


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise SetupError(
            "pictures are read with Pillow, which is not installed: pip install pillow"
        ) from None
    # Blocks of this size glibc maps apart, and gives back at once. Smaller ones each thread's heap would keep.
    Image.core.set_block_size(_BLOCK_BYTES)  # type: ignore[attr-defined]
    return Image


def _unknown(data: bytes) -> str:
    head = data[:512].lower()
    for mark, words in KNOWN:
        if mark.lower() in head:
            return f"this is {words}; {READ}"
    return f"this is no picture of a kind that is read; {READ}"


def _decode(pillow: Any, data: bytes, side: int | None) -> Image:
    with ExitStack() as room:
        if said := pixels_at_open(data):
            format_, pixels = said
            room.enter_context(_room.taken(min(MAX_PIXELS, pixels * MAX_PIXELS // MAX_PIXELS_OF[format_])))
        # Closed before the room that its pixels had is another picture's.
        image = room.enter_context(pillow.open(io.BytesIO(data), formats=FORMATS))
        width, height = image.size
        _check_size(width, height, MAX_PIXELS_OF.get(image.format, MAX_PIXELS))
        if side:
            image.draft("RGB", (side, side))  # only of JPEG; afterwards `size` is that of the decoded picture
        if "progressive" not in image.info:  # such a JPEG is held whole while it is decoded
            width, height = image.size
        if not said:
            room.enter_context(_room.taken(width * height))
        image.load()
        turn = _turn(image)
        picture: Image = _turned(pillow, _smaller(pillow, image, side, _to_rgb(pillow, image)), turn)
        image.close()
    picture.info = {}  # where and with what it was taken is nobody's business behind here
    return picture


def pixels_at_open(data: bytes) -> tuple[str, int] | None:
    """Format and pixels of a file whose decoder takes its memory when it is opened, by the file's own head; None: it is of
    another format. As many as are read at most where the head does not say."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        match data[12:16]:
            case b"VP8X":
                width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
            case b"VP8L":
                bits = int.from_bytes(data[21:25], "little")
                width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
            case _:
                width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
        return "WEBP", width * height or MAX_PIXELS_OF["WEBP"]
    if data[4:8] == b"ftyp":
        # A box for each picture in the file, and for each of its parts: four letters, four bytes of flags, the two sides.
        found = [
            int.from_bytes(data[at + 8 : at + 12], "big") * int.from_bytes(data[at + 12 : at + 16], "big")
            for at in (box.start() for box in re.finditer(b"ispe", data[:_AVIF_HEAD]))
        ]
        return "AVIF", max(found, default=0) or MAX_PIXELS_OF["AVIF"]
    return None


def _check_size(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise BadMedium(
            TOO_LARGE,
            f"the picture has {width:,} x {height:,} pixels; at most {most:,} are read; {SMALLER}",
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadMedium(
            TOO_LARGE,
            f"the picture has {width:,} x {height:,} pixels; one side may be at most {MAX_RATIO} times the other: cut it",
        )


def _turn(image: Any) -> int:
    """EXIF's orientation, 1 to 8: how the camera was held. What is unreadable is upright."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # noqa: BLE001 - a broken EXIF block does not spoil the picture, and has many kinds of errors
        return 1


def _to_rgb(pillow: Any, image: Any) -> Callable[[Any], Any]:
    """How a part of this picture is brought to RGB. Raises BadMedium for pixels that are none of a picture."""
    if image.mode.startswith("I;16"):
        return lambda part: _top_bytes(pillow, part).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadMedium(
            BAD_IMAGE, "its pixels have 32 bits each, as measurements have; save it with 8 or 16 bits"
        )
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"):
        raise BadMedium(BAD_IMAGE, "its colours are of a kind that is not read; save it as RGB")
    if image.has_transparency_data:
        return lambda part: _on_white(pillow, part)
    return lambda part: part.convert("RGB")


def _top_bytes(pillow: Any, part: Any) -> Any:
    """The upper half of grey values of 16 bits. Pillow's own conversion cuts at 255: nearly all is white."""
    return pillow.frombytes("L", part.size, part.tobytes()[0 if part.mode == "I;16B" else 1 :: 2])


def _on_white(pillow: Any, part: Any) -> Any:
    part = part.convert("RGBA")
    white = pillow.new("RGB", part.size, "white")
    white.paste(part, mask=part.getchannel("A"))
    return white


def _smaller(pillow: Any, image: Any, side: int | None, to_rgb: Callable[[Any], Any]) -> Any:
    """The picture in RGB, by the largest whole factor that leaves twice ``side``: that much blurs nothing later on."""
    width, height = image.size
    factor = max(1, min(width, height) // (2 * side)) if side else 1
    if factor == 1:
        return to_rgb(image)
    out = pillow.new("RGB", (-(-width // factor), -(-height // factor)))
    step = max(1, STRIP // factor)
    for top in range(0, out.height, step):
        box = (0, top * factor, width, min(height, (top + step) * factor))
        out.paste(to_rgb(image.crop(box)).reduce(factor), (0, top))
    return out


def _turned(pillow: Any, image: Any, turn: int) -> Any:
    ways = pillow.Transpose
    way = {
        2: ways.FLIP_LEFT_RIGHT,
        3: ways.ROTATE_180,
        4: ways.FLIP_TOP_BOTTOM,
        5: ways.TRANSPOSE,
        6: ways.ROTATE_270,
        7: ways.TRANSVERSE,
        8: ways.ROTATE_90,
    }.get(turn)
    return image if way is None else image.transpose(way)

"""Pictures as strangers send them: thirty-five files, made here, and what becomes of each."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from motet.media.decoding import BadMedium, decode
from tests.pictures import chunk

#: What a picture of ours shows in its left and in its right half.
RED, BLUE = (200, 30, 20), (20, 40, 210)
WIDTH, HEIGHT = 64, 48


@dataclass(frozen=True, slots=True)
class Nasty:
    """A file, and what is expected of it."""

    data: bytes
    #: Size in pixels where it is read; None where it is refused.
    size: tuple[int, int] | None
    #: The colours of its left and of its right half, where they are known.
    left: tuple[int, int, int] | None = None
    right: tuple[int, int, int] | None = None
    #: Why it is refused.
    code: str = ""


def halves(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    picture = Image.new("RGB", (width, height), RED)
    picture.paste(BLUE, (width // 2, 0, width, height))
    return picture


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, before: bytes = b"") -> bytes:
    """A PNG chunk by chunk, as Pillow would not write it. ``rows``: not compressed yet, each begun by its filter."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + before
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def text_bomb() -> bytes:
    """A text beside the pixels that grows a thousand times."""
    body = b"Comment\0\0" + zlib.compress(b"\0" * (8 << 20))
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return png(2, 1, 8, 2, b"\0" + bytes([*RED, *BLUE]), chunk)


def transparent(mode: str) -> Image.Image:
    """The left half is red; the right one hides black behind full transparency."""
    picture = halves().convert("RGBA")
    picture.paste((0, 0, 0, 0), (WIDTH // 2, 0, WIDTH, HEIGHT))
    return picture if mode == "RGBA" else picture.convert(mode)


def deep_grey() -> Image.Image:
    """16 bits a pixel: a quarter of full white, and three quarters."""
    values = np.full((HEIGHT, WIDTH), 0x4000, np.uint16)
    values[:, WIDTH // 2 :] = 0xC000
    return Image.fromarray(values)


def turned() -> bytes:
    """Stored lying on its side, as telephones do, with EXIF's word to turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(halves().transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)


def measurements(kind: type) -> bytes:
    return saved(Image.fromarray(np.linspace(0, 1e6, 3072).reshape(48, 64).astype(kind)), "TIFF")


def _read(
    data: bytes, left: tuple[int, int, int] | None = RED, right: tuple[int, int, int] | None = BLUE
) -> Nasty:
    return Nasty(data, (WIDTH, HEIGHT), left, right)


def _refused(data: bytes, code: str = "bad_image") -> Nasty:
    return Nasty(data, None, code=code)


@cache
def nasty() -> Mapping[str, Nasty]:
    """All of them by name."""
    jpeg, grey = saved(halves(), "JPEG", quality=95), halves().convert("L")
    red_grey, blue_grey = (3 * (round(0.299 * r + 0.587 * g + 0.114 * b),) for r, g, b in (RED, BLUE))
    whole_png = saved(halves(), "PNG")
    white = (255, 255, 255)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    big = {n: png(n, n, 1, 0, b"\0" * 1000) for n in (12_000, 30_000)}
    deep_rgb = b"".join(
        b"\0"
        + struct.pack(">96H", *[257 * v for v in RED] * 32)
        + struct.pack(">96H", *[257 * v for v in BLUE] * 32)
        for _ in range(HEIGHT)
    )
    frames = [halves(), halves().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]

    def moving(kind: str) -> bytes:
        return saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)

    broken_exif = jpeg[:2] + b"\xff\xe1\0\x20Exif\0\0II*\0\xff\xff\xff\xff" + b"\x7f" * 16 + jpeg[2:]
    palette = transparent("RGBA").quantize(16)
    return {
        "jpeg": _read(jpeg),
        "progressive jpeg": _read(saved(halves(), "JPEG", quality=95, progressive=True)),
        "grey jpeg": _read(saved(grey, "JPEG"), red_grey, blue_grey),
        "cmyk jpeg": _read(saved(halves().convert("CMYK"), "JPEG", quality=95)),
        "turned by exif": _read(turned()),
        "broken exif": _read(broken_exif),
        "png": _read(whole_png),
        "hidden pixels": _read(saved(transparent("RGBA"), "PNG"), RED, white),
        "grey and hidden": _read(saved(transparent("LA"), "PNG"), red_grey, white),
        "palette": _read(saved(halves().quantize(8), "PNG")),
        "palette and hidden": _read(saved(palette, "PNG"), RED, white),
        "16 bit grey": _read(saved(deep_grey(), "PNG"), (0x40,) * 3, (0xC0,) * 3),
        "16 bit colour": _read(png(WIDTH, HEIGHT, 16, 2, deep_rgb)),
        "one bit": _read(saved(grey.point(lambda v: 255 * (v > 70)).convert("1"), "PNG"), white, (0, 0, 0)),
        "webp": _read(saved(halves(), "WEBP", quality=95)),
        "moving gif": _read(moving("GIF")),
        "moving png": _read(moving("PNG")),
        "bmp": _read(saved(halves(), "BMP")),
        "tiff": _read(saved(halves(), "TIFF", compression="tiff_lzw")),
        "avif": _read(saved(halves(), "AVIF", quality=95)),
        "one pixel": Nasty(saved(Image.new("RGB", (1, 1), RED), "PNG"), (1, 1), RED, RED),
        "eps named png": _refused(eps),
        "144 megapixels": _refused(big[12_000], "too_large"),
        "900 megapixels": _refused(big[30_000], "too_large"),
        "float tiff": _refused(measurements(np.float32)),
        "32 bit tiff": _refused(measurements(np.int32)),
        "thin": _refused(saved(Image.new("RGB", (1, 20_000)), "PNG"), "too_large"),
        "cut off jpeg": _refused(jpeg[: len(jpeg) // 2]),
        "cut off png": _refused(whole_png[:-40]),
        "text bomb": _refused(text_bomb()),
        "svg": _refused(
            b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
        ),
        "heic": _refused(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64),
        "a web page": _refused(b"<!DOCTYPE html><html><body>404</body></html>"),
        "text": _refused(b"the photo is in the other mail"),
        "empty": _refused(b""),
    }


def mutated(data: bytes, dice: np.random.Generator) -> bytes:
    """The file with some of its bytes changed, lost or doubled."""
    raw = bytearray(data)
    for _ in range(int(dice.integers(1, 12))):
        at = int(dice.integers(0, max(1, len(raw))))
        match int(dice.integers(0, 5)):
            case 0 if raw:
                raw[at % len(raw)] = int(dice.integers(0, 256))
            case 1 if raw:
                raw[at % len(raw)] ^= 1 << int(dice.integers(0, 8))
            case 2:
                del raw[at : at + int(dice.integers(1, 40))]
            case 3:
                raw[at:at] = raw[at : at + int(dice.integers(1, 40))]
            case _:
                raw = raw[: max(1, at)] if dice.random() < 0.2 else raw
                # Heads are where sizes and types stand.
                spot = int(dice.integers(0, min(64, len(raw) or 1)))
                raw[spot : spot + 1] = bytes([int(dice.integers(0, 256))])
    return bytes(raw)


def outcome(data: bytes) -> str:
    """What decoding comes to: the mode of the picture, or why it is refused."""
    try:
        return decode(data, side=32).mode
    except BadMedium as refused:
        return f"{refused.code}: {refused}"

"""A contact sheet: many pictures in small on one, each with a few words below it. Needs Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from motet.errors import SetupError
from motet.media.decoding import BadMedium, decode

if TYPE_CHECKING:
    from PIL.Image import Image

#: Pixels of a picture on the sheet, of the words below it, and characters of these.
THUMB, WORDS_HIGH, WORDS_LONG = 96, 14, 15


def contact_sheet(photos: Sequence[bytes], words: Sequence[str], *, columns: int = 20) -> Image:
    """All pictures, row by row. One that cannot be read leaves its place grey. Raises SetupError without Pillow."""
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise SetupError(
            "pictures are drawn with Pillow, which is not installed: pip install pillow"
        ) from None
    step = THUMB + WORDS_HIGH
    columns = min(columns, max(1, len(photos)))
    sheet = Image.new("RGB", (columns * THUMB, -(-len(photos) // columns) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (photo, said) in enumerate(zip(photos, words, strict=True)):
        try:
            small = decode(photo, THUMB)
        except BadMedium:
            small = Image.new("RGB", (THUMB, THUMB), "lightgrey")
        small.thumbnail((THUMB - 4, THUMB - 4))
        left, top = number % columns * THUMB, number // columns * step
        sheet.paste(small, (left + (THUMB - small.width) // 2, top + (THUMB - small.height) // 2))
        draw.text((left + 3, top + THUMB - 1), said[:WORDS_LONG], fill="black", font_size=10)
    return sheet

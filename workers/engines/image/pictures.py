"""Pictures to try a model on: drawn, the same ones each time, with colours, shapes and textures of many sizes."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

#: Sizes in pixels, one after the other.
_SIZES = ((320, 240), (240, 320), (400, 300), (256, 256), (500, 280))


@lru_cache(2)
def trial_pictures(count: int) -> tuple[bytes, ...]:
    """So many pictures as JPEG files."""
    return tuple(_drawn(number) for number in range(count))


def _drawn(number: int) -> bytes:
    dice = np.random.default_rng(number)
    width, height = _SIZES[number % len(_SIZES)]
    coarse = dice.integers(0, 256, (int(dice.integers(2, 24)), int(dice.integers(2, 24)), 3), np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(int(dice.integers(2, 9))):
        x, y = int(dice.integers(0, width)), int(dice.integers(0, height))
        size = int(dice.integers(10, 160))
        colour = tuple(int(n) for n in dice.integers(0, 256, 3))
        box = (x - size // 2, y - size // 2, x + size // 2, y + size // 2)
        match int(dice.integers(0, 4)):
            case 0:
                draw.ellipse(box, fill=colour)
            case 1:
                draw.rectangle(box, fill=colour, outline="black")
            case 2:
                draw.polygon([(x, y - size), (x - size, y + size), (x + size, y)], fill=colour)
            case _:
                for step in range(0, size, 7):
                    draw.line((x, y + step, x + size, y), fill=colour, width=2)
    noisy = np.asarray(picture, np.int16) + dice.normal(0, dice.uniform(0, 25), (height, width, 1)).astype(
        np.int16
    )
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()

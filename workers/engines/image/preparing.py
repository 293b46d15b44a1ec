"""From a picture's bytes to the numbers that a model reads: decoded, resized and cut, in threads that own no device.

Numbers stay bytes of 0 to 255 until they are on the device: a quarter of what they weigh as fp32.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ctypes import CDLL
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from motet.media.decoding import BAD_IMAGE, BadMedium, decode
from motet.protocol.columns import CellError
from motet.protocol.manifest import PATCH_PIXELS
from workers.engine import Prepared

#: Threads that decode beside a GPU, which reads pictures faster than one of them. A worker on a CPU has one core.
THREADS = min(8, os.cpu_count() or 1)
#: glibc's name of mallopt's parameter: bytes from which a block is mapped apart.
_M_MMAP_THRESHOLD = -3
NO_PICTURE = CellError(
    BAD_IMAGE,
    "there is no picture here but another value; the model reads pictures: name the field that holds them",
)

Pixels = NDArray[Any]

# What Pillow says of strangers' files belongs into no log.
warnings.filterwarnings("ignore", module=r"PIL\b")


class Preparation(Protocol):
    """What a model wants of a picture."""

    @property
    def side(self) -> int | None:
        """The shorter side is needed with at least so many pixels; None: with all that it has."""
        ...

    def __call__(self, picture: Image.Image) -> Pixels:
        """(height, width, 3), the same size for every picture. Raises ValueError."""
        ...


@dataclass(frozen=True, slots=True)
class MiddleSquare:
    """The shorter side is brought to ``short`` pixels, and the middle square of ``cut`` is read."""

    short: int
    cut: int

    @property
    def side(self) -> int:
        return self.short

    def __call__(self, picture: Image.Image) -> Pixels:
        scale = self.short / min(picture.size)
        width, height = (max(self.short, round(n * scale)) for n in picture.size)
        left, top = (width - self.cut) // 2, (height - self.cut) // 2
        # Only what is read of it, where it lies in the picture.
        across, down = picture.width / width, picture.height / height
        box = (left * across, top * down, (left + self.cut) * across, (top + self.cut) * down)
        return np.asarray(picture.resize((self.cut, self.cut), Image.Resampling.BICUBIC, box))


def patches(pixels: int) -> int:
    """What so many pixels count for, in tokens."""
    return -(-pixels // PATCH_PIXELS)


def prepared(preparation: Preparation, values: Sequence[object], device: str) -> list[Prepared | CellError]:
    """Each picture, or why it cannot be read. Any number of threads may call it."""
    read = partial(_read, preparation)
    if device == "cpu" or len(values) < 2:
        return [read(row, value) for row, value in enumerate(values)]
    return list(_threads().map(read, range(len(values)), values))


def _read(preparation: Preparation, row: int, value: object) -> Prepared | CellError:
    if not isinstance(value, bytes):
        return NO_PICTURE
    try:
        pixels = preparation(decode(value, preparation.side))
    except BadMedium as error:
        return CellError(error.code, str(error))
    return Prepared(row, patches(pixels.shape[0] * pixels.shape[1]), False, pixels)


@cache
def _threads() -> ThreadPoolExecutor:
    give_back_large_blocks()
    return ThreadPoolExecutor(THREADS, thread_name_prefix="decode")


def give_back_large_blocks() -> None:
    """Have glibc return what is freed of 4 MiB and more to the system at once: from the first large block on it would keep
    up to 32 MiB of such in the heap of each thread, and pictures would take twice the memory. Elsewhere: nothing.

    Not on CPU slots, where one thread decodes and the model's own blocks would be mapped anew for each batch.
    """
    with suppress(AttributeError, OSError):
        CDLL(None).mallopt(_M_MMAP_THRESHOLD, 4 << 20)


def chunks(batch: Sequence[Prepared], most_pixels: int) -> Iterator[Pixels]:
    """The pictures of a batch (n, height, width, 3), so many at a time that they have at most ``most_pixels`` together.

    As many each time: of eight and two, the two would cost more each.
    """
    each = batch[0].inputs.shape[0] * batch[0].inputs.shape[1]
    times = -(-len(batch) // max(1, most_pixels // each))
    for part in range(times):
        lo, hi = (len(batch) * at // times for at in (part, part + 1))
        yield np.stack([row.inputs for row in batch[lo:hi]])

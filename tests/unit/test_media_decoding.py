"""A stranger's bytes as a picture: what is read is right, and what is refused is refused in words for people."""

from __future__ import annotations

import re
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image

from motet.media.decoding import MAX_PIXELS_OF, BadMedium, _Room, decode, pixels_at_open
from motet.media.medium import MAX_MEDIUM_BYTES
from tests.nasty_pictures import BLUE, HEIGHT, RED, WIDTH, halves, mutated, nasty, outcome, png, saved

FILES = nasty()
#: What no words may hold: an address in memory, a path, a class of Python, a line of a stack.
UNSAID = re.compile(r"0x[0-9a-f]{4}|/|Error|Traceback|File |<_?io|object at")


def near(picture: Image.Image, spot: tuple[int, int], colour: tuple[int, int, int]) -> bool:
    found = picture.getpixel(spot)
    assert isinstance(found, tuple)
    return all(abs(a - b) <= 12 for a, b in zip(found, colour, strict=True))


def test_there_are_thirty_five_of_them() -> None:
    assert len(FILES) == 35
    assert sum(one.size is not None for one in FILES.values()) == 21


@pytest.mark.parametrize("name", [name for name, one in FILES.items() if one.size])
def test_a_picture_is_read_as_people_see_it(name: str) -> None:
    one = FILES[name]
    picture = decode(one.data)

    assert (picture.mode, picture.size) == ("RGB", one.size)
    middle = picture.height // 2
    assert one.left is None or near(picture, (picture.width // 4, middle), one.left)
    assert one.right is None or near(picture, (3 * picture.width // 4, middle), one.right)


@pytest.mark.parametrize("name", [name for name, one in FILES.items() if not one.size])
def test_what_is_no_picture_is_refused_in_words_for_people(name: str) -> None:
    one = FILES[name]
    with pytest.raises(BadMedium) as refused:
        decode(one.data)

    assert refused.value.code == one.code
    assert not UNSAID.search(str(refused.value)), str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None or refused.value.__suppress_context__


def test_a_file_that_is_too_long_is_refused_before_it_is_looked_at() -> None:
    with pytest.raises(BadMedium, match="32,000,000") as refused:
        decode(b"\0" * (MAX_MEDIUM_BYTES + 1))
    assert refused.value.code == "too_large"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_picture_comes_smaller_and_never_below_the_side_that_is_wanted(kind: str) -> None:
    large = saved(halves(2400, 1800), kind)

    picture = decode(large, side=224)

    assert 224 <= min(picture.size) < 1800
    assert picture.width * 3 == pytest.approx(picture.height * 4, rel=0.01)
    assert near(picture, (picture.width // 4, 10), RED)
    assert near(picture, (3 * picture.width // 4, picture.height - 1), BLUE)


def test_threads_share_the_room_of_one_picture_and_none_overtakes_a_large_one() -> None:
    room, held, order = _Room(10), threading.Event(), []

    def take(pixels: int) -> None:
        with room.taken(pixels):
            order.append(pixels)

    with room.taken(4):
        large, small = (threading.Thread(target=take, args=(pixels,)) for pixels in (10, 1))
        large.start()
        while not room._turn.locked():
            held.wait(0.001)
        small.start()
        small.join(0.05)
        assert order == [], "a small one would have room, and waits behind the large one"
    large.join()
    small.join()
    assert order == [10, 1]


@pytest.mark.parametrize(
    ("kind", "mode", "how"),
    [
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (70, 30), "red")]}),
        ("AVIF", "RGB", {}),
        ("AVIF", "RGBA", {}),
    ],
)
def test_what_opening_a_file_takes_is_known_from_its_head(kind: str, mode: str, how: dict[str, Any]) -> None:
    """Their decoders take all their memory at once, which threads that wait for room would hold already."""
    data = saved(Image.new(mode, (70, 30), "blue"), kind, **how)
    assert pixels_at_open(data) == (kind, 70 * 30)


def test_a_head_that_says_no_size_counts_as_the_largest() -> None:
    assert pixels_at_open(b"RIFF....WEBPVP8 ") == ("WEBP", MAX_PIXELS_OF["WEBP"])
    assert pixels_at_open(b"\0\0\0\x1cftypavif") == ("AVIF", MAX_PIXELS_OF["AVIF"])
    assert pixels_at_open(saved(Image.new("RGB", (3, 3)), "PNG")) is None


def test_a_large_picture_with_hidden_pixels_is_on_white_in_every_strip() -> None:
    hidden = Image.new("RGBA", (1400, 1301), (0, 0, 0, 0))
    picture = decode(saved(hidden, "PNG"), side=100)
    assert np.asarray(picture).min() == 255


def test_where_a_picture_was_taken_goes_no_further() -> None:
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    picture = decode(saved(halves(), "JPEG", exif=exif))
    assert not picture.info
    assert not picture.getexif()


def test_a_picture_that_says_another_size_than_it_has_is_refused() -> None:
    with pytest.raises(BadMedium) as refused:
        decode(png(4000, 4000, 8, 2, b"\0" * 100))
    assert refused.value.code == "bad_image"


def test_changed_bytes_are_read_or_refused_and_nothing_else() -> None:
    dice = np.random.default_rng(7)
    names = [name for name, one in FILES.items() if one.size]
    for i in range(100):
        data = mutated(FILES[names[i % len(names)]].data, dice)
        said = outcome(data)
        assert said == "RGB" or said.startswith(("bad_image: ", "too_large: "))
        assert not UNSAID.search(said)


def test_the_size_is_that_of_the_upright_picture() -> None:
    assert decode(FILES["turned by exif"].data).size == (WIDTH, HEIGHT)

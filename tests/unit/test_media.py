"""Media at the client: what a row may hold for a picture, what is read of it, and above all what is not."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from motet.errors import InvalidJob
from motet.media.fields import media_fields
from motet.media.folder import MediaFolder, RefusedPath
from motet.media.medium import (
    MAX_MEDIUM_BYTES,
    THUMB_BYTES,
    UNKNOWN_TYPE,
    Medium,
    measured,
    reference,
)
from motet.media.reading import MediaReader
from motet.protocol.envelope import BadMessage, pack, unpack
from motet.protocol.manifest import Manifest
from motet.protocol.values import NoValue, clean, column_type, json_value, plain_text
from motet.rows import Part, cut, survey
from motet.tasks import Choose, Classify
from scheduler.api.rows import read_columns, read_rows
from scheduler.blocks import IncomingPart, Reader, blocks_of, decode_block
from tests.pictures import png

SECRET = b"k" * 32
EYES = Manifest(name="eyes", version="1", engine="image", answers="label", reads="image")
FIELDS = ("photo", "note")


def encoded(image: Image.Image, how: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, how, **options)
    return out.getvalue()


PHOTO = Image.new("RGB", (1200, 800), (200, 30, 30))


class Kept(dict[str, bytes]):
    """What would be sent."""

    def __init__(self) -> None:
        self.thumbs: list[bytes | None] = []

    def keep(self, medium: Medium, data: bytes, thumb: bytes | None) -> None:
        assert Medium.of(data) == medium
        self[medium.sha256] = data
        self.thumbs.append(thumb)


def read(
    rows: Any, root: Path | None = None, *, fields: Collection[str] = ("photo",), **options: Any
) -> tuple[Part, Kept]:
    """The rows as one part, bad ones as marks; and what would be sent."""
    kept = Kept()
    reader = MediaReader(FIELDS, lambda: fields, root=root, keep=kept.keep, **options)
    (part,) = cut(rows, FIELDS, bad_rows="error", media=reader.rows)
    reader.close()
    return part, kept


def one(value: Any, root: Path | None = None, **options: Any) -> Any:
    """What is sent for a value: bytes; or the words of its refusal, behind their class."""
    part, kept = read([{"photo": value, "note": "n"}], root, **options)
    if bad := part.bad_fields.get("photo"):
        return bad[0]
    found = part.columns["photo"][0]
    return kept[found.sha256] if isinstance(found, Medium) else found


# -- the value


@pytest.mark.parametrize("size", [(1, 1), (320, 256), (513, 7)])
@pytest.mark.parametrize("how", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_kind_and_size_are_read_from_the_head(how: str, size: tuple[int, int]) -> None:
    kind, found = measured(encoded(Image.new("RGB", size), how))
    assert kind == f"image/{how.lower()}"
    assert found == (None if how == "TIFF" else size)


def test_lossless_and_extended_webp_and_progressive_jpeg_tell_their_size_too() -> None:
    image = Image.new("RGBA", (300, 41), (1, 2, 3, 100))
    assert measured(encoded(image, "WEBP", lossless=True))[1] == (300, 41)
    assert measured(encoded(image, "WEBP", exif=b"Exif\0\0"))[1] == (300, 41)
    assert measured(encoded(PHOTO, "JPEG", progressive=True, exif=b"Exif\0\0" + b"x" * 5000))[1] == (
        1200,
        800,
    )


@given(
    st.binary(max_size=64),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF89a", b"RIFF____WEBPVP8X"]),
)
def test_no_bytes_break_the_look_at_their_head(tail: bytes, head: bytes) -> None:
    medium = Medium.of(head + tail)
    assert unpack(pack([medium])) == [medium]


def test_a_medium_is_a_value_with_a_type_of_its_own_and_never_its_bytes() -> None:
    medium = Medium.of(png(320, 256))
    assert clean(medium) == medium
    assert column_type([medium, None]) == "medium"
    assert plain_text(medium) == f"medium:{medium.sha256[:16]} (image/png, 320x256)"
    assert json_value(medium) == plain_text(medium), "also where rows are told to people"
    assert reference(json.loads(json.dumps(medium.to_json()))) == medium
    assert reference({"medium": "x"}) is reference("medium") is None
    with pytest.raises(NoValue, match="inside a list"):
        clean([medium])
    for forged in (b"x", b"0" * 64 + b" text/html 1 1 1", medium.to_wire().encode() + b" 1", b"\xff"):
        with pytest.raises(BadMessage):
            unpack(pack(msgpack.ExtType(5, forged)))


def test_media_are_the_whole_inputs_of_models_that_read_them() -> None:
    tasks = {
        "object": Classify("eyes", input="{photo}"),
        "what": Choose("eyes", labels=("a", "b"), about="{picture}"),
        "topic": Classify("topics", input="{note}"),
        "both": Classify("topics", input="{photo} {note}"),
    }
    models = {"object": EYES, "what": EYES, "topic": Manifest(**{**EYES.to_json(), "reads": "text"})}
    assert media_fields(tasks, models) == {"photo", "picture"}
    assert EYES.digest != Manifest(**{**EYES.to_json(), "reads": "text"}).digest


# -- what rows hold


def test_everything_that_holds_a_picture_is_read(tmp_path: Path) -> None:
    small = png(40, 30)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(small)
    url = "data:image/png;base64," + base64.b64encode(small).decode()
    for value in (small, bytearray(small), memoryview(small), {"bytes": small, "path": "/x"}, url):
        assert one(value) == small
    for path in ("in/a.png", str(tmp_path / "in/a.png"), "./in//a.png", "in/../in/a.png", Path("in/a.png")):
        assert one(path, tmp_path) == small
    assert one({"bytes": None, "path": "in/a.png"}, tmp_path) == small
    pixels = numpy.arange(40 * 30 * 3, dtype=numpy.uint8).reshape(30, 40, 3)
    for value in (pixels, Image.fromarray(pixels), pixels[::-1][::-1]):
        again = numpy.asarray(Image.open(io.BytesIO(one(value))))
        assert (again == pixels).all(), "nothing of a small picture is lost"
    for mask in (pixels[:, :, 0] > 99, pixels[:, :, :1], pixels[:, :, 0]):
        assert Image.open(io.BytesIO(one(mask))).size == (40, 30)


def test_a_picture_is_known_by_its_type_and_a_path_by_the_model_that_reads_it() -> None:
    asked = []

    def fields() -> set[str]:
        asked.append(1)
        return {"photo"}

    kept = Kept()
    reader = MediaReader(FIELDS, fields, keep=kept.keep)
    rows = [{"photo": "text", "note": [1, 2]}, {"photo": png(), "note": PHOTO}, "a text of its own"]
    found = [row for row, _ in reader.rows((row, None) for row in rows)]
    assert found[0] is rows[0]
    assert found[2] is rows[2]
    assert all(isinstance(found[1][name], Medium) for name in FIELDS)
    assert not asked, "the server is not asked what its models read"
    (part,) = cut(
        [{"photo": "data:image/png;base64," + base64.b64encode(png()).decode(), "note": "data:image/x"}],
        FIELDS,
        media=reader.rows,
    )
    assert isinstance(part.columns["photo"][0], Medium)
    assert part.columns["note"] == ["data:image/x"]
    assert asked == [1]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("https://example.org/a.png", "an address, which nobody opens"),
        ("//example.org/a.png", "an address, which nobody opens"),
        ("file:///etc/hostname", "an address, which nobody opens"),
        ("s3://bucket/a.png", "an address, which nobody opens"),
        ("data:image/png,abc", "a data URL of another form"),
        ("data:image/png;base64,@@@", "a data URL that holds no base64"),
        (None, "null"),
        (3, "a value of type int"),
        (b"no picture at all", "no picture of a kind that is read"),
        (b"", "empty"),
        (numpy.zeros((3, 3), numpy.float32), "an array of float32 of 3x3 values"),
        (numpy.zeros((3, 40, 40), numpy.uint8), "an array of uint8 of 3x40x40 values"),
        ([1, 2], "a value of type list"),
        (Image.new("F", (3, 3)), "32 bits each"),
    ],
)
def test_what_is_no_picture_is_refused_in_words_that_say_nothing_of_it(
    tmp_path: Path, value: Any, words: str
) -> None:
    error, message = one(value, tmp_path)
    assert error in ("bad_row", "bad_image")
    assert words in message
    assert "example" not in message
    assert "hostname" not in message


def test_a_path_is_never_opened_without_a_root(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    path = str(tmp_path / "a.png")
    # A data URL beside it says that the field holds pictures.
    part, _kept = read([{"photo": png(), "note": ""}, {"photo": path, "note": ""}], None, fields=("photo",))
    assert part.columns["photo"][1] == path, "as a text: the server refuses it"
    reader = MediaReader(FIELDS, lambda: ("photo",))
    assert reader.fields == ("photo",)
    (again,) = cut([{"photo": path, "note": ""}], FIELDS, bad_rows="error", media=reader.rows)
    assert "a path, and no media_root" in again.bad_fields["photo"][0][1]


def test_a_row_with_a_picture_keeps_the_fields_that_no_task_reads() -> None:
    """Folds of an open job read them."""
    reader = MediaReader(FIELDS, lambda: ("photo",))
    row = reader.row({"photo": png(), "note": "n", "customer_id": 7})
    assert row["customer_id"] == 7
    assert isinstance(row["photo"], Medium)


# -- paths


@pytest.fixture
def claims(tmp_path: Path) -> Path:
    """A folder with a picture, and beside it what no path may reach."""
    root = tmp_path / "claims"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "a.png").write_bytes(png())
    (root / "empty.png").touch()
    (tmp_path / "secret.png").write_bytes(png(seed=9))
    (tmp_path / "claims-too").mkdir()
    (tmp_path / "claims-too" / "b.png").write_bytes(png(seed=8))
    links = {
        "inside": "a.png",
        "deep/er/up": "../../a.png",
        "absolute": str(root / "a.png"),
        "through": "deep/er",
        "out": "../secret.png",
        "far": "/etc/hostname",
        "outwards": "..",
        "round": "round",
        "neighbour": str(tmp_path / "claims-too" / "b.png"),
        "gone": "nothing.png",
        "deep/er/sneaky": "../../../secret.png",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe.png")
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(root)  # a socket's path may not be long
        made.bind("socket.png")
        os.chdir(here)
    return root


@pytest.mark.parametrize(
    "path",
    [
        "a.png",
        "inside",
        "deep/er/up",
        "absolute",
        "through/up",
        "through/../../a.png",
        "deep/../a.png",
        "outwards/claims/a.png",
    ],
)
def test_paths_and_links_that_stay_inside_are_read(claims: Path, path: str) -> None:
    if path.startswith("outwards"):
        assert "leaves media_root" in one(path, claims)[1], "though it would come back"
        return
    assert one(path, claims) == png()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("../../etc/hostname", "a path that leaves media_root"),
        ("../secret.png", "a path that leaves media_root"),
        ("deep/../../secret.png", "a path that leaves media_root"),
        ("/etc/hostname", "a path that leaves media_root"),
        ("/proc/self/environ", "a path that leaves media_root"),
        ("/dev/zero", "a path that leaves media_root"),
        ("out", "a path that leaves media_root"),
        ("far", "a link that leaves media_root"),
        ("outwards/secret.png", "a path that leaves media_root"),
        ("deep/er/sneaky", "a path that leaves media_root"),
        ("through/sneaky", "a path that leaves media_root"),
        ("neighbour", "a link that leaves media_root"),
        ("round", "links without end"),
        ("gone", "there is no file"),
        ("nothing.png", "there is no file"),
        ("a.png/b.png", "there is no file"),
        ("pipe.png", "a named pipe"),
        ("socket.png", "a socket"),
        ("deep", "a folder"),
        (".", "a folder"),
        ("", "an empty path"),
        ("a.png\0.jpg", "NUL"),
        ("a\ud800.png", "a lone surrogate"),
        ("x/" * 3000, "more than 4,096 characters"),
        ("deep/../" * 200 + "a.png", "without end"),
        ("empty.png", "an empty file"),
        ("n" * 300, "cannot be opened"),
    ],
)
def test_every_way_out_is_refused_by_name(claims: Path, path: str, words: str) -> None:
    error, message = one(path, claims)
    assert error == "bad_row"
    assert words in message
    assert "hostname" not in message
    assert "secret" not in message


def test_devices_and_what_the_kernel_makes_up_are_refused_even_below_their_own_root() -> None:
    for root, path, words in (("/dev", "zero", "a device"), ("/proc", "self/environ", "an empty file")):
        assert words in one(path, Path(root))[1]


def test_a_file_that_is_too_long_is_not_read(claims: Path) -> None:
    with (claims / "long.png").open("wb") as file:
        file.truncate(MAX_MEDIUM_BYTES + 1)
    assert "a file of 32,000,001 bytes" in one("long.png", claims)[1]


def test_a_path_that_is_swapped_while_it_is_opened_leads_nowhere(claims: Path) -> None:
    """Whoever may write into the folder moves a link to and fro while a thousand files are read."""
    stop = threading.Event()
    other = claims / "swapped"

    def swap() -> None:
        n = 0
        while not stop.is_set():
            new = claims / f"new{(n := n + 1)}"
            if n % 3:
                new.symlink_to("../secret.png" if n % 3 == 1 else "../claims-too")
            else:
                new.write_bytes(png())
            new.replace(other)

    (other).write_bytes(png())
    thread = threading.Thread(target=swap)
    thread.start()
    folder = MediaFolder(claims)
    try:
        for _ in range(1000):
            try:
                assert folder.read("swapped") == png()
            except RefusedPath:
                pass
    finally:
        stop.set()
        thread.join()
        folder.close()


@pytest.mark.parametrize("root", ["nowhere", "a.png", "with\0nul"])
def test_a_root_that_is_no_folder_is_refused_by_name(claims: Path, root: str) -> None:
    with pytest.raises(InvalidJob, match="media_root"):
        MediaFolder(f"{claims}/{root}")


# -- sizes


def test_a_large_picture_is_made_smaller_once_and_a_small_one_is_sent_as_it_is() -> None:
    large, small = encoded(PHOTO, "JPEG"), encoded(PHOTO.resize((512, 341)), "JPEG")
    assert measured(one(large)) == ("image/jpeg", (512, 341))
    assert one(small) == small
    assert measured(one(large, size=100))[1] == (100, 67)
    assert one(large, size=None) == large
    assert measured(one(PHOTO))[1] == measured(one(numpy.asarray(PHOTO)))[1] == (512, 341)
    tiff = encoded(Image.new("RGB", (9, 9)), "TIFF")
    assert measured(one(tiff)) == ("image/png", (9, 9)), "a format that few read"
    turned = encoded(
        PHOTO, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    )
    assert measured(one(turned))[1] == (341, 512), "upright"


def test_a_picture_is_sent_in_small_only_where_that_is_wanted_and_can_be_read() -> None:
    rows = [{"photo": PHOTO}, {"photo": b"\xff\xd8\xff no picture"}]
    assert read(rows)[1].thumbs == [None]
    thumbs = read(rows, thumbs=True, size=None)[1].thumbs
    assert len(thumbs) == 2
    [small] = filter(None, thumbs)
    assert measured(small) == ("image/jpeg", (96, 64))
    assert len(small) <= THUMB_BYTES


@pytest.mark.parametrize("size", [0, 15, 20_000, True, "512", 2.5])
def test_a_size_that_is_none_is_refused_by_name(size: Any) -> None:
    with pytest.raises(InvalidJob, match="media_size"):
        MediaReader(FIELDS, tuple, size=size)


def test_a_row_holds_no_more_than_its_share_of_bytes() -> None:
    big = png() + b"\0" * 20_000_000
    part, _ = read([{"photo": big, "note": big}], size=None)
    assert list(part.bad_fields) == ["note"]
    assert "40,0" in part.bad_fields["note"][0][1]
    assert one(png() + b"\0" * MAX_MEDIUM_BYTES)[0] == "too_large"


def test_rows_come_in_order_however_long_their_pictures_take() -> None:
    rows = [
        {"photo": PHOTO if n % 7 == 0 else png(seed=n) if n % 3 else "text", "note": str(n)}
        for n in range(32)
    ]
    part, _kept = read(iter(rows), fields=("photo",))
    assert part.columns["note"] == [str(n) for n in range(32)]
    assert isinstance(part.columns["photo"][0], Medium)
    assert part.columns["photo"][0] == part.columns["photo"][7], "equal pictures are one"


def test_rows_with_pictures_go_in_small_parts_first_and_in_parts_of_few_large_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def parts(data: bytes, rows: int) -> list[int]:
        reader = MediaReader(FIELDS, tuple, keep=lambda *_: None)
        return [len(part) for part in cut([{"photo": data, "note": ""}] * rows, FIELDS, media=reader.rows)]

    small = png()
    assert parts(small, 1000) == [32, 64, 128, 256, 256, 256, 8]
    monkeypatch.setattr("motet.rows.PART_PICTURE_BYTES", 10 * len(small))
    assert parts(small, 25) == [10, 10, 5]


def test_bad_pictures_are_listed_with_their_rows_and_what_breaks_the_source_behind_them() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"photo": png(), "note": "x"}
        yield {"photo": b"\xff\xd8\xff broken", "note": PHOTO}
        raise InvalidJob.of("source", "broken", "whole", "mend it")

    reader = MediaReader(FIELDS, tuple, keep=lambda *_: None)
    with pytest.raises(InvalidJob) as refused:
        list(cut(rows(), FIELDS, media=reader.rows))
    # It is small by what its head tells: a worker finds out.
    assert [problem.field for problem in refused.value.problems][-1] == "source"


def test_a_frame_of_pictures_is_read_as_rows_are() -> None:
    frame = pandas.DataFrame({"photo": [png(), png(seed=1)], "note": ["a", "b"]})
    part, kept = read(frame)
    assert len(kept) == 2
    assert part.columns["note"] == ["a", "b"]


def test_a_plan_looks_at_pictures_and_reads_no_pixel() -> None:
    reader = MediaReader(FIELDS, tuple)
    found = survey([{"photo": encoded(PHOTO, "JPEG"), "note": "x"}], FIELDS, media=reader.rows)
    (row,) = found.sample
    assert (row["photo"]["width"], row["photo"]["height"]) == (512, 341)
    assert reader.read.shrunk == 0


# -- the server's reading


def test_a_field_that_holds_media_takes_nothing_else() -> None:
    medium = Medium.of(png())
    values = [medium, {"medium": medium.sha256}, "a path", None, 3, {"medium": "x"}, [medium]]
    raw = pack({"columns": {"photo": values, "note": [medium] * 7}})
    incoming = read_columns(_unpacked(raw), FIELDS, 1 << 18, (), ("photo",))
    assert sorted(incoming.bad_fields["photo"]) == [2, 3, 4, 5, 6]
    assert incoming.columns["photo"][0] == medium
    assert incoming.columns["photo"][1].sha256 == medium.sha256
    assert "media_root" in str(incoming.bad_fields["photo"][2].at(0))
    assert incoming.columns["note"][0] == medium, "any field may hold one"
    inline = read_rows([{"photo": {"medium": medium.sha256}, "note": ""}], FIELDS, 1 << 18, (), ("photo",))
    assert isinstance(inline.columns["photo"][0], Medium)


def _unpacked(raw: bytes) -> bytes:
    from motet.protocol.envelope import zstd

    return bytes(zstd.decompress(raw))


def test_a_block_names_its_media_by_keyed_digests_and_is_known_by_their_content() -> None:
    media = [Medium.of(png(seed=n)) for n in (1, 2, 1)]
    reader = Reader(reads=("photo",), digest=b"d" * 32, reusable=True)

    def block(photos: list[Medium], secret: bytes = SECRET) -> Any:
        part = IncomingPart(columns={"photo": photos, "note": ["x"] * 3})
        (made,) = blocks_of(part, [reader], secret=secret, block_rows=100, block_bytes=1 << 20)
        return made

    first = block(media)
    assert len(first.media) == 2
    assert media[0].sha256 not in first.media[0].hex()
    assert first.media != block(media, b"other" * 7).media
    assert first.keys == block(list(media)).keys
    assert first.keys != block([media[1], *media[1:]]).keys
    stored = decode_block(first.payload)
    assert stored.types == {"photo": "medium"}
    assert stored.values["photo"] == media
    assert UNKNOWN_TYPE not in stored.texts()["photo"][0]

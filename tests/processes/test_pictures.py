"""Pictures on a real cluster: a trunk is registered, heads are trained on pictures, and one pass answers all that read one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from motet import Classify, Client, Embed, InvalidJob, Labels
from motet.cli.show import plan_line, plan_table
from motet.local.cluster import Cluster
from tests.nasty_pictures import nasty, saved
from tests.registering import register
from tests.tiny_pictures import DIM, a_lite

COLOURS = {"red": (210, 30, 30), "green": (30, 190, 40), "blue": (30, 50, 220)}
TRUNK = "tiny-lite"


def picture(number: int, colour: str) -> bytes:
    dice = np.random.default_rng(number)
    pixels = dice.normal(COLOURS[colour], 40, (40, 40, 3)).clip(0, 255).astype(np.uint8)
    return saved(Image.fromarray(pixels), "PNG")


def rows(n: int, first: int = 0) -> list[dict[str, Any]]:
    colours = [list(COLOURS)[i % 3] for i in range(n)]
    return [
        {"photo": picture(first + i, colour), "colour": colour, "note": f"The match of team {i} ended."}
        for i, colour in enumerate(colours)
    ]


@pytest.fixture(scope="module")
def admin(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder: Path = a_lite(tmp_path_factory.mktemp("lite"))
    done = register(cluster.url, cluster.tokens["admin"], str(folder), "--name", TRUNK)
    assert done.returncode == 0, done.stderr
    with Client(cluster.url, cluster.tokens["admin"]) as connected:
        yield connected


def test_a_head_learns_from_pictures_and_answers_beside_the_vector_in_one_pass(admin: Client) -> None:
    assert {m.name for m in admin.models()} >= {TRUNK, f"{TRUNK}-trainer"}
    run = admin.train(
        name="paint", trunk=TRUNK, tasks={"colour": Labels("colour")}, train=rows(120), test=rows(30, 1000),
        image="photo", features="stages", progress=False, head_epochs=30,
    )  # fmt: skip
    told = run.answer()["scores"]["colour"]["accuracy"]
    assert told > 0.5
    run.register()

    tasks = {
        "colour": Classify("paint.colour", input="{photo}", numerics="exact"),
        "look": Embed(TRUNK, input="{photo}", numerics="exact"),
        "topic": Classify("news-topics", input="{note}"),
    }
    job = admin.submit(rows(30, 1000), tasks, progress=False).wait()
    assert sorted(sorted(one.tasks) for one in job.passes) == [["colour", "look"], ["topic"]]
    found = list(job.results())
    right = np.mean([str(row["colour"]) == one["colour"] for row, one in zip(found, rows(30), strict=True)])
    assert right == pytest.approx(told, abs=0.07)
    assert {len(row["look"].value) for row in found} == {DIM}
    assert all(row["topic"].ok for row in found)


def test_a_nasty_picture_is_an_error_of_its_cells_and_touches_no_other(admin: Client) -> None:
    files = nasty()
    some = rows(4)
    some[1]["photo"] = files["cut off jpeg"].data
    some[2]["photo"] = files["144 megapixels"].data
    tasks = {"look": Embed(TRUNK, input="{photo}"), "topic": Classify("news-topics", input="{note}")}
    job = admin.submit(some, tasks, bad_rows="error", media_size=None, progress=False).wait()

    found = list(job.results())
    assert [row["look"].ok for row in found] == [True, False, False, True]
    assert [row["look"].error.error for row in found[1:3] if row["look"].error] == ["bad_image", "too_large"]
    assert all(row["topic"].ok for row in found)


def test_what_does_not_go_with_pictures_is_refused_with_words(admin: Client) -> None:
    with pytest.raises(InvalidJob, match="one field of the row that holds a picture"):
        admin.submit(rows(2), {"look": Embed(TRUNK, input="a photo: {photo}")}, progress=False)
    with pytest.raises(InvalidJob, match="tune"):
        admin.train(
            name="x", trunk=TRUNK, tasks={"c": Labels("colour")}, train=rows(30), image="photo", tune="all"
        )
    with pytest.raises(InvalidJob, match=r"numbers.*one picture"):
        admin.train(
            name="x",
            trunk=TRUNK,
            tasks={"c": Labels("colour")},
            train=rows(30),
            image="photo",
            numbers=["age"],
        )


def test_a_plan_tells_pixels_beside_tokens(admin: Client) -> None:
    plan = admin.plan(
        rows(6), {"look": Embed(TRUNK, input="{photo}"), "topic": Classify("news-topics", input="{note}")}
    )
    assert plan.pixels == 6 * 32 * 32
    assert plan_line(plan).endswith("(of them ~0.0 megapixels of pictures)")
    assert "megapixels" in [column.header for column in plan_table(plan).columns]

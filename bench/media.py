"""What pictures cost: tasks of one trunk fused, a whole cluster against the best hand loop, and what is sent of each.

image_fusion_gain     seconds of four jobs of one task each / seconds of one job of the four tasks, all on one trunk
                      (EfficientNet-Lite0) and one picture a row, both through a whole cluster (two CPU workers, results
                      stored), in turn
images_vs_loop        seconds of a hand loop / seconds of a cluster over the same pictures: classes of ImageNet of 2,000
                      JPEG files of 640 x 427, decoding and storage included. The loop is the best that we know: a process
                      a core, JPEGs decoded no larger than needed, BatchNorm folded, channels_last, bf16 where the CPU is
                      fast at it, micro-batches of 8; it writes a line of JSON a picture. The cluster is sent the files as
                      they are, and its answers are read
bytes_sent_per_image  bytes that the client sends of a picture of 1,600 x 1,067 by default (512 pixels of the longer side);
                      bytes_of_file_per_image: those of its file
decoding_peak_mb      memory that a process needs more while eight threads decode the largest pictures that are read, of each
                      format, for a model that reads 224 pixels: the pixels that they bring included

Pictures are drawn, each once: no two files are alike, so nothing is sent or computed once for several rows.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from harness import Size, cluster, finish, in_turn, options, peak_rss_mb, ratio, scratch, table, timed
from PIL import Image

from motet import Classify, Client, Embed
from motet.media.decoding import MAX_PIXELS, MAX_PIXELS_OF, decode
from motet.tasks import Task

PHOTO = "{photo}"
TRUNK, HEAD = "efficientnet-lite0", "imagenet"
#: Four tasks that one pass answers.
FOUR: Mapping[str, Task] = {
    "object": Classify(HEAD, input=PHOTO),
    "sure": Classify(HEAD, input=PHOTO, min_score=0.5),
    "look": Embed(TRUNK, input=PHOTO, dtype="fp16"),
    "strokes": Embed(TRUNK, input=PHOTO, dtype="fp16", features="stages"),
}
#: Pictures that are drawn; the others differ from one of them by a comment in the file.
DRAWN = 40
#: Digits of that comment.
NOTE = 18
#: Threads that decode: as many as a worker with a GPU has. And pixels of the pictures beside the largest ones.
THREADS, BESIDE = 8, 4_000_000
#: What is decoded: its format, the mode of its pixels, and how it is written.
KINDS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "PNG, transparent": ("PNG", "RGBA", {"compress_level": 1}),
    "JPEG": ("JPEG", "RGB", {}),
    "JPEG, progressive": ("JPEG", "RGB", {"progressive": True}),
    "JPEG, CMYK": ("JPEG", "CMYK", {}),
    "PNG, 16 bits": ("PNG", "I;16", {"compress_level": 1}),
    "GIF": ("GIF", "P", {}),
    "TIFF": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "WebP": ("WEBP", "RGBA", {"method": 0}),
    "AVIF": ("AVIF", "RGBA", {"speed": 10}),
}
#: Pictures that go through the loop's model at once.
BATCH = 8


def main() -> None:
    arguments = options(__doc__).parse_args()
    size = arguments.size
    count, rounds = size.of(full=(2000, 3), quick=(300, 1), smoke=(12, 1))
    fused_count = size.of(full=600, quick=150, smoke=8)
    workers = size.of(full=2, quick=2, smoke=1)
    with scratch() as folder:
        small = drawn(folder / "small", count, 640, 427)
        large = drawn(folder / "large", size.of(full=60, quick=20, smoke=4), 1600, 1067)
        file_bytes = statistics.mean(file.stat().st_size for file in large)
        with (
            cluster(workers, models=("--efficientnet=lite0",)) as running,
            Client(running.url, running.tokens["user"]) as client,
        ):
            # Until the models are loaded and their speed is known.
            for _ in range(size.of(full=2, quick=1, smoke=1)):
                asked(client, small[: min(count, 200)], FOUR)
            fusion = in_turn(
                {
                    "fused": lambda: timed(lambda: asked(client, small[:fused_count], FOUR)),
                    "unfused": lambda: timed(
                        lambda: [
                            asked(client, small[:fused_count], {name: task}) for name, task in FOUR.items()
                        ]
                    ),
                },
                rounds,
            )
            both = in_turn(
                {
                    "motet": lambda: anew(client, small),
                    "loop": lambda: loop(small, folder, workers),
                },
                rounds,
            )
            sent = client.submit(
                rows(large),
                {"object": FOUR["object"]},
                media_root=large[0].parent,
                reuse=False,
                progress=False,
            )
            sent.wait()
            assert sent.media is not None
        peaks = decoding_peaks_mb(folder, size)
    table(
        f"{count:,} pictures, classes of ImageNet",
        ("", "median s", "pictures/s"),
        [
            (side, f"{statistics.median(s):.1f}", f"{count / statistics.median(s):.0f}")
            for side, s in both.items()
        ],
    )
    keys = {
        "image_fusion_gain": round(ratio(fusion, "unfused", "fused"), 3),
        "images_vs_loop": round(ratio(both, "loop", "motet"), 3),
        "bytes_sent_per_image": round(sent.media.bytes_sent_per_image),
        "bytes_of_file_per_image": round(file_bytes),
        "decoding_peak_mb": max(peaks.values()),
    }
    table(
        f"memory of a process while {THREADS} threads decode the largest pictures",
        ("", "MB more"),
        [(kind, f"{mb}") for kind, mb in peaks.items()],
    )
    details = {
        "pictures": count,
        "fusion_seconds": fusion,
        "seconds": both,
        "decoding_mb": peaks,
    }
    finish("media", keys, arguments, details=details)


def rows(files: Sequence[Path]) -> list[dict[str, str]]:
    return [{"photo": file.name} for file in files]


def asked(client: Client, files: Sequence[Path], tasks: Mapping[str, Task]) -> None:
    """One job, its pictures sent as they are, and its answers read."""
    job = client.submit(
        rows(files), tasks, media_root=files[0].parent, media_size=None, reuse=False, progress=False
    )
    job.wait()
    answered = sum(1 for row in job.results() if all(row[name].ok for name in tasks))
    assert answered == len(files), f"{answered} of {len(files)} were answered"


def anew(client: Client, files: Sequence[Path]) -> float:
    """Seconds of a job on pictures that the server has not seen: each file gets another comment first."""
    for file in files:
        data = file.read_bytes()
        file.write_bytes(commented(data[:2] + data[6 + NOTE :], time.time_ns() % 10**NOTE))
    return timed(lambda: asked(client, files, {"object": FOUR["object"]}))


def commented(data: bytes, number: int) -> bytes:
    """A JPEG with a comment segment behind its start."""
    note = f"{number:0{NOTE}}".encode()
    return data[:2] + b"\xff\xfe" + (len(note) + 2).to_bytes(2, "big") + note + data[2:]


def drawn(folder: Path, count: int, width: int, height: int) -> list[Path]:
    """So many JPEG files."""
    folder.mkdir()
    dice = np.random.default_rng(0)
    pictures = []
    for _ in range(min(DRAWN, count)):
        coarse = dice.integers(0, 256, (int(dice.integers(3, 60)), int(dice.integers(3, 60)), 3), np.uint8)
        smooth = np.asarray(
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16
        )
        # As much noise as a photograph's file has bytes for.
        noisy = smooth + dice.normal(0, 6, (height, width, 1)).astype(np.int16)
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        pictures.append(file.getvalue())
    files = []
    for number in range(count):
        files.append(folder / f"{number}.jpg")
        files[-1].write_bytes(commented(pictures[number % len(pictures)], number))
    return files


def decoding_peaks_mb(folder: Path, size: Size) -> dict[str, int]:
    """Format -> MB that a process takes more while it decodes the largest pictures of it, each in a process of its own."""
    # The largest that are read, and many that several threads may decode at once.
    largest, beside = size.of(full=(MAX_PIXELS, BESIDE), quick=(MAX_PIXELS, BESIDE), smoke=(90_000, 10_000))
    peaks = {}
    for kind, (how, mode, settings) in list(KINDS.items())[: size.of(full=None, quick=None, smoke=2)]:
        files = []
        for pixels in (min(largest, MAX_PIXELS_OF.get(how, largest)), beside):
            files.append(folder / f"{pixels}.{how}")
            files[-1].write_bytes(encoded(how, mode, pixels, settings))
        code = [sys.executable, __file__, "--decode", *map(str, files)]
        peaks[kind] = int(subprocess.run(code, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return peaks


def decode_all(largest: Path, beside: Path) -> None:
    """One process that decodes as a worker with a GPU does, and prints the MB that it takes more."""
    from workers.engines.image.preparing import give_back_large_blocks

    files = [largest.read_bytes()] * 2 + [beside.read_bytes()] * 2 * THREADS
    decode(encoded("JPEG", "RGB", 10_000, {}), 256)
    Path("/proc/self/clear_refs").write_text("5")
    give_back_large_blocks()
    before = peak_rss_mb(os.getpid())
    with ThreadPoolExecutor(THREADS) as threads:
        pictures = list(threads.map(lambda file: decode(file, 256), files))
    assert len(pictures) == len(files)
    print(round(peak_rss_mb(os.getpid()) - before))


def encoded(how: str, mode: str, pixels: int, settings: Mapping[str, Any]) -> bytes:
    """A square picture of just as many pixels."""
    side = int(pixels**0.5)
    file = io.BytesIO()
    tile = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
    picture = Image.new(mode, (side, side))
    if mode != "I;16":
        picture.paste(tile.convert(mode), (0, 0))
    picture.save(file, how, **settings)
    return file.getvalue()


def loop(files: Sequence[Path], folder: Path, processes: int) -> float:
    """Seconds of the hand loop over these files, from the first file read to the last line written."""
    shares = [files[lo::processes] for lo in range(processes)]
    children = []
    for number, share in enumerate(shares):
        listed = folder / f"share-{number}.txt"
        listed.write_text("\n".join(map(str, share)), "utf-8")
        out = folder / f"answers-{number}.jsonl"
        code = [sys.executable, __file__, "--loop-over", str(listed), str(out)]
        children.append(subprocess.Popen(code, stdout=subprocess.PIPE, text=True))
    # They say how long they took, without Python's start and the model's loading.
    took = [float(child.communicate()[0].splitlines()[-1]) for child in children]
    assert all(child.returncode == 0 for child in children)
    return max(took)


def loop_over(listed: Path, out: Path) -> None:
    """One process of the hand loop."""
    import torch
    from safetensors.torch import load_file

    from workers.engines.image.lite import Lite
    from workers.registrar.efficientnet import LITES, folders
    from workers.run.device import fast_formats

    torch.set_num_threads(1)
    dtype = torch.bfloat16 if "bf16" in fast_formats("cpu") else torch.float32
    trunk, head = folders(LITES["lite0"])
    model = Lite.of(load_file(trunk / "model.safetensors")).to(dtype, memory_format=torch.channels_last)
    layer = load_file(head / "head.safetensors")
    labels = json.loads((head / "head.json").read_text("utf-8"))["labels"]
    files = [Path(line) for line in listed.read_text("utf-8").splitlines()]

    def picture(file: Path) -> np.ndarray[Any, Any]:
        image = Image.open(file)
        image.draft("RGB", (256, 256))
        image = image.convert("RGB")
        scale = 256 / min(image.size)
        width, height = (round(n * scale) for n in image.size)
        left, top = (width - 224) // 2, (height - 224) // 2
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + 224) * across, (top + 224) * down)
        return np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC, box))

    def answer(batch: Sequence[Path]) -> list[tuple[str, float]]:
        pixels = torch.from_numpy(np.stack([picture(file) for file in batch])).permute(0, 3, 1, 2)
        with torch.inference_mode():
            last = model((pixels.float() / 128 - 127 / 128).to(dtype)).last
            best = (last @ layer["weight"].T + layer["bias"]).softmax(1).max(1)
        return [
            (labels[code], score)
            for score, code in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    answer(files[:BATCH])
    began = time.perf_counter()
    with out.open("w", encoding="utf-8") as lines:
        for lo in range(0, len(files), BATCH):
            batch = files[lo : lo + BATCH]
            for file, (label, score) in zip(batch, answer(batch), strict=True):
                lines.write(json.dumps({"photo": file.name, "label": label, "score": score}) + "\n")
    print(time.perf_counter() - began)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--loop-over"]:
        loop_over(Path(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1:2] == ["--decode"]:
        decode_all(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()

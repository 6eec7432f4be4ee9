"""Small pictures, labelled sets and kills for the tests of ingest."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from haechi.components.shared.dataset import Frame, read_rows
from haechi.components.shared.images import encode_jpeg
from haechi.components.shared.storage import Store

CLASSES = ["smoke", "fire"]


def picture(seed: int, brightness: int = 0) -> np.ndarray:
    """A scene of sharp blocks; another seed is another scene, another brightness nearly the same."""
    blocks = np.random.default_rng(seed).integers(60, 170, (9, 12, 3))
    return np.kron(blocks + brightness, np.ones((16, 16, 1))).astype(np.uint8)


def jpeg(seed: int, brightness: int = 0) -> bytes:
    return encode_jpeg(picture(seed, brightness), 95)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def frames_of(out: Path) -> list[Frame]:
    return read_rows(out / "frames.parquet", Frame)


def yolo_set(folder: Path, count: int = 4, names: str = "[smoke, fire]") -> Path:
    """A YOLO set of `count` pictures (192x144), each with one box of class number % 2."""
    for number in range(count):
        split = "val" if number % 4 == 3 else "train"
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        (folder / f"images/{split}/img_{number:03}.jpg").write_bytes(jpeg(100 + number))
        (folder / f"labels/{split}/img_{number:03}.txt").write_text(f"{number % 2} 0.5 0.5 0.25 0.5\n")
    (folder / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames: {names}\n")
    return folder


KILLED = """
import sys
from pathlib import Path
from haechi.components.ingest.step import ingest
from haechi.components.shared.settings import Settings
settings = Settings.from_env()
source = {"uri": f"s3://{settings.bucket}/raw", "pattern": "{camera}/{name}.{_}", "name": "raw"}
imports = [{"uri": sys.argv[3], "name": "set"}] if len(sys.argv) > 3 else []
ingest([] if imports else [source], imports, ["smoke", "fire"], {}, sys.argv[1], Path(sys.argv[2]), settings, part=7)
"""


def kill_when(store: Store, stored: int, *arguments: str) -> None:
    """Start an ingest and SIGKILL it as soon as `stored` frames are in the bucket."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments],
        env={**os.environ, **store.settings.to_env()},
        stderr=subprocess.PIPE,
    )
    try:
        while process.poll() is None and len(list(store.list("frames/"))) < stored:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()

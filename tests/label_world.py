"""A small world for the label tests: painted frames in the store, tiny teachers, and one call that runs the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tiny_models import paint, shade, tiny_model_folder

from haechi.components.label.step import LabelResult, label
from haechi.components.shared.dataset import Frame, frame_key, write_rows
from haechi.components.shared.files import sha256_bytes
from haechi.components.shared.images import decode, signature
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store

__all__ = ["BANDS", "CLASSES", "NOW", "World", "painted", "put_frame", "snapshot"]

CLASSES = ["person", "dog"]
BANDS = {"default": [0.2, 0.6]}
NOW = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)


def painted(*cells: tuple[int, float], ground: int = 0) -> bytes:
    """A picture with one cell for each (class index, score), along the diagonal; `ground` (0–40) makes it unique."""
    places = {(place, place): shade(index, score) for place, (index, score) in enumerate(cells)}
    return paint(places, ground=(ground, ground, ground))


def put_frame(store: Store, data: bytes, name: str = "frame", ext: str = "png") -> Frame:
    """Store a picture as an accepted frame; its row."""
    sha256, pixels = sha256_bytes(data), decode(data)
    look = signature(pixels)
    store.put_if_absent(frame_key(sha256, ext), data)
    return Frame(
        sha256=sha256,
        ext=ext,
        width=pixels.shape[1],
        height=pixels.shape[0],
        key=f"s3://raw/gate/{name}.{ext}",
        source="gate",
        camera="gate",
        captured_at=datetime(2026, 2, 3, 4, 5, 6, 789_000, tzinfo=UTC),
        phash=look.phash,
        thumb=look.thumb,
    )


def snapshot(store: Store) -> dict[str, bytes]:
    """All that label writes: every object under labels/ and review/."""
    return {item.key: store.get(item.key) for prefix in ("labels/", "review/") for item in store.list(prefix)}


@dataclass
class World:
    """One bucket and one folder of artifacts."""

    store: Store
    folder: Path

    @property
    def settings(self) -> Settings:
        return self.store.settings

    def teacher(self, radius: float = 0.5, classes: Iterable[str] = CLASSES) -> tuple[ModelFolder, str]:
        """A tiny model folder and its path."""
        path = self.folder / f"teacher-{radius}-{'-'.join(classes)}"
        return tiny_model_folder(path, list(classes), radius=radius, golden=False), str(path)

    def frames(self, pictures: Mapping[str, bytes]) -> dict[str, Frame]:
        """Store the pictures and write frames.parquet."""
        rows = {name: put_frame(self.store, data, name) for name, data in pictures.items()}
        self.write(rows.values())
        return rows

    def write(self, rows: Iterable[Frame]) -> None:
        """Write frames.parquet."""
        write_rows(self.folder / "frames" / "frames.parquet", Frame, rows)

    def label(self, **changes: Any) -> LabelResult:
        """Run the step with sensible values and these changes."""
        values: dict[str, Any] = {
            "frames": self.folder / "frames",
            "name": "gate",
            "champion": "",
            "teacher": "",
            "classes": CLASSES,
            "class_map": {},
            "bands": BANDS,
            "review_limit": -1,
            "out": self.folder / "labels",
            "settings": self.settings,
            "now": NOW,
        }
        return label(**(values | changes))

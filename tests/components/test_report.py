"""The report is one page that opens anywhere: nothing fetched, nothing run, nothing from outside taken for markup."""

from __future__ import annotations

import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haechi.components.evaluate.gate import compare, judge
from haechi.components.evaluate.parameters import Gate
from haechi.components.evaluate.pictures import MAX_BYTES, Picture, draw, worst
from haechi.components.evaluate.report import DatasetFacts, Evaluation, render
from haechi.components.evaluate.score import TestFrame, confusion_matrix, score_model
from haechi.components.shared.detections import Detections
from haechi.components.shared.images import decode, encode_jpeg
from haechi.components.shared.model_folder import ModelFolder

EVIL = "<script>alert('x')</script>\"&"
CLASSES = ("fire", EVIL)
GATE = Gate(min_boxes=5, min_groups=3, floors={"default": 0.3}, draws=200)
LIMITS = [0.5, 0.5]


def detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    table = np.asarray(rows, dtype=np.float32).reshape(-1, 6)
    order = np.argsort(-table[:, 4], kind="stable")
    return Detections(table[order, :4], table[order, 4], table[order, 5].astype(np.int64))


def make_frames(count: int = 40) -> list[TestFrame]:
    """One fire and one of the other class in each frame of 640×480; the second is not covered in every fourth."""
    return [
        TestFrame(
            f"s3://raw/{EVIL}/{index}.jpg",
            f"g{index // 2}",
            np.asarray([True, index % 4 != 0]),
            np.asarray([[50, 60, 150, 200], [300, 100, 420, 300]][: 1 if index % 4 == 0 else 2], dtype=float),
            np.asarray([0, 1][: 1 if index % 4 == 0 else 2]),
            f"cam {EVIL}",
        )
        for index in range(count)
    ]


def make_found(frames: list[TestFrame], skip: int) -> list[Detections]:
    """Finds all but every `skip`-th fire, and sees a false fire with rising score in every fifth frame."""
    return [
        detections(
            *([] if index % skip == 0 else [(52, 60, 150, 204, 0.9, 0)]),
            (302, 104, 424, 300, 0.8, 1),
            *([(500, 300, 600, 400, 0.56 + index / 100, 0)] if index % 5 == 0 else []),
        )
        for index in range(len(frames))
    ]


def jpeg(index: int) -> bytes:
    return encode_jpeg(np.random.default_rng(index).integers(0, 255, (480, 640, 3), dtype=np.uint8))


def evaluation(champion: bool = True, count: int = 40) -> Evaluation:
    frames = make_frames(count)
    found, other = make_found(frames, 7), make_found(frames, 3)
    thresholds = dict.fromkeys(CLASSES, 0.5)
    score = score_model(frames, found, CLASSES, CLASSES, thresholds)
    theirs = score_model(frames, other, CLASSES, CLASSES, thresholds) if champion else None
    comparison = compare(GATE, score, theirs)
    mistakes = worst(frames, found, other if champion else None, CLASSES, LIMITS, LIMITS)
    model = ModelFolder(
        "door",
        "0123456789ab",
        CLASSES,
        640,
        32,
        thresholds,
        0.7,
        "f" * 64,
        training={EVIL: EVIL},
        metrics={"val/mAP50": 0.5},
    )
    return Evaluation(
        model=model,
        champion=replace(model, version="ba9876543210") if champion else None,
        dataset=DatasetFacts("d" * 64, {"train": 100, "val": 20, "test": count}, count // 2, {EVIL: count}, count),
        score=score,
        champion_score=theirs,
        comparison=comparison,
        gate=GATE,
        judgement=judge(GATE, score, theirs, comparison, model.version, "ba9876543210" if champion else ""),
        confusion=confusion_matrix(frames, found, CLASSES, LIMITS),
        pictures=draw(mistakes, frames, found, CLASSES, LIMITS, jpeg),
    )


class Tags(HTMLParser):
    """Collects every tag with its attributes, and tells whether tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    return render(evaluation())


def test_the_page_runs_nothing_and_points_nowhere(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "a", "base"}
    for _, attributes in tags.seen:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_names_from_outside_are_text(page: str) -> None:
    assert EVIL not in page
    assert "<script" not in page
    assert page.count(escape(EVIL)) > 10


def test_verdict_champion_intervals_floor_and_facts_are_on_the_page(page: str) -> None:
    item = evaluation()
    for text in (
        "Promote",
        escape(item.judgement.reasons[0]),
        "ba9876543210",
        "d" * 64,
        "train 100, val 20, test 40",
        f"{item.score.per_class['fire'].map50_95:.3f}",
        f"{item.comparison.challenger['fire'].low:.3f} to {item.comparison.challenger['fire'].high:.3f}",
        "Precision over recall",
        "in 30; a class is judged on those frames only",
        "Worst errors",
        "class_drop/fire",
    ):
        assert text in page, text


def test_without_a_champion_there_is_no_comparison() -> None:
    page = render(evaluation(champion=False))
    assert "There is no champion to compare with." in page
    assert "Change of AP50-95" not in page


def test_an_empty_test_still_makes_a_page() -> None:
    page = render(evaluation(champion=False, count=0))
    assert "Not enough data to decide" in page
    assert "Worst errors" not in page
    Tags().feed(page)


def test_the_worst_errors_are_the_ones_told() -> None:
    frames = make_frames(20)
    found = make_found(frames, 7)
    mistakes = worst(frames, found, None, CLASSES, LIMITS)
    assert [(item.frame, item.note) for item in mistakes if item.kind == "label suspect"] == [
        (15, "score 0.71; the model is sure of it, the label has nothing there")
    ]
    assert [item.frame for item in mistakes if item.kind == "false alarm"] == [10, 5, 0]
    assert [item.frame for item in mistakes if item.kind == "miss"] == [0, 7, 14]
    # With a champion that sees the same, all are suspect; with one that does not, none is.
    agreed = worst(frames, found, found, CLASSES, LIMITS, LIMITS)
    assert {item.kind for item in agreed} == {"label suspect", "miss"}
    blind = worst(frames, found, [detections()] * 20, CLASSES, LIMITS, LIMITS)
    assert {item.kind for item in blind} == {"false alarm", "miss"}


def test_pictures_are_few_small_and_from_different_frames() -> None:
    frames = [replace(frame, group=str(index)) for index, frame in enumerate(make_frames(200))]
    found = make_found(frames, 2)
    pictures = draw(worst(frames, found, None, CLASSES, LIMITS), frames, found, CLASSES, LIMITS, jpeg)
    assert 0 < len(pictures) <= 24
    assert sum(len(item.jpeg) for item in pictures) <= MAX_BYTES
    for kind in {item.mistake.kind for item in pictures}:
        shown = [item.mistake.frame for item in pictures if item.mistake.kind == kind]
        assert len(shown) == len(set(shown)) <= 8
    assert len(render(replace(evaluation(), pictures=pictures))) < 2_100_000
    for item in pictures:
        check_picture(item)


def check_picture(item: Picture) -> None:
    assert decode(item.jpeg).shape == (item.height, item.width, 3)
    (error,) = [mark for mark in item.marks if mark.kind == "error"]
    assert error.width > 5
    for mark in item.marks:
        assert mark.x >= 0
        assert mark.y >= 0
        assert mark.x + mark.width <= item.width + 1
        assert mark.y + mark.height <= item.height + 1


@pytest.mark.parametrize("width", [390, 1100])
def test_a_browser_shows_it_in_a_sandboxed_frame(browser: Any, page: str, tmp_path: Path, width: int) -> None:
    # As KFP shows it: an iframe without any permission.
    (tmp_path / "report.html").write_text(page)
    (tmp_path / "host.html").write_text("<iframe sandbox src='report.html' style='width:98%;height:880px'></iframe>")
    view = browser.new_page(viewport={"width": width, "height": 900})
    asked: list[str] = []
    told: list[str] = []
    view.on("request", lambda request: asked.append(request.url))
    view.on("console", lambda message: told.append(message.text))
    view.on("dialog", lambda dialog: told.append("dialog"))
    view.goto((tmp_path / "host.html").as_uri())
    frame = view.frame_locator("iframe")
    assert frame.locator(".banner strong").inner_text() == "Promote"
    assert frame.locator("h1").is_visible()
    assert frame.locator("figure image").count() == len(evaluation().pictures)
    assert frame.locator("tbody th", has_text="alert").first.inner_text() == EVIL
    box = frame.locator(".charts svg polyline").first.bounding_box()
    assert box["width"] > 100
    assert frame.locator("main").bounding_box()["width"] <= width
    assert [url for url in asked if not re.match(r"file://.*/(host|report)\.html$|data:image/jpeg", url)] == []
    assert told == []
    assert len(view.screenshot()) > 10_000
    view.close()


def test_every_picture_is_drawn(browser: Any, page: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page)
    view = browser.new_page(viewport={"width": 1100, "height": 900})
    view.goto((tmp_path / "report.html").as_uri())
    sizes = view.evaluate(
        "Promise.all([...document.querySelectorAll('figure image')].map(async (item) => {"
        "const image = new Image(); image.src = item.getAttribute('href'); await image.decode();"
        "return [image.naturalWidth, item.getBoundingClientRect().width]}))"
    )
    assert len(sizes) == len(evaluation().pictures)
    assert all(natural > 100 and shown > 100 for natural, shown in sizes)
    # Nothing sticks out of the page sideways.
    assert view.evaluate("document.documentElement.scrollWidth") == 1100
    view.close()

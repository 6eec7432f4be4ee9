"""Letterbox, heads, suppression and boxes: each against hand-worked numbers and against what it must equal."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from haechi.components.shared.detections import (
    PADDING,
    Detections,
    Detector,
    Head,
    Letterbox,
    box_iou,
    classes_of_graph,
    decode_output,
    letterbox,
    non_maximum_suppression,
    onnx_session,
    read_head,
    to_tensor,
)
from haechi.components.shared.errors import InputError, ModelError
from haechi.components.shared.images import decode
from tests.tiny_models import cell_box, paint, shade, tiny_model_folder, tiny_network

SIZES = [
    (640, 640),
    (1280, 720),
    (720, 1280),
    (1919, 1081),
    (333, 77),
    (77, 333),
    (31, 33),
    (1, 1),
    (2000, 3),
    (641, 479),
]
SIZES += [(500, 375), (427, 640), (100, 99), (4000, 2250), (640, 1)]


def picture(width: int, height: int) -> NDArray[np.uint8]:
    return np.random.default_rng(width * 10_000 + height).integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("rectangle", [True, False])
@pytest.mark.parametrize("imgsz", [160, 320, 640])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_letterbox_equals_ultralytics_byte_for_byte(width: int, height: int, imgsz: int, rectangle: bool) -> None:
    from ultralytics.data.augment import LetterBox

    pixels = picture(width, height)
    theirs = LetterBox((imgsz, imgsz), auto=rectangle, stride=32)(image=pixels)
    ours, placed = letterbox(pixels, imgsz, 32, rectangle)
    assert np.array_equal(ours, theirs)
    assert ours.shape[0] % 32 == 0 and ours.shape[1] % 32 == 0 and max(ours.shape[:2]) == imgsz
    assert (placed.width, placed.height) == (width, height)


def test_letterbox_pads_with_the_grey_of_training() -> None:
    canvas, placed = letterbox(np.zeros((720, 1280, 3), dtype=np.uint8), 640, 32, rectangle=True)
    assert canvas.shape == (384, 640, 3)
    assert placed == Letterbox(0.5, 0, 12, 1280, 720)
    assert (canvas[:12] == PADDING).all() and (canvas[372:] == PADDING).all() and (canvas[12:372] == 0).all()


@settings(max_examples=200, deadline=None)
@given(width=st.integers(8, 900), height=st.integers(8, 900), square=st.booleans(), data=st.data())
def test_boxes_survive_the_round_trip(width: int, height: int, square: bool, data: st.DataObject) -> None:
    """Source box to network input and back through decode_output, within float32's grain."""
    x1, x2 = sorted(data.draw(st.tuples(st.floats(0, width), st.floats(0, width))))
    y1, y2 = sorted(data.draw(st.tuples(st.floats(0, height), st.floats(0, height))))
    _, placed = letterbox(np.zeros((height, width, 3), dtype=np.uint8), 640, 32, rectangle=not square)
    inside = np.array([x1, y1, x2, y2]) * placed.gain + [placed.left, placed.top] * 2
    raw = np.array([[*inside, 0.9, 0]], dtype=np.float32)
    back = decode_output(raw, "end2end", placed, 0.25, 0.7, 300)
    assert np.abs(back.boxes[0] - [x1, y1, x2, y2]).max() < 0.01 * max(1, max(width, height) / 640)


def test_to_tensor_is_rgb_planes_from_0_to_1() -> None:
    canvas = np.zeros((32, 64, 3), dtype=np.uint8)
    canvas[..., 0] = 255
    canvas[..., 2] = 51
    tensor = to_tensor([canvas, canvas])
    assert tensor.shape == (2, 3, 32, 64) and tensor.dtype == np.float32 and tensor.flags.c_contiguous
    assert [float(tensor[1, plane].mean()) for plane in range(3)] == pytest.approx([1.0, 0.0, 0.2])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 0, 10, 10], [0, 0, 10, 10], 1.0),
        ([0, 0, 10, 10], [5, 0, 15, 10], 1 / 3),
        ([0, 0, 10, 10], [10, 0, 20, 10], 0.0),
        ([0, 0, 10, 10], [20, 20, 30, 30], 0.0),
        ([5, 5, 5, 5], [5, 5, 5, 5], 0.0),
        ([0, 0, 10, 10], [2, 2, 4, 4], 0.04),
    ],
)
def test_iou(a: list[float], b: list[float], expected: float) -> None:
    assert box_iou(np.array([a], dtype=np.float32), np.array([b], dtype=np.float32))[0, 0] == pytest.approx(expected)


def random_boxes(count: int, classes: int, seed: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    corner = rng.random((count, 2)) * 300
    boxes = np.concatenate([corner, corner + rng.random((count, 2)) * 120], axis=1).astype(np.float32)
    return boxes, rng.random(count).astype(np.float32), rng.integers(0, classes, count)


@pytest.mark.parametrize("count", [0, 1, 2, 255, 256, 257, 1500, 4000])
@pytest.mark.parametrize("iou", [0.3, 0.45, 0.6, 0.7, 0.95])
def test_suppression_equals_torchvision(count: int, iou: float) -> None:
    import torch
    import torchvision

    boxes, scores, classes = random_boxes(count, 1, seed=count)
    ours = non_maximum_suppression(boxes, scores, classes, iou, max_det=count + 1)
    theirs = torchvision.ops.nms(torch.from_numpy(boxes), torch.from_numpy(scores), iou).numpy()
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("classes", [2, 80])
def test_suppression_stays_within_a_class(classes: int) -> None:
    import torch
    import torchvision

    boxes, scores, labels = random_boxes(3000, classes, seed=classes)
    ours = non_maximum_suppression(boxes, scores, labels, 0.5, max_det=5000)
    expected = [
        int(index)
        for label in range(classes)
        for index in np.flatnonzero(labels == label)[
            torchvision.ops.nms(
                torch.from_numpy(boxes[labels == label]), torch.from_numpy(scores[labels == label]), 0.5
            ).numpy()
        ]
    ]
    assert ours.tolist() == sorted(expected, key=lambda index: -scores[index])
    assert non_maximum_suppression(boxes, scores, labels, 0.5, max_det=7).tolist() == ours[:7].tolist()


def test_the_same_box_of_two_classes_stays_twice() -> None:
    box = np.array([[10, 10, 50, 50], [10, 10, 50, 50], [11, 10, 50, 50]], dtype=np.float32)
    kept = non_maximum_suppression(box, np.array([0.5, 0.9, 0.8], dtype=np.float32), np.array([0, 1, 1]), 0.7, 300)
    assert kept.tolist() == [1, 0]


PLAIN = Letterbox(0.5, 0, 12, 1280, 720)


def dense(*rows: tuple[float, ...]) -> Any:
    return np.array(rows, dtype=np.float32).T


def test_a_dense_head_gives_source_pixels_clipped() -> None:
    raw = dense(
        (100, 112, 50, 40, 0.1, 0.8), (101, 112, 50, 40, 0.1, 0.6), (5, 15, 40, 40, 0.7, 0.2), (1, 1, 1, 1, 0, 0)
    )
    found = decode_output(raw, "dense", PLAIN, conf=0.25, iou=0.7, max_det=300)
    assert found.class_ids.tolist() == [1, 0]
    assert found.scores.tolist() == pytest.approx([0.8, 0.7])
    assert found.boxes.tolist() == [[150, 160, 250, 240], [0, 0, 50, 46]]


def test_an_end2end_head_is_taken_as_it_is() -> None:
    raw = np.array([[0, 12, 64, 76, 0.3, 2], [0, 12, 64, 76, 0.9, 2], [1, 1, 2, 2, 0.1, 0]], dtype=np.float32)
    found = decode_output(raw, "end2end", PLAIN, conf=0.25, iou=0.1, max_det=300)
    assert found.scores.tolist() == pytest.approx([0.9, 0.3])
    assert found.boxes.tolist() == [[0, 0, 128, 128]] * 2
    assert len(decode_output(raw, "end2end", PLAIN, conf=0.25, iou=0.1, max_det=1)) == 1


@pytest.mark.parametrize("kind", ["dense", "end2end"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_give_no_box(kind: str, bad: float) -> None:
    raw = np.array([[10, 20, 30, 40, 0.9, 0], [10, 20, bad, 40, 0.8, 0], [10, 20, 30, 40, np.nan, 0]], dtype=np.float32)
    found = decode_output(raw.T if kind == "dense" else raw, kind, PLAIN, 0.25, 0.7, 300)
    assert len(found) == 1 and np.isfinite(found.boxes).all()
    json.dumps(found.to_list(["a", "b"]), allow_nan=False)


def test_nothing_found_is_empty_arrays_of_the_right_shape() -> None:
    found = decode_output(np.zeros((6, 100), dtype=np.float32), "dense", PLAIN, 0.25, 0.7, 300)
    assert found.boxes.shape == (0, 4) and len(found) == 0 and found.to_list(["a", "b"]) == []


def test_thresholds_apply_by_class() -> None:
    found = Detections(
        np.zeros((3, 4), dtype=np.float32), np.array([0.6, 0.5, 0.4], dtype=np.float32), np.array([0, 1, 0])
    )
    assert found.above(0.5).scores.tolist() == pytest.approx([0.6, 0.5])
    assert found.above([0.3, 0.9]).scores.tolist() == pytest.approx([0.6, 0.4])


def test_suppression_at_a_low_limit_is_fast() -> None:
    """evaluate decodes at conf 0.001; 8,400 candidates of a 640 px image must not take longer than the network."""
    rng = np.random.default_rng(0)
    raw = np.concatenate([rng.random((2, 8400)) * 600, rng.random((2, 8400)) * 90, rng.random((80, 8400))])
    raw = raw.astype(np.float32)
    best = min(_seconds(raw) for _ in range(5))
    assert best < 0.1, f"{best * 1000:.0f} ms"


def _seconds(raw: Any) -> float:
    start = time.perf_counter()
    assert len(decode_output(raw, "dense", PLAIN, 0.001, 0.7, 300)) == 300
    return time.perf_counter() - start


def graph(
    path: Path, shape_in: list[Any], shape_out: list[Any], kind: int = TensorProto.FLOAT, names: str = ""
) -> Path:
    """A graph of the wanted interface whose output is a constant."""
    fixed = [size if isinstance(size, int) else 1 for size in shape_out]
    value = numpy_helper.from_array(np.zeros(fixed, dtype=np.float32), "value")
    nodes = [helper.make_node("Identity", ["value"], ["out"])]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", kind, shape_in)],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape_out)],
            [value],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    if names:
        helper.set_model_props(model, {"names": names})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("shape_in", "shape_out", "classes", "expected"),
    [
        (["b", 3, "h", "w"], ["b", 6, "a"], 2, Head("dense", True, 0, 0, 0, "x")),
        (["b", 3, "h", "w"], ["b", 300, 6], 2, Head("end2end", True, 0, 0, 0, "x")),
        (["b", 3, "h", "w"], ["b", 300, 6], 80, Head("end2end", True, 0, 0, 0, "x")),
        ([1, 3, 640, 640], [1, 84, 8400], 80, Head("dense", False, 640, 640, 1, "x")),
    ],
)
def test_the_head_is_read_from_the_graph(
    tmp_path: Path, shape_in: list[Any], shape_out: list[Any], classes: int, expected: Head
) -> None:
    assert read_head(onnx_session(graph(tmp_path / "g.onnx", shape_in, shape_out)), classes) == expected


@pytest.mark.parametrize(
    ("shape_in", "shape_out", "kind", "match"),
    [
        (["b", 3, "h", "w"], ["b", 84, "a"], TensorProto.FLOAT, r"neither \(batch, 7, anchors\)"),
        (["b", 3, "h", "w"], ["b", 1000], TensorProto.FLOAT, "detector of 3 classes"),
        (["b", 3], ["b", 7, "a"], TensorProto.FLOAT, "input is"),
        (["b", 1, "h", "w"], ["b", 7, "a"], TensorProto.FLOAT, "input is"),
        (["b", 3, "h", "w"], ["b", 7, "a"], TensorProto.FLOAT16, "half precision"),
        (["b", 3, "h", "w"], ["b", 7, "a"], TensorProto.UINT8, "uint8"),
    ],
)
def test_a_graph_that_is_no_such_detector_is_refused(
    tmp_path: Path, shape_in: list[Any], shape_out: list[Any], kind: int, match: str
) -> None:
    session = onnx_session(graph(tmp_path / "g.onnx", shape_in, shape_out, kind))
    with pytest.raises(ModelError, match=match):
        read_head(session, 3)


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x08\x12\x00" * 100])
def test_what_is_no_graph_is_a_model_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.onnx"):
        onnx_session(path)
    with pytest.raises(ModelError, match=r"absent\.onnx"):
        onnx_session(tmp_path / "absent.onnx")


@pytest.mark.parametrize("imgsz", [0, -32, 31, 641])
def test_an_input_size_off_the_stride_is_refused(imgsz: int) -> None:
    with pytest.raises(InputError, match=f"imgsz is {imgsz}"):
        Detector(lambda batch: batch, Head("dense", True, 0, 0, 0, "x"), ["a"], imgsz)


@pytest.mark.parametrize(("height", "width"), [(320, 640), (0, 640)])
def test_an_oblong_or_half_fixed_graph_is_refused(height: int, width: int) -> None:
    with pytest.raises(ModelError, match=f"{height}x{width}"):
        Detector(lambda batch: batch, Head("dense", height == 0, height, width, 0, "x"), ["a"], 640)


@pytest.mark.parametrize(
    ("names", "expected"), [("{0: 'person', 1: \"it's\"}", ["person", "it's"]), ("['a', 'b']", ["a", "b"]), ("", [])]
)
def test_class_names_come_from_the_graph(tmp_path: Path, names: str, expected: list[str]) -> None:
    session = onnx_session(graph(tmp_path / "g.onnx", ["b", 3, "h", "w"], ["b", 6, "a"], names=names))
    assert classes_of_graph(session) == expected


@pytest.mark.parametrize("names", ["{0: ", "__import__('os').abort()", "7", "{'a': 1}"])
def test_class_names_that_cannot_be_read_are_a_model_error(tmp_path: Path, names: str) -> None:
    session = onnx_session(graph(tmp_path / "g.onnx", ["b", 3, "h", "w"], ["b", 6, "a"], names=names))
    with pytest.raises(ModelError, match="names"):
        classes_of_graph(session)


def test_a_detector_finds_painted_cells_in_images_of_any_size(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path, ["person", "dog"])
    detector = model.detector(tmp_path, threads=1)
    images = [
        paint({(2, 3): shade(0, 0.9)}),
        paint({(5, 5): shade(1, 0.6)}, width=320, height=192),
        paint({}),
        paint({(0, 0): shade(0, 0.7)}, width=640, height=640, cell=64),
    ]
    found = detector.detect([decode(data) for data in images])
    assert [(item.class_ids.tolist(), np.round(item.boxes).tolist()) for item in found] == [
        ([0], [list(cell_box(2, 3))]),
        ([1], [list(cell_box(5, 5))]),
        ([], []),
        ([0], [[0, 0, 64, 64]]),
    ]


def test_many_images_are_run_in_bounded_batches() -> None:
    seen: list[int] = []

    def run(batch: Any) -> Any:
        seen.append(len(batch))
        return np.zeros((len(batch), 6, 4), dtype=np.float32)

    detector = Detector(run, Head("dense", True, 0, 0, 0, "x"), ["a", "b"], 64)
    assert len(detector.detect([np.zeros((64, 64, 3), dtype=np.uint8)] * 20)) == 20
    assert sum(seen) == 20 and max(seen) == 8


@pytest.mark.parametrize("size", [1, 4])
def test_a_graph_of_fixed_batch_gets_that_batch(size: int) -> None:
    def run(batch: Any) -> Any:
        assert len(batch) == size
        rows = np.zeros((size, 1, 6), dtype=np.float32)
        rows[:, 0] = [0, 0, 8, 8, 0.5, 0]
        rows[:, 0, 4] = batch.mean(axis=(1, 2, 3))
        return rows

    detector = Detector(run, Head("end2end", True, 0, 0, size, "x"), ["a"], 64)
    images = [np.full((64, 64, 3), level, dtype=np.uint8) for level in (255, 204, 153, 102, 255)]
    scores = [float(item.scores[0]) for item in detector.detect(images)]
    assert scores == pytest.approx([1.0, 0.8, 0.6, 0.4, 1.0], abs=1e-5)


def test_the_tiny_graph_has_the_head_it_claims(tmp_path: Path) -> None:
    onnx.save(tiny_network(["a", "b"]), tmp_path / "t.onnx")
    session = onnx_session(tmp_path / "t.onnx")
    assert read_head(session, 2).kind == "dense" and classes_of_graph(session) == ["a", "b"]


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("weights", "options", "head"),
    [
        ("yolo11n", {}, "dense"),
        ("yolov8n", {}, "dense"),
        ("yolo26n", {}, "dense"),
        ("yolo26n", {"nms": False}, "end2end"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's exporter warns of its own future
def test_boxes_on_real_pictures_equal_those_of_ultralytics(
    realdata: Path, tmp_path: Path, weights: str, options: dict[str, Any], head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph through our code against Ultralytics' own predict, with that graph and with the checkpoint."""
    monkeypatch.setenv("ULTRALYTICS_SAFE_LOAD", "1")
    monkeypatch.setenv("YOLO_OFFLINE", "1")
    from ultralytics import YOLO

    shutil.copy(realdata / "weights" / f"{weights}.pt", tmp_path)
    network = YOLO(tmp_path / f"{weights}.pt")
    out = Path(network.export(format="onnx", dynamic=True, simplify=True, opset=19, imgsz=640, **options))
    classes = [network.names[index] for index in sorted(network.names)]
    detector = Detector.from_onnx(out, classes, 640, threads=2)
    assert detector.head.kind == head
    references = [YOLO(out, task="detect"), YOLO(tmp_path / f"{weights}.pt")]
    pictures = sorted((realdata / "entrance").rglob("*.jpg"))[:10] + sorted((realdata / "cam_lobby").rglob("*.jpg"))[:2]
    pictures += sorted((realdata / "person_down").rglob("*.jpg"))[:2]
    total = 0
    for path in pictures:
        pixels = decode(path.read_bytes())
        ours = detector.detect([pixels], conf=0.25, iou=0.7)[0]
        total += len(ours)
        for reference in references:
            # Ultralytics takes arrays as BGR.
            bgr = pixels[:, :, ::-1].copy()
            # `nms=False` chooses the NMS-free head of the checkpoint, as it did for the export.
            result = reference.predict(bgr, conf=0.25, iou=0.7, imgsz=640, verbose=False, **options)[0].boxes
            expected = Detections(result.xyxy.numpy(), result.conf.numpy(), result.cls.numpy().astype(np.int64))
            _assert_same(ours, expected, path.name)
    assert total > 30


def _assert_same(ours: Detections, theirs: Detections, name: str) -> None:
    """One to one, but for boxes whose score lies within 0.005 of the limit."""
    used: set[int] = set()
    for index in range(len(theirs)):
        near = [
            other
            for other in range(len(ours))
            if other not in used
            and ours.class_ids[other] == theirs.class_ids[index]
            and np.abs(ours.boxes[other] - theirs.boxes[index]).max() <= 0.5
            and abs(ours.scores[other] - theirs.scores[index]) <= 0.005
        ]
        assert near or theirs.scores[index] < 0.255, f"{name}: {theirs.boxes[index]} {theirs.scores[index]} is missing"
        used.update(near[:1])
    extra = [index for index in range(len(ours)) if index not in used and ours.scores[index] >= 0.255]
    assert not extra, f"{name}: {ours.boxes[extra]} too many"

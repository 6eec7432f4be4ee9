"""Export: the best candidate becomes a model folder whose graph gives the checkpoint's boxes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from shapes import CLASSES, draw, write_dataset

from haechi.components.export.golden import Picture, choose_rows, from_files
from haechi.components.export.graph import Checkpoint, write_onnx
from haechi.components.export.parameters import spread_thresholds
from haechi.components.export.proof import Proof, prove
from haechi.components.export.step import export, export_checkpoint
from haechi.components.shared.dataset import Box, ManifestRow
from haechi.components.shared.detections import Detector, classes_of_graph, onnx_session, read_head
from haechi.components.shared.errors import InputError, IntegrityError, ModelError, TrainError
from haechi.components.shared.files import sha256_file, write_json
from haechi.components.shared.images import decode, encode_jpeg
from haechi.components.shared.model_folder import ModelFolder, check_golden, read_golden
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.components.shared.yolo import tame

WEIGHTS = ("yolo11n", "yolov8n", "yolo26n")


def save(path: Path, model: Any) -> Path:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.half(), "train_args": {"imgsz": 128}, "version": "8.4"}, path)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network from scratch that finds something: its norms have seen pictures, its scores are spread."""
    return save(tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt", network(-4.0, 4.0, seen=True))


def network(bias: float, gain: float, seen: bool) -> Any:
    """YOLO11n with random weights; `seen` sets its batch norms' statistics from drawn pictures."""
    tame(1)
    import torch
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(5)
    model = DetectionModel("yolo11n.yaml", nc=3, verbose=False)
    model.names = dict(enumerate(CLASSES))
    if seen:
        norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None  # a plain mean: one pass is enough
        pixels = np.stack([cv2.resize(decode(draw(index)[0]), (128, 128)) for index in range(16)])
        with torch.no_grad():
            model.train()(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float() / 255)
    for branch in model.model[-1].cv3:
        branch[-1].bias.data[:] = bias
        branch[-1].weight.data.mul_(gain)
    return model


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(5):
        (folder / f"{index}.jpg").write_bytes(draw(index, 150 + 30 * index, 100)[0])
    return folder


def trained(folder: Path, checkpoint: Path, name: str, map50_95: float, status: str = "ok") -> Path:
    folder.mkdir(parents=True)
    entry = {"name": name, "status": status, "reason": "", "map50_95": map50_95, "map50": map50_95, "imgsz": 128}
    entry |= {"dataset_digest": "d1", "run_id": "m1", "candidate": {"model": "yolo11n"}, "classes": list(CLASSES)}
    if status == "ok":
        (folder / "checkpoint.pt").write_bytes(checkpoint.read_bytes())
    else:
        entry |= {"map50_95": None, "map50": None, "reason": "out of memory at batch 16. Give a smaller batch."}
    write_json(folder / "train.json", entry)
    return folder


def test_the_best_candidate_becomes_a_whole_model_folder(
    checkpoint: Path, store: Store, settings: Settings, tmp_path: Path
) -> None:
    dataset = write_dataset(store, tmp_path / "dataset", 2, 6)
    folders = [
        trained(tmp_path / "1", checkpoint, "zeta", 0.4),
        trained(tmp_path / "2", checkpoint, "beta", 0.5),
        trained(tmp_path / "3", checkpoint, "alpha", 0.0, "failed"),
        trained(tmp_path / "4", checkpoint, "aleph", 0.5),
    ]
    out = tmp_path / "model"
    result = export(folders, dataset, "safety", {"default": 0.25, "fire": 0.4}, 0.6, 4, out, settings)
    assert (result.candidate, result.map50_95, result.parity_ok) == ("aleph", 0.5, True)
    model = ModelFolder.load(out)
    assert model.version == result.version == sha256_file(out / "model.onnx")[:12]
    assert (model.classes, model.imgsz, model.stride, model.golden, model.iou) == (CLASSES, 128, 32, 4, 0.6)
    assert model.thresholds == {"smoke": 0.25, "fire": 0.4, "person_down": 0.25}
    assert model.metrics == {"val/mAP50-95": 0.5, "val/mAP50": 0.5} and model.dataset_digest == "d1"
    assert model.checkpoint_sha256 == sha256_file(out / "checkpoint.pt") == sha256_file(checkpoint)
    assert json.dumps(result.metadata())
    parity = json.loads((out / "parity.json").read_text())
    assert parity["ok"] is True and parity["images"] == 4 == len(parity["rows"]) and parity["boxes"] > 0
    assert sum(len(image.expected) for image in read_golden(out)) == parity["boxes"]
    assert check_golden(out, model.detector(out)).ok


@pytest.mark.parametrize("count", [0, 2])
def test_without_a_trained_candidate_each_reason_is_told(count: int, checkpoint: Path, tmp_path: Path) -> None:
    folders = [trained(tmp_path / str(index), checkpoint, f"c{index}", 0, "failed") for index in range(count)]
    with pytest.raises(TrainError, match="c0: out of memory.*c1: out of memory" if count else "there are none"):
        export(folders, None, "safety", {"default": 0.25}, 0.7, 4, tmp_path / "model", Settings())


def test_a_checkpoint_folder_without_its_files_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(IntegrityError, match=r"empty/train\.json"):
        export([tmp_path / "empty"], None, "safety", {"default": 0.25}, 0.7, 4, tmp_path / "model", Settings())


def test_the_same_checkpoint_gives_the_same_version_in_any_process(checkpoint: Path, tmp_path: Path) -> None:
    tame(1)
    write_onnx(Checkpoint(checkpoint), tmp_path / "here.onnx", 128)
    code = """
import sys
from pathlib import Path
from haechi.components.export.step import export_checkpoint
export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), name="other", golden_images=0)
"""
    copy = tmp_path / "elsewhere" / "best.pt"
    copy.parent.mkdir()
    copy.write_bytes(checkpoint.read_bytes())
    subprocess.run([sys.executable, "-c", code, str(copy), str(tmp_path / "there")], check=True, cwd=tmp_path)
    assert (tmp_path / "here.onnx").read_bytes() == (tmp_path / "there" / "model.onnx").read_bytes()
    # Without golden images the folder says that nothing proves it.
    assert ModelFolder.load(tmp_path / "there").golden == 0
    parity = json.loads((tmp_path / "there" / "parity.json").read_text())
    assert (parity["images"], parity["ok"]) == (0, None)


def test_the_graph_is_dynamic_and_names_its_classes(checkpoint: Path, tmp_path: Path) -> None:
    tame(1)
    write_onnx(Checkpoint(checkpoint), tmp_path / "model.onnx", 128)
    session = onnx_session(tmp_path / "model.onnx", threads=1)
    head = read_head(session, 3)
    assert (head.kind, head.dynamic, head.batch) == ("dense", True, 0) and classes_of_graph(session) == list(CLASSES)
    for shape in ((1, 3, 64, 96), (2, 3, 160, 128)):
        out = session.run(None, {head.input_name: np.zeros(shape, np.float32)})[0]
        assert out.shape[:2] == (shape[0], 7)
    kept = session.get_modelmeta().custom_metadata_map
    assert not {"date", "description", "args"} & kept.keys() and kept["stride"] == "32"
    import onnx

    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version <= 19


def test_any_checkpoint_can_be_exported_with_images_or_data(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    model = export_checkpoint(checkpoint, tmp_path / "a", name="door", images=[pictures], golden_images=3)
    assert (model.golden, model.imgsz, model.thresholds["fire"]) == (3, 128, 0.25)
    (tmp_path / "data.yaml").write_text(f"names: [a]\ntrain: {pictures.name}\nval: {pictures.name}\n")
    data = export_checkpoint(checkpoint, tmp_path / "b", name="door", data=tmp_path / "data.yaml", imgsz=96)
    assert (data.golden, data.imgsz) == (5, 96)
    assert data.version != "" and json.loads((tmp_path / "b" / "parity.json").read_text())["ok"] is True


def test_golden_images_have_boxes_where_any_do(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "m", name="door", thresholds={"default": 0.25})
    model = ModelFolder.load(tmp_path / "m").detector(tmp_path / "m", threads=1)

    def blind(batch: Any) -> Any:
        raw = model.infer(batch).copy()
        raw[batch.std(axis=(1, 2, 3)) < 0.01, 4:] = 0  # sees nothing on a grey picture
        return raw

    seeing = Detector(blind, model.head, CLASSES, 128)
    grey = [Picture(f"{shade}.jpg", encode_jpeg(np.full((128, 128, 3), shade, np.uint8))) for shade in (90, 110, 130)]
    drawn = [item for item in from_files([pictures], 5) if len(model.detect([decode(item.data)])[0])][:2]
    found = prove(seeing, seeing, [*grey, *drawn], 2)
    assert [image.name for image in found.golden(2)] == [item.name for item in drawn]
    assert len(drawn) == 2 and [image.name for image in found.golden(9)] == [item.name for item in [*drawn, *grey]]
    assert len(prove(seeing, seeing, [*drawn, *grey], 2).comparisons) == 2


def test_golden_images_without_a_box_are_said_to_prove_little(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = save(tmp_path / "shy.pt", network(-20.0, 1.0, seen=False))
    export_checkpoint(weights, tmp_path / "m", name="shy", images=[pictures], golden_images=3)
    assert "finds nothing on any of the 3 golden images" in capsys.readouterr().err


def test_a_graph_that_gives_other_boxes_is_refused(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "m", name="door", images=[pictures])
    model = ModelFolder.load(tmp_path / "m")
    exported = model.detector(tmp_path / "m", threads=1)
    # A graph fed with BGR is the classic silent bug.
    turned = Detector(lambda batch: exported.infer(np.ascontiguousarray(batch[:, ::-1])), exported.head, CLASSES, 128)
    found = prove(turned, exported, from_files([pictures], 5), 5)
    assert found.ok is False and found.to_dict()["ok"] is False
    with pytest.raises(ModelError, match=r"worst on [0-9a-f]{16}\.jpg"):
        found.require()


def test_pictures_on_which_only_the_suppression_differs_prove_nothing(tmp_path: Path) -> None:
    # Untrained: every box has the same score, so that rounding decides which one stays.
    weights = save(tmp_path / "flat.pt", network(-1.2, 20.0, seen=False))
    export_checkpoint(weights, tmp_path / "m", name="flat")
    exported = ModelFolder.load(tmp_path / "m").detector(tmp_path / "m", threads=1)
    picture = Picture("a.jpg", draw(0)[0])

    def rounded(batch: Any) -> Any:
        raw = exported.infer(batch).copy()
        raw[:, 4:] += np.random.default_rng(0).uniform(-1e-6, 1e-6, raw[:, 4:].shape).astype(np.float32)
        return raw

    found = prove(Detector(rounded, exported.head, CLASSES, 128), exported, [picture], 1)
    assert [item.verdict for item in found.comparisons] == ["ambiguous"] and found.ok is True
    assert found.golden(1) == [] and found.to_dict()["ambiguous"] == 1
    assert Proof(()).ok is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"thresholds": {"default": 0.2, "cat": 0.3}}, "model lacks: cat"),
        ({"thresholds": {"fire": 0.2}}, "nothing of smoke, person_down"),
        ({"thresholds": {"default": 2}}, "threshold of default is 2"),
        ({"iou": 0}, "iou is 0"),
        ({"name": "My Model"}, "name is 'My Model'"),
        ({"imgsz": 100}, "imgsz is 100"),
        ({"golden_images": -1}, "golden_images is -1"),
        ({"images": [Path("/nonexistent")]}, "neither an image nor a folder"),
        ({"images": [Path("/x")], "data": Path("/y")}, "both images and a data.yaml"),
    ],
)
def test_unusable_parameters_are_named(change: dict[str, Any], told: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        export_checkpoint(checkpoint, tmp_path / "m", **({"name": "door"} | change))
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("kind", ["missing", "garbage", "segment", "classify", "pickle"])
def test_what_is_no_detector_is_refused(kind: str, tmp_path: Path) -> None:
    tame(1)
    import torch
    from ultralytics.nn.tasks import ClassificationModel, SegmentationModel

    path, told = tmp_path / "x.pt", "weights-only"
    if kind == "missing":
        told = "there is no checkpoint"
    elif kind == "garbage":
        path.write_bytes(b"\x80\x04garbage")
    elif kind == "segment":
        save(path, SegmentationModel("yolo11n-seg.yaml", nc=2, verbose=False))
        told = "a SegmentationModel with a Segment head"
    elif kind == "classify":
        save(path, ClassificationModel("yolo11n-cls.yaml", nc=2, verbose=False))
        told = "a ClassificationModel with a Classify head"
    else:
        torch.save({"model": Evil(tmp_path / "ran")}, path)
    with pytest.raises(ModelError, match=told):
        export_checkpoint(path, tmp_path / "m", name="door")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "m").exists()


class Evil:
    """A pickle that runs a command when it is loaded without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_golden_frames_spread_over_cameras_and_classes() -> None:
    def row(name: str, camera: str, *kinds: str, split: str = "val") -> ManifestRow:
        boxes = tuple(Box(kind, 0, 0, 1, 1) for kind in kinds)
        return ManifestRow(name, "jpg", 9, 9, "", "", camera=camera, boxes=boxes, split=split)

    rows = [row("a", "c1", "fire"), row("b", "c1", "fire"), row("c", "c2", "fire"), row("d", "c1", "smoke")]
    rows += [row("e", "c1"), row("f", "c3", "smoke", "fire", split="train")]
    assert [item.sha256 for item in choose_rows(rows, 3)] == ["a", "c", "d"]
    assert choose_rows(rows[::-1], 9) == choose_rows(rows, 9) and len(choose_rows(rows, 9)) == 5


def test_pictures_are_spread_evenly_and_must_decode(pictures: Path) -> None:
    (pictures / "note.txt").write_text("no picture")
    assert len(from_files([pictures], 2)) == 2 and len(from_files([pictures], 99)) == 5
    (pictures / "5.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"5\.jpg: "):
        from_files([pictures], 99)


def test_thresholds_are_given_to_each_class() -> None:
    assert spread_thresholds({"default": 0.3, "b": 1}, ["a", "b"]) == {"a": 0.3, "b": 1.0}


@pytest.mark.realdata
@pytest.mark.parametrize("name", WEIGHTS)
def test_real_weights_hold_parity_and_agree_with_ultralytics(name: str, realdata: Path, tmp_path: Path) -> None:
    images = realdata / "entrance"
    model = export_checkpoint(
        realdata / "weights" / f"{name}.pt", tmp_path / "m", name="coco", images=[images], golden_images=6
    )
    parity = json.loads((tmp_path / "m" / "parity.json").read_text())
    assert parity["ok"] is True and parity["boxes"] > 10 and parity["unmatched"] == 0
    from ultralytics import YOLO

    detector = model.detector(tmp_path / "m", threads=1)
    for weights in ("checkpoint.pt", "model.onnx"):
        theirs = YOLO(str(tmp_path / "m" / weights), task="detect")
        for golden in read_golden(tmp_path / "m"):
            pixels = decode(golden.data)
            ours = detector.detect([pixels], conf=0.25, iou=0.7)[0]
            found = theirs.predict(
                np.ascontiguousarray(pixels[..., ::-1]), conf=0.25, iou=0.7, imgsz=640, verbose=False
            )[0]
            pairs = {(int(c), round(float(s), 2)) for c, s in zip(found.boxes.cls, found.boxes.conf, strict=True)}
            assert pairs == {(int(c), round(float(s), 2)) for c, s in zip(ours.class_ids, ours.scores, strict=True)}
            order = np.lexsort((ours.class_ids, -ours.scores))
            assert np.abs(np.asarray(found.boxes.xyxy)[: len(order)] - ours.boxes[order]).max(initial=0) < 1.0


_KILLED = """
import os, signal, sys
from pathlib import Path
event_wanted, number, checkpoint, pictures, out = sys.argv[1], int(sys.argv[2]), *map(Path, sys.argv[3:])
seen = 0
def watch(event, arguments):
    global seen
    if event == event_wanted and ".partial-" in str(arguments[0]):
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
from haechi.components.export.step import export_checkpoint
export_checkpoint(checkpoint, out, name="safety", images=[pictures], imgsz=128, golden_images=3, threads=1)
"""


def _contents(folder: Path) -> dict[str, str]:
    """Digest of every file; of the description all but the time of writing."""
    found = {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}
    described = json.loads((folder / "model.json").read_text())
    del described["created_at"]
    return found | {"model.json": json.dumps(described, sort_keys=True)}


@pytest.mark.parametrize(("event", "number"), [("open", 2), ("open", 9), ("os.rename", 8)])
def test_a_killed_export_leaves_nothing_that_counts_and_runs_again_to_the_same_folder(
    event: str, number: int, checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "model"
    export_checkpoint(checkpoint, whole, name="safety", images=[pictures], imgsz=128, golden_images=3, threads=1)
    words = [sys.executable, "-c", _KILLED, event, str(number), str(checkpoint), str(pictures), str(out)]
    assert subprocess.run(words, capture_output=True, timeout=120).returncode == -9
    assert not out.exists()
    assert list(tmp_path.glob(".model.partial-*"))
    export_checkpoint(checkpoint, out, name="safety", images=[pictures], imgsz=128, golden_images=3, threads=1)
    assert _contents(out) == _contents(whole)
    assert list(tmp_path.glob(".model.partial-*")) == []

"""Backends: the network in parts gives the whole one's boxes, and what the golden images do not prove is not served."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from haechi.components.export.step import export_checkpoint
from haechi.components.shared.detections import Detector, onnx_session
from haechi.components.shared.errors import InputError, IntegrityError, ModelError, SettingsError
from haechi.components.shared.files import read_json, write_json
from haechi.components.shared.images import decode
from haechi.components.shared.model_folder import ModelFolder, read_golden
from haechi.components.shared.parity import Tolerance, agree, compare
from haechi.serving import backends, openers, selective
from haechi.serving.backends import BackendOptions, open_backend
from haechi.serving.graph import lighten, take_apart
from haechi.serving.selective import SelectiveNetwork
from tests.small_yolo import SIDE, small_yolo, small_yolo_folder
from tests.tiny_models import tiny_model_folder, tiny_network

ONLY_ONNX = BackendOptions("onnxruntime")
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")


def runner(model: bytes) -> Callable[[NDArray[np.float32]], list[NDArray[np.float32]]]:
    session = onnx_session(model, 1)
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch})


def pictures(count: int, seed: int = 3) -> NDArray[np.float32]:
    coarse = np.random.default_rng(seed).random((count, 3, 8, 8), dtype=np.float32)
    return coarse.repeat(SIDE // 8, axis=2).repeat(SIDE // 8, axis=3)


def in_parts(model: bytes) -> SelectiveNetwork:
    parts = take_apart(model)
    assert parts is not None
    return SelectiveNetwork(
        runner(parts.trunk), [(only(part.model), part.margin) for part in parts.branches], parts.bins
    )


def only(model: bytes) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    run = runner(model)
    return lambda level: run(level)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    small_yolo_folder(path)
    return path


def changed(folder: Path, target: Path, change: Callable[[dict[str, object]], None]) -> ModelFolder:
    """A copy of the folder whose golden.json is changed."""
    model = small_yolo_folder(target)
    golden = read_json(target / "golden" / "golden.json")
    change(golden)
    write_json(target / "golden" / "golden.json", golden)
    return model


@pytest.mark.parametrize("bins", [1, 4, 16])
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5])
def test_the_network_in_parts_gives_the_boxes_of_the_whole_one_above_the_floor(bins: int, floor: float) -> None:
    model, batch = small_yolo(bins), pictures(4)
    whole, found = runner(model)(batch)[0], in_parts(model)(batch, floor)

    np.testing.assert_allclose(found[:, 4:], whole[:, 4:], atol=1e-5)
    above = whole[:, 4:].max(axis=1) >= floor + 1e-5
    assert above.any()
    for index in range(len(batch)):
        np.testing.assert_allclose(found[index][:4, above[index]], whole[index][:4, above[index]], atol=2e-3)
        below = whole[index, 4:].max(axis=0) < floor - 1e-5
        assert np.isnan(found[index][:4, below]).all()


def test_nothing_above_the_floor_runs_no_branch() -> None:
    parts = take_apart(small_yolo())
    assert parts is not None

    def never(level: NDArray[np.float32]) -> NDArray[np.float32]:
        raise AssertionError("a branch ran")

    network = SelectiveNetwork(runner(parts.trunk), [(never, part.margin) for part in parts.branches], parts.bins)

    assert np.isnan(network(pictures(1), 1.5)[:, :4]).all()


def test_a_lighter_graph_splits_and_enlarges_nothing_that_it_need_not() -> None:
    model, batch = small_yolo(), pictures(2)
    lighter = lighten(model)
    kinds = [node.op_type for node in onnx.load_from_string(lighter).graph.node]

    np.testing.assert_allclose(runner(lighter)(batch)[0], runner(model)(batch)[0], atol=2e-3)
    assert "Split" not in kinds
    # The enlarged map is one of 32 channels that are added, where 64 were joined.
    assert kinds.count("Add") == [node.op_type for node in onnx.load_from_string(model).graph.node].count("Add") + 1


def test_a_graph_of_another_kind_stays_as_it_is() -> None:
    model = tiny_network(["person"]).SerializeToString()

    assert take_apart(model) is None
    assert lighten(model) is model


def test_a_map_that_is_enlarged_to_a_given_size_stays_as_it_is() -> None:
    model = onnx.load_from_string(small_yolo())
    resize = next(node for node in model.graph.node if node.op_type == "Resize")
    resize.input[:] = [resize.input[0], "", "", "sizes"]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray([2, 32, 16, 16]), "sizes"))
    batch = pictures(2)

    lighter = lighten(model.SerializeToString())

    np.testing.assert_allclose(runner(lighter)(batch)[0], runner(model.SerializeToString())(batch)[0], atol=2e-3)


def test_a_box_branch_with_holes_is_not_taken_apart() -> None:
    model = onnx.load_from_string(small_yolo())
    for node in model.graph.node:
        if node.name == "box0b":
            next(item for item in node.attribute if item.name == "dilations").ints[:] = [2, 2]

    assert take_apart(model.SerializeToString()) is None


def test_the_golden_images_let_the_network_in_parts_serve(folder: Path) -> None:
    model = ModelFolder.load(folder)
    backend = open_backend(folder, model, ONLY_ONNX)
    exact = Detector.from_onnx(folder / "model.onnx", model.classes, model.imgsz)

    assert (backend.engine, backend.precision, backend.provider) == ("onnxruntime", "fp32", "CPUExecutionProvider")
    assert backend.reason == "boxes only where a class scores"
    assert backend.golden is not None and backend.golden.ok and backend.golden.boxes > 10
    for image in read_golden(folder):
        found, expected = (item.detect([decode(image.data)], conf=0.2)[0] for item in (backend.detector, exact))
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.01)
        np.testing.assert_array_equal(found.class_ids, expected.class_ids)


def test_two_threads_at_a_time_get_the_boxes_that_one_gets(folder: Path) -> None:
    model = ModelFolder.load(folder)
    detector = open_backend(folder, model, BackendOptions("onnxruntime", streams=2)).detector
    images = [decode(image.data) for image in read_golden(folder)] * 4
    alone = [detector.detect([image])[0] for image in images]

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda image: detector.detect([image])[0], images))

    assert sum(map(len, alone)) > 10
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)


def test_without_golden_images_the_graph_is_served_as_it_stands(tmp_path: Path) -> None:
    model = small_yolo_folder(tmp_path, golden=0)
    backend = open_backend(tmp_path, model, BackendOptions())

    assert backend.engine == "onnxruntime"
    assert backend.reason == "the graph as it stands; no golden images prove anything faster"
    assert backend.golden is None


def test_golden_images_without_a_box_prove_nothing_faster_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = replace(tiny_model_folder(tmp_path, ["person"]), golden=1)
    path = tmp_path / "golden" / "golden.json"
    proven = open_backend(tmp_path, replace(model, golden=2), ONLY_ONNX)
    assert proven.reason == "the rewritten graph" and "WARNING" not in capsys.readouterr().err
    golden = read_json(path)
    golden["images"] = [row for row in golden["images"] if not row["boxes"]]
    write_json(path, golden)

    backend = open_backend(tmp_path, model, ONLY_ONNX)

    assert backend.reason == "the graph as it stands; not selective: no golden box could prove it"
    assert backend.golden is not None and (backend.golden.images, backend.golden.boxes) == (1, 0)
    assert "WARNING: nothing proves that tiny" in (told := capsys.readouterr().err)
    assert "none of its 1 golden images has a box" in told


def test_a_graph_that_cannot_be_taken_apart_is_served_too(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path, ["person"])

    assert open_backend(tmp_path, model, ONLY_ONNX).engine == "onnxruntime"


def test_parts_that_give_other_boxes_are_refused_for_the_graph_as_it_stands(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selective, "_CELL", np.float32(1.0))

    backend = open_backend(folder, ModelFolder.load(folder), ONLY_ONNX)

    assert backend.reason.startswith("the graph as it stands; not selective: the golden images give other boxes")
    assert backend.golden is not None and backend.golden.ok


def test_golden_boxes_that_nothing_gives_keep_the_model_from_serving(folder: Path, tmp_path: Path) -> None:
    def move(golden: dict[str, object]) -> None:
        golden["images"][0]["boxes"][0]["box"][0] += 5  # type: ignore[index]

    model = changed(folder, tmp_path, move)

    with pytest.raises(ModelError, match=r"not selective: .* other boxes.*; not whole: .* other boxes"):
        open_backend(tmp_path, model, ONLY_ONNX)


def test_missing_golden_images_keep_the_model_from_serving(folder: Path, tmp_path: Path) -> None:
    model = changed(folder, tmp_path, lambda golden: golden["images"].pop())  # type: ignore[attr-defined]

    with pytest.raises(IntegrityError, match="has 5 golden images"):
        open_backend(tmp_path, model, ONLY_ONNX)


def test_a_gpu_whose_libraries_are_missing_is_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])

    backend = open_backend(folder, ModelFolder.load(folder), ONLY_ONNX)

    assert backend.provider == "CPUExecutionProvider"
    assert "not cuda:" in backend.reason


@pytest.mark.parametrize(
    ("options", "cpus", "expected"),
    [
        (BackendOptions(), 1, (1, 1)),
        (BackendOptions(), 2, (1, 2)),
        (BackendOptions(), 6, (1, 6)),
        (BackendOptions(), 16, (2, 8)),
        (BackendOptions(threads=2), 8, (2, 4)),
        (BackendOptions(threads=4), 2, (4, 1)),
        (BackendOptions(streams=2), 8, (4, 2)),
        (BackendOptions(threads=3, streams=5), 2, (3, 5)),
    ],
)
def test_threads_and_streams_share_the_cpus(options: BackendOptions, cpus: int, expected: tuple[int, int]) -> None:
    assert backends._shares(options, cpus) == expected


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"engine": "tensorrt"}, "engine is 'tensorrt'"),
        ({"precision": "int4"}, "precision is 'int4'"),
        ({"threads": -1}, "threads is -1"),
        ({"engine": "onnxruntime", "precision": "bf16"}, "no bf16"),
    ],
)
def test_options_that_no_backend_can_meet_are_refused(wrong: dict[str, str | int], named: str) -> None:
    with pytest.raises(InputError, match=named):
        BackendOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [BackendOptions("openvino"), BackendOptions(precision="bf16")])
def test_openvino_is_wanted_but_nothing_proves_it_or_it_is_not_installed(
    folder: Path, tmp_path: Path, options: BackendOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    unproven = small_yolo_folder(tmp_path, golden=0)
    with pytest.raises(SettingsError, match="no golden images"):
        open_backend(tmp_path, unproven, options)

    monkeypatch.setattr(backends, "openvino_installed", lambda: False)
    with pytest.raises(SettingsError, match="not installed"):
        open_backend(folder, ModelFolder.load(folder), options)


def test_the_faster_of_two_that_pass_serves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(source: openers.Source) -> openers.Backend:
        return replace(openers.whole(source), engine="other", reason="a test's")

    monkeypatch.setattr(backends, "openvino_installed", lambda: True)
    monkeypatch.setattr(backends, "openvino_bf16", other)
    for rates in ([10.0, 20.0], [20.0, 10.0]):
        rest = iter(rates)
        monkeypatch.setattr(backends, "_rate", lambda *_, rest=rest: next(rest))
        backend = open_backend(folder, ModelFolder.load(folder), BackendOptions())

        assert backend.engine == ("other" if rates[1] > rates[0] else "onnxruntime")
        assert "onnxruntime fp32 " in backend.reason and "other fp32 " in backend.reason


@needs_openvino
def test_openvino_tells_nobody_that_it_is_used(folder: Path) -> None:
    """Its telemetry sends from a process that it forks when it is imported."""
    script = f"""
import sys
from pathlib import Path
from haechi.components.shared.model_folder import ModelFolder
from haechi.serving.backends import BackendOptions, open_backend
asked = []
sys.addaudithook(lambda event, values: asked.append(event) if event in ("os.fork", "socket.connect") else None)
folder = Path({str(folder)!r})
print(open_backend(folder, ModelFolder.load(folder), BackendOptions("openvino", "fp32")).engine, asked)
"""
    env = {name: value for name, value in os.environ.items() if name != "CI"}  # where it is silent
    told = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert told.stdout == "openvino []\n", told


@needs_openvino
def test_openvino_serves_where_it_is_wanted(folder: Path) -> None:
    model = ModelFolder.load(folder)
    backend = open_backend(folder, model, BackendOptions("openvino", "fp32", streams=2))

    assert (backend.engine, backend.precision) == ("openvino", "fp32")
    assert backend.golden is not None and backend.golden.ok
    with ThreadPoolExecutor(2) as pool:
        images = [decode(image.data) for image in read_golden(folder)]
        found = list(pool.map(lambda image: backend.detector.detect([image], conf=0.2)[0], images))
    assert sum(map(len, found)) > 10


@needs_openvino
def test_a_lower_precision_must_leave_room_in_the_tolerance(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_ROOMY", replace(backends._ROOMY, score=0.0))

    backend = open_backend(folder, ModelFolder.load(folder), BackendOptions())

    assert (backend.engine, backend.precision) == ("onnxruntime", "fp32")
    assert "not openvino_bf16" in backend.reason


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo26n"])
def test_real_networks_come_apart_and_find_the_same_in_real_frames(name: str, realdata: Path, tmp_path: Path) -> None:
    frames = sorted((realdata / "entrance").rglob("*.jpg"))[::10]
    model = export_checkpoint(
        realdata / "weights" / f"{name}.pt",
        tmp_path / "m",
        name="coco",
        images=[realdata / "entrance"],
        golden_images=6,
    )

    backend = open_backend(tmp_path / "m", model, ONLY_ONNX)
    exact = model.detector(tmp_path / "m", threads=1)

    assert backend.reason == "boxes only where a class scores"
    agreements = []
    for frame in frames:
        pixels = decode(frame.read_bytes())
        expected, found = (item.detect([pixels], conf=0.1)[0] for item in (exact, backend.detector))
        agreements.append(compare(expected, found, 0.1, Tolerance(box_px=0.01, score=1e-4), 640))
    assert agree(agreements).ok and agree(agreements).boxes > 10

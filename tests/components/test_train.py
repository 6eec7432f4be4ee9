"""Train: candidates, coverage, exact resume, tracking, and failures that are told instead of raised."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shapes import CLASSES, draw, write_dataset

from haechi.components.shared.dataset import ManifestRow, frame_key, read_rows, write_rows
from haechi.components.shared.errors import InputError, NoDataError, StorageError, TrackingError
from haechi.components.shared.files import sha256_bytes
from haechi.components.shared.images import read_header
from haechi.components.shared.materialize import label_lines
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.components.shared.yolo import tame
from haechi.components.shared.yolo_format import label_path, read_data_yaml, read_labels, split_images
from haechi.components.train import state
from haechi.components.train.candidate import Candidate
from haechi.components.train.reporting import EpochReporter, metric_table
from haechi.components.train.state import training_key
from haechi.components.train.step import TrainResult, choose_device, train

TINY = {"name": "tiny", "model": "yolo11n", "epochs": 3, "imgsz": 64, "batch": 4, "close_mosaic": 1, "nbs": 8}


@pytest.fixture
def one_thread(settings: Settings) -> Settings:
    return replace(settings, threads=1)


@pytest.fixture
def dataset(store: Store, tmp_path: Path) -> Path:
    return write_dataset(store, tmp_path / "dataset", train=10, val=4)


def fit(
    dataset: Path, tmp_path: Path, settings: Settings, candidate: dict[str, Any] = TINY, **kwargs: Any
) -> TrainResult:
    given = {"name": "safety", "champion": "", "seed": 7, "device": "cpu", "run_id": "r1", "upload_every": 0.0} | kwargs
    paths = {"out": tmp_path / "out", "work": tmp_path / "work"} | {
        k: given.pop(k) for k in ("out", "work") if k in given
    }
    return train(dataset, candidate=candidate, settings=settings, **paths, **given)


def tensors(checkpoint: Path) -> dict[str, Any]:
    from haechi.components.shared.yolo import load_detector

    tame(1)
    return dict(load_detector(checkpoint).state_dict())


def same(left: Path, right: Path) -> bool:
    import torch

    a, b = tensors(left), tensors(right)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- candidates


def test_whole_numbers_may_arrive_as_floats() -> None:
    settled = Candidate.parse({"name": "a", "model": "yolo11n", "epochs": 3.0, "batch": 8.0, "freeze": 10.0, "lr0": 1})
    assert (settled.epochs, settled.batch, settled.options) == (3, 8, {"freeze": 10, "lr0": 1.0})
    assert isinstance(settled.epochs, int) and isinstance(settled.options["freeze"], int)
    assert Candidate.parse(settled.to_dict()) == settled


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lrO": 0.1, "zoom": 2}, "unknown keys: lrO, zoom"),
        ({"name": "../x"}, "candidate name"),
        ({"model": ""}, "names no model"),
        ({"model": 3}, "candidate key model is 3"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 2.5}, "epochs is 2.5"),
        ({"imgsz": 100}, "imgsz is 100"),
        ({"imgsz": "640"}, "imgsz is '640'"),
        ({"batch": -1}, "batch is -1"),
        ({"lr0": float("nan")}, "lr0 is nan"),
        ({"lr0": 2}, "from 0 to 1"),
        ({"mosaic": 1.5}, "mosaic is 1.5"),
        ({"cos_lr": 1}, "cos_lr is 1"),
        ({"optimizer": "LBFGS"}, "optimizer is 'LBFGS'"),
        ({"freeze": ["a"]}, "freeze is 'a'"),
    ],
)
def test_a_candidate_that_cannot_be_is_refused_by_name(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Candidate.parse(TINY | change)


def test_the_key_binds_settings_and_not_the_name() -> None:
    entry = Candidate.parse(TINY).to_dict()
    key = training_key("d", entry, 0, "")
    assert key == training_key("d", entry | {"name": "other"}, 0, "")
    changed = [training_key("e", entry, 0, ""), training_key("d", entry, 1, ""), training_key("d", entry, 0, "b")]
    changed += [training_key("d", entry, 0, "", "run-1"), training_key("d", entry, 0, "", "run-2")]
    assert len({key, *changed, training_key("d", entry | {"lr0": 0.1}, 0, "")}) == 7


def test_other_code_under_the_same_tag_finds_nothing_that_it_did_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, rooms = Candidate.parse(TINY).to_dict(), Path(state.__file__).parents[1]
    for room in ("train", "shared"):
        shutil.copytree(rooms / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    keys = [training_key("d", entry, 0, "")]
    monkeypatch.setattr(state, "__file__", str(tmp_path / "train" / "state.py"))
    for path in (None, tmp_path / "train" / "coverage.py", tmp_path / "shared" / "materialize.py"):
        if path:
            path.write_text(path.read_text().replace("return ", "return  ", 1))
        state._code.cache_clear()
        keys.append(training_key("d", entry, 0, ""))
    state._code.cache_clear()
    assert keys[0] == keys[1], "where the code lies does not count"
    assert len(set(keys)) == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"colour": "red"}, "unknown keys: colour"),
        ({"model": "yolo99n"}, "no architecture 'yolo99n'"),
        ({"model": "yolo11n.pt"}, "goes into `weights`"),
        ({"model": "champion"}, "there is none yet"),
        ({"weights": "champion"}, "there is none yet"),
        ({"weights": "yolo11n.pt"}, "nothing is downloaded"),
        ({"weights": "s3://{bucket}/none.pt"}, "does not exist"),
        ({"weights": "{tmp}/broken.pt"}, "weights-only"),
    ],
)
def test_unusable_settings_give_a_failed_result(
    change: dict[str, str], told: str, dataset: Path, tmp_path: Path, one_thread: Settings
) -> None:
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    change = {key: value.format(tmp=tmp_path, bucket=one_thread.bucket) for key, value in change.items()}
    result = fit(dataset, tmp_path, one_thread, TINY | change)
    assert result.status == "failed" and told in result.reason
    written = json.loads((tmp_path / "out" / "train.json").read_text())
    assert written == result.metadata() and written["map50_95"] is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.json"]


@pytest.mark.parametrize("device", ["7", "0,1", "mps"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(InputError, match=device):
        choose_device(device)


@pytest.mark.parametrize(("split", "told"), [("train", "no box in train"), ("val", "no frame in val")])
def test_a_dataset_without_a_split_is_an_error(split: str, told: str, dataset: Path, tmp_path: Path) -> None:
    rows = [row for row in read_rows(dataset / "manifest.parquet", ManifestRow) if row.split != split]
    write_rows(dataset / "manifest.parquet", ManifestRow, rows)
    with pytest.raises(NoDataError, match=told):
        fit(dataset, tmp_path, Settings())


# ---- training


def test_a_training_writes_its_checkpoint_and_is_not_run_twice(
    dataset: Path, tmp_path: Path, one_thread: Settings, store: Store
) -> None:
    result = fit(dataset, tmp_path, one_thread, TINY | {"epochs": 2})
    assert (result.status, result.epochs_run, result.classes, result.imgsz) == ("ok", 2, CLASSES, 64)
    assert result.map50_95 is not None and 0 <= result.map50_95 <= 1
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "results.csv", "train.json"]
    assert len((out / "results.csv").read_text().splitlines()) == 3
    # What the state was needed for is over; what a second call needs is there.
    prefix = "state/train/"
    kept = sorted(item.key.rsplit("/", 1)[1] for item in store.list(prefix))
    assert kept == ["checkpoint.pt", "result.json", "results.csv"]
    began = time.monotonic()
    again = fit(
        dataset, tmp_path, one_thread, TINY | {"epochs": 2, "name": "twin"}, out=tmp_path / "o2", work=tmp_path / "w2"
    )
    assert time.monotonic() - began < 10 and again == replace(result, name="twin", candidate=again.candidate)
    assert (tmp_path / "o2" / "checkpoint.pt").read_bytes() == (out / "checkpoint.pt").read_bytes()
    assert str(tmp_path).encode() not in (out / "checkpoint.pt").read_bytes()

    # A warm start with the classes in another order moves the heads' rows by name: nothing is learnt at rate 0.
    turned = write_dataset(store, tmp_path / "turned", 10, 4, classes=CLASSES[::-1])
    still = {"weights": str(out / "checkpoint.pt"), "epochs": 1, "lr0": 0, "optimizer": "SGD", "warmup_bias_lr": 0}
    fit(turned, tmp_path, one_thread, TINY | still, out=tmp_path / "o3", work=tmp_path / "w3")
    before, after = tensors(out / "checkpoint.pt"), tensors(tmp_path / "o3" / "checkpoint.pt")
    rows = [entry["model.23.cv3.0.2.weight"].flatten(1) for entry in (before, after)]
    assert rows[1].flip(0).tolist() == rows[0].tolist() != rows[1].tolist()


def test_a_training_that_is_made_anew_reads_its_frames_from_the_cache_and_belongs_to_its_run(
    dataset: Path, tmp_path: Path, one_thread: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, get = list[str](), Store.get

    def counted(store: Store, key: str, limit: int | None = None) -> bytes:
        read.append(key)
        return get(store, key, limit)

    monkeypatch.setattr(Store, "get", counted)
    cached = replace(one_thread, cache_dir=str(tmp_path / "cache"))

    def frames_and_trainings(**how: Any) -> tuple[int, int]:
        """Frames read from the store by one more pod with an empty disk, and trainings that the bucket knows then."""
        read.clear()
        pod = tmp_path / str(uuid.uuid4())
        assert fit(dataset, pod, cached, TINY | {"epochs": 1}, **how).status == "ok"
        kept = {item.key.split("/")[2] for item in store.list("state/train/")}
        return sum(key.startswith("frames/") for key in read), len(kept)

    assert frames_and_trainings() == (14, 1)
    assert frames_and_trainings(run_id="r2", retrain=True) == (0, 2)
    assert frames_and_trainings(run_id="r2", retrain=True) == (0, 2), "a retried pod of that run finds it"
    assert frames_and_trainings(run_id="r3") == (0, 2), "and others find what was trained for all"


CHILD = """
import json, sys
from pathlib import Path
from haechi.components.shared.settings import Settings
from haechi.components.train.step import train
spec = json.loads(sys.argv[1])
train(Path(spec["dataset"]), "safety", spec["candidate"], "", 7, "cpu", "r1", Path(spec["out"]), Path(spec["work"]),
      Settings.from_env(), upload_every=0.0)
"""


def start(
    dataset: Path, home: Path, settings: Settings, candidate: dict[str, Any], before: str = ""
) -> subprocess.Popen[str]:
    spec = {"dataset": str(dataset), "candidate": candidate, "out": str(home / "out"), "work": str(home / "work")}
    home.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, **settings.to_env(), "HOME": str(home / "user"), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "3"}
    code = textwrap.dedent(before) + CHILD
    return subprocess.Popen([sys.executable, "-c", code, json.dumps(spec)], env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("model", "lost"), [("yolo11n", False), ("yolo26n", True)])
def test_killed_in_the_second_epoch_and_run_again_is_as_never_killed(
    model: str, lost: bool, dataset: Path, tmp_path: Path, one_thread: Settings, store: Store
) -> None:
    candidate = TINY | {"model": model}
    child = start(dataset, tmp_path / "child", one_thread, candidate)
    assert child.stderr is not None
    for line in child.stderr:
        if "epoch 1/3" in line:
            time.sleep(0.3)
            break
    child.kill()
    rest, _ = child.communicate()[1], child.wait()
    assert "epoch 3/3" not in rest and not (tmp_path / "child" / "out").exists()
    assert not list((tmp_path / "child").glob("user/**/*ltralytics*")), "the user's settings are left alone"
    # A spot pod loses its disk: the state then comes from the object store.
    work = tmp_path / "elsewhere" if lost else tmp_path / "child" / "work"
    resumed = fit(dataset, tmp_path, one_thread, candidate, work=work)
    assert resumed.epochs_run == 3 and len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 4

    other = replace(one_thread, bucket=one_thread.bucket + "-b")
    Store(other).ensure_bucket()
    write_dataset(Store(other), tmp_path / "copy", train=10, val=4)
    whole = fit(tmp_path / "copy", tmp_path, other, candidate, out=tmp_path / "out2", work=tmp_path / "work2")
    assert same(tmp_path / "out" / "checkpoint.pt", tmp_path / "out2" / "checkpoint.pt")
    assert (whole.map50_95, whole.map50) == (resumed.map50_95, resumed.map50)


def test_too_little_memory_is_told_with_a_remedy(dataset: Path, tmp_path: Path, one_thread: Settings) -> None:
    limit = """
    import resource, torch
    from haechi.components.shared.yolo import tame
    tame(1)
    import haechi.components.train.trainer, torch._inductor
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2500 * 2**20,) * 2)
    """
    child = start(dataset, tmp_path / "child", one_thread, TINY | {"imgsz": 2560, "batch": 10}, limit)
    _, told = child.communicate(timeout=300)
    assert child.returncode == 0, told
    written = json.loads((tmp_path / "child" / "out" / "train.json").read_text())
    assert written["status"] == "failed" and "out of memory at batch 10, imgsz 2560" in written["reason"]
    assert "smaller batch" in written["reason"]


def test_a_loss_that_becomes_nan_fails_the_candidate(dataset: Path, tmp_path: Path, one_thread: Settings) -> None:
    wild = {"box": 1e39, "epochs": 2, "name": "wild"}
    result = fit(dataset, tmp_path, one_thread, TINY | wild)
    assert result.status == "failed" and "NaN" in result.reason and "smaller lr0" in result.reason
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("'freeze=99' froze the entire model with no trainable parameters left."), "freeze"),
        (RuntimeError("shape mismatch"), "stopped with RuntimeError: shape mismatch"),
        (KeyError("names"), "stopped with KeyError: 'names'"),
        (StorageError("cannot reach the object store"), None),
        (OSError("no space left on device"), None),
    ],
)
def test_what_is_the_candidates_fault_is_told_from_what_is_the_stores_or_the_disks(
    error: Exception, told: str | None
) -> None:
    tame(1)
    from haechi.components.train.trainer import explain

    found = explain(error, 16, 640)
    assert found is None if told is None else found is not None and told in found.problem


# ---- coverage


@pytest.fixture
def partial_data(tmp_path: Path) -> dict[str, Any]:
    """Twelve pictures on disk; even ones speak of smoke and fire, odd ones of person_down."""
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train").mkdir(parents=True)
    covers = {}
    for index in range(12):
        data, boxes = draw(index)
        known = CLASSES[:2] if index % 2 == 0 else CLASSES[2:]
        (tmp_path / "images" / "train" / f"{index:02}.jpg").write_bytes(data)
        row = ManifestRow("0" * 64, "jpg", 128, 96, "", "", boxes=tuple(boxes))
        lines = label_lines(row, [name if name in known else "" for name in CLASSES])
        (tmp_path / "labels" / "train" / f"{index:02}.txt").write_bytes(lines)
        covers[f"images/train/{index:02}.jpg"] = list(known)
    (tmp_path / "covers.json").write_text(json.dumps(covers))
    return {"path": tmp_path, "names": dict(enumerate(CLASSES)), "nc": 3, "channels": 3}


def open_dataset(data: dict[str, Any], cache: str | None) -> Any:
    tame(1)
    from ultralytics.cfg import get_cfg

    from haechi.components.train.coverage import CoverageDataset, read_covers

    return CoverageDataset(
        covers=read_covers(data["path"] / "covers.json", CLASSES),
        img_path=str(data["path"] / "images" / "train"),
        imgsz=64,
        batch_size=1,
        augment=True,
        hyp=get_cfg(overrides={"mosaic": 1.0, "mixup": 0.5, "deterministic": False}),
        cache=cache,
        data=data,
    )


def test_mixtures_stay_within_one_coverage(partial_data: dict[str, Any]) -> None:
    dataset = open_dataset(partial_data, "ram")
    assert dataset.partial
    random.seed(0)
    dataset.begin_epoch()
    for index in range(12):
        sample = dataset[index]
        known = [True, True, False] if index % 2 == 0 else [False, False, True]
        assert sample["covers"].tolist() == known
        assert all(known[int(number)] for number in sample["cls"].flatten())


def test_an_epoch_depends_on_its_seed_and_not_on_what_was_read_before(partial_data: dict[str, Any]) -> None:
    def epoch(dataset: Any) -> list[float]:
        random.seed(3)
        np.random.seed(3)
        dataset.begin_epoch()
        return [float(dataset[index]["img"].float().mean()) for index in (4, 1, 0)]

    fresh, used, cached = (
        open_dataset(partial_data, None),
        open_dataset(partial_data, None),
        open_dataset(partial_data, "ram"),
    )
    for index in (9, 8, 3, 2):
        used[index]
    assert epoch(fresh) == epoch(used) == epoch(cached)


def test_the_loss_is_silent_on_what_a_label_does_not_cover() -> None:
    tame(1)
    import torch
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    from haechi.components.train.coverage import coverage_criterion

    for name in ("yolo11n.yaml", "yolo26n.yaml"):
        torch.manual_seed(0)
        model = DetectionModel(name, nc=3, verbose=False).train()
        model.args = get_cfg()
        model.criterion = coverage_criterion(model)

        def loss(covers: list[bool], boxes: int, model: Any = model) -> float:
            batch = {
                "img": torch.full((1, 3, 64, 64), 0.5),
                "cls": torch.zeros(boxes, 1),
                "bboxes": torch.full((boxes, 4), 0.5),
                "batch_idx": torch.zeros(boxes),
                "covers": (torch.tensor(covers),),
            }
            return float(model.loss(batch)[1]["cls_loss"])

        assert loss([False] * 3, boxes=0) == 0
        one, all_three = loss([True, False, False], boxes=0), loss([True] * 3, boxes=0)
        assert 0 < one < all_three
        # A box is a fact, even where the label's coverage forgot its class.
        assert loss([False] * 3, boxes=1) > 0


def test_validation_drops_predictions_of_uncovered_classes() -> None:
    tame(1)
    import torch
    from ultralytics.cfg import get_cfg

    from haechi.components.train.coverage import CoverageValidator

    validator = CoverageValidator(args=get_cfg(overrides={"plots": False, "save_dir": "unused"}), save_dir=Path("/tmp"))
    validator.seen, validator.device, validator.is_custom_json, validator.build_gdict = (
        0,
        torch.device("cpu"),
        False,
        False,
    )
    box = torch.tensor([[8.0, 8.0, 24.0, 24.0]])
    pred = {
        "bboxes": box.repeat(3, 1),
        "conf": torch.tensor([0.9, 0.8, 0.7]),
        "cls": torch.tensor([0.0, 1.0, 2.0]),
        "extra": torch.zeros(3, 0),
    }
    batch = {
        "img": torch.zeros(1, 3, 64, 64),
        "cls": torch.tensor([[1.0]]),
        "bboxes": torch.tensor([[0.25, 0.25, 0.25, 0.25]]),
        "batch_idx": torch.zeros(1),
        "ori_shape": [(64, 64)],
        "ratio_pad": [((1.0, 1.0), (0.0, 0.0))],
        "im_file": ["a.jpg"],
        "covers": (torch.tensor([False, True, False]),),
    }
    validator.update_metrics([pred], batch)
    assert validator.metrics.stats["pred_cls"][0].tolist() == [1.0]
    assert validator.metrics.stats["tp"][0].all()


def test_partial_labels_train_and_resume(store: Store, tmp_path: Path, one_thread: Settings) -> None:
    data = write_dataset(store, tmp_path / "d", 10, 4, covers=lambda i: CLASSES[:2] if i % 2 else CLASSES[2:])
    result = fit(data, tmp_path, one_thread, TINY | {"model": "yolo26n", "epochs": 1})
    assert result.status == "ok" and not result.reason


def test_val_without_a_box_gives_zero_and_a_note(store: Store, tmp_path: Path, one_thread: Settings) -> None:
    data = write_dataset(store, tmp_path / "d", 8, 2)
    rows = [
        replace(row, boxes=() if row.split == "val" else row.boxes)
        for row in read_rows(data / "manifest.parquet", ManifestRow)
    ]
    write_rows(data / "manifest.parquet", ManifestRow, rows)
    result = fit(data, tmp_path, one_thread, TINY | {"epochs": 1})
    assert (result.status, result.map50_95) == ("ok", 0.0) and "val holds no box" in result.reason


@pytest.mark.realdata
def test_real_weights_start_warm_and_stop_early(
    realdata: Path, store: Store, tmp_path: Path, one_thread: Settings
) -> None:
    data = read_data_yaml(realdata / "entrance" / "data.yaml")
    images = sorted(split_images(data, next(iter(data.splits))), key=lambda path: path.name)[:24]
    rows = []
    for index, path in enumerate(images):
        content = path.read_bytes()
        header, sha256 = read_header(content), sha256_bytes(content)
        boxes = tuple(read_labels(label_path(path), data.names, header.width, header.height))
        store.put_if_absent(frame_key(sha256, "jpg"), content)
        size = {"width": header.width, "height": header.height}
        rows.append(
            ManifestRow(sha256, "jpg", **size, key=str(path), source="e", boxes=boxes, covers=data.names,
                        split="val" if index % 2 else "train", group=str(index))
        )  # fmt: skip
    (tmp_path / "d").mkdir()
    write_rows(tmp_path / "d" / "manifest.parquet", ManifestRow, rows)
    (tmp_path / "d" / "data.yaml").write_text(json.dumps({"names": list(data.names)}))
    still = {"lr0": 0, "warmup_bias_lr": 0, "optimizer": "SGD", "epochs": 5, "patience": 1, "imgsz": 320}
    weights = (realdata / "weights" / "yolo11n.pt").as_uri()
    result = fit(tmp_path / "d", tmp_path, one_thread, TINY | still | {"weights": weights})
    # COCO knows these classes by name, so the network finds them without learning, and then cannot get better.
    assert result.status == "ok" and result.map50_95 is not None and result.map50_95 > 0.1
    assert result.epochs_run < 5


# ---- tracking


def test_epochs_arrive_in_mlflow(dataset: Path, tmp_path: Path, one_thread: Settings, mlflow_uri: str) -> None:
    from mlflow import MlflowClient

    result = fit(dataset, tmp_path, replace(one_thread, mlflow_tracking_uri=mlflow_uri), TINY | {"epochs": 2})
    client = MlflowClient(tracking_uri=mlflow_uri)
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED" and run.data.params["epochs"] == "2"
    assert run.data.tags["haechi.run"] == "r1"
    steps = [item.step for item in client.get_metric_history(result.run_id, "val/mAP50-95")]
    assert steps == [1, 2, 3] and {"train/box_loss", "lr", "val/mAP50"} <= run.data.metrics.keys()
    assert run.data.metrics["val/mAP50-95"] == result.map50_95


def test_tracking_that_is_away_stops_a_start_but_not_a_training(
    dataset: Path, tmp_path: Path, one_thread: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    away = replace(one_thread, mlflow_tracking_uri="http://127.0.0.1:9")
    with pytest.raises(TrackingError):
        fit(dataset, tmp_path, away)
    reporter = EpochReporter(away, "some-run")
    reporter.log({"val/mAP50": 0.5}, 1)
    reporter.log({"val/mAP50": 0.6}, 2)
    assert capfd.readouterr().err.count("the training goes on") == 1


def test_metrics_have_our_names() -> None:
    found = metric_table({"metrics/mAP50-95(B)": 0.5, "train/box_loss": 1, "lr/pg0": 0.1, "lr/pg1": 0.2})
    assert found == {"val/mAP50-95": 0.5, "train/box_loss": 1.0, "lr": 0.1}

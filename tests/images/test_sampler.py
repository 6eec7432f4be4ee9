"""The sampler in the real process with a real store: what is kept, what it says, and a store that goes away."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from haechi.components.ingest.step import ingest
from haechi.components.shared.detections import Detections
from haechi.components.shared.errors import SettingsError
from haechi.components.shared.files import sha256_bytes, sha256_file
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.serving.inference import Parameters, Prediction
from haechi.serving.sample_counts import Counts, Row
from haechi.serving.sample_record import Origin, Sample
from haechi.serving.sample_writer import MAX_ITEMS, SampleWriter
from haechi.serving.sampler import OTHERS, UNNAMED, Sampler, camera_folder, open_sampler
from haechi.serving.sampling import Decision, Design
from haechi.serving.settings import ServingSettings
from tests.ingest_world import frames_of, jpeg
from tests.serving_process import Running, free_port, running
from tests.tiny_models import paint, shade

# Seconds that the store is away under load; HAECHI_AWAY_SECONDS=60 is what a release wants.
AWAY = float(os.environ.get("HAECHI_AWAY_SECONDS", "4"))

SCENE = paint({(2, 3): shade(0, 0.9), (5, 5): shade(1, 0.6)})
EMPTY = paint({})
PATTERN = "dt={date}/{camera}/{time}-{ms}-{_}"


def keeping(settings: Settings, **serving: object) -> dict[str, str]:
    """Environment of a runtime that keeps every image of any camera, unless told otherwise."""
    chosen = {"sample_share": 1, "sample_hourly": 0} | serving
    return settings.to_env() | {f"HAECHI_SERVING_{name.upper()}": str(value) for name, value in chosen.items()}


def ask(server: Running, *images: bytes, **headers: str) -> httpx.Response:
    body = {"instances": [{"image": {"b64": base64.b64encode(image).decode()}} for image in images]}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{server.url}/v1/models/tiny:predict", json=body, headers=names, timeout=30)


def records(store: Store, service: str = "tiny") -> dict[str, dict[str, Any]]:
    keys = [item.key for item in store.list(f"predictions/{service}/") if item.key.endswith(".json")]
    return {key: store.get_json(key) for key in sorted(keys) if "/_counts/" not in key}


def counts(store: Store, service: str = "tiny") -> Counter[str]:
    total: Counter[str] = Counter()
    for item in store.list(f"predictions/{service}/"):
        if "/_counts/" in item.key:
            for row in store.get_json(item.key)["rows"]:
                total.update({name: value for name, value in row.items() if isinstance(value, int)})
    return total


def test_every_image_is_kept_as_it_came_with_what_was_said_of_it(folder: Path, store: Store) -> None:
    begun = datetime.now(UTC).replace(microsecond=0)
    with running(folder, env=keeping(store.settings)) as server:
        two = ask(server, SCENE, EMPTY, x_haechi_camera="door-1", x_request_id="r1").json()["predictions"]
        one = ask(server, SCENE).json()["predictions"]
        assert ask(server, b"no image").status_code == 400
        assert ask(server, SCENE, x_haechi_camera="door-1", x_haechi_sample="never").status_code == 200
    found = list(records(store).values())
    assert counts(store) == {"seen": 3, "opted_out": 1, "kept": 3, "stored": 3}
    assert len(list(store.list("predictions/tiny/"))) == 3 * 2 + 1 + (len({r["time"][:13] for r in found}) > 1)

    first, second, third = sorted(found, key=lambda record: record["time"] + str(record["place"]))
    for record, image, answer in zip((first, second, third), (SCENE, EMPTY, SCENE), [*two, *one], strict=True):
        assert store.get(record["image"]["key"]) == image
        assert record["image"]["sha256"] == sha256_bytes(image)
        assert (record["image"]["format"], record["image"]["bytes"]) == ("PNG", len(image))
        assert (record["image"]["width"], record["image"]["height"]) == (320, 320)
        assert record["detections"] == answer["detections"]
        assert record["model"]["onnx_sha256"] == sha256_file(folder / "model.onnx")
        assert record["model"]["version"] == server.version
        assert begun <= datetime.fromisoformat(record["time"]) <= datetime.now(UTC)
        assert (record["probability"], record["probability_random"]) == (1.0, 1.0)
        assert "random" in record["reasons"]
    assert [len(record["detections"]) for record in (first, second, third)] == [2, 0, 2]
    assert [record["camera_folder"] for record in (first, second, third)] == ["door-1", "door-1", UNNAMED]
    assert [record["request_id"] for record in (first, second)] == ["r1", "r1"]
    assert [(record["place"], record["images"]) for record in (first, second)] == [(0, 2), (1, 2)]
    assert first["parameters"] == {"conf": None, "iou": None, "max_det": 300, "classes": []}


def test_the_share_holds_for_frames_with_and_without_detections(folder: Path, store: Store) -> None:
    with running(folder, env=keeping(store.settings, sample_share=0.3, sample_service="front")) as server:
        for _ in range(20):
            assert ask(server, *[paint({}, 64, 64)] * 16, *[paint({(0, 0): shade(0)}, 64, 64)] * 16).is_success
    found = list(records(store, "front").values())
    total = counts(store, "front")
    assert total == {"seen": 640, "kept": len(found), "stored": len(found)}
    empty = sum(not record["detections"] for record in found)
    # Five standard deviations of a binomial of 320.
    assert 55 < empty < 137 and 55 < len(found) - empty < 137
    assert {record["probability"] for record in found} == {0.3}


def test_uncertain_images_are_kept_more_often_and_say_how_much(folder: Path, store: Store) -> None:
    sure, doubtful = paint({(0, 0): shade(0, 0.9)}, 64, 64), paint({(0, 0): shade(0, 0.55)}, 64, 64)
    with running(folder, env=keeping(store.settings, sample_share=0.1, sample_uncertain=1)) as server:
        for _ in range(10):
            assert ask(server, *[sure] * 20, *[doubtful] * 20).is_success
    found = [(record["detections"][0]["score"] < 0.7, record) for record in records(store).values()]
    assert sum(uncertain for uncertain, _ in found) == 200
    assert all("uncertain" in record["reasons"] and record["probability"] == 1 for is_so, record in found if is_so)
    assert all(record["probability"] == 0.1 for is_so, record in found if not is_so)
    assert 0 < len(found) - 200 < 42


def test_a_quota_thins_a_busy_camera_and_leaves_the_others_alone(folder: Path, store: Store) -> None:
    with running(folder, env=keeping(store.settings, sample_hourly=20)) as server:
        for _ in range(10):
            assert ask(server, *[EMPTY] * 40, x_haechi_camera="busy").is_success
        assert ask(server, EMPTY, EMPTY, x_haechi_camera="calm").is_success
    by_camera = Counter(record["camera"] for record in records(store).values())
    assert by_camera["calm"] == 2 and 3 <= by_camera["busy"] <= 20
    total = counts(store)
    assert total["seen"] == 402 and total["dropped_quota"] == 402 - total["kept"]
    chances = [r["probability"] for r in records(store).values() if r["camera"] == "busy"]
    assert 0 < min(chances) < 0.2


def test_samples_are_a_source_of_ingest(folder: Path, store: Store, tmp_path: Path) -> None:
    images = [jpeg(seed) for seed in range(3)]
    with running(folder, env=keeping(store.settings)) as server:
        for number, image in enumerate(images):
            assert ask(server, image, x_haechi_camera=f"cam-{number % 2}").is_success
    before = {item.key: item.etag for item in store.list("predictions/")}
    source = {"uri": f"s3://{store.bucket}/predictions/tiny", "pattern": PATTERN}
    result = ingest([source], [], ["person", "dog"], {}, "run-1", tmp_path / "out", store.settings)
    assert (result.seen, result.accepted, result.quarantined) == (3, 3, 0)
    told = {record["image"]["sha256"]: record for record in records(store).values()}
    assert set(told) == {sha256_bytes(image) for image in images}
    for frame in frames_of(tmp_path / "out"):
        assert frame.camera == told[frame.sha256]["camera"]
        assert frame.captured_at == datetime.fromisoformat(told[frame.sha256]["time"])
    assert {item.key: item.etag for item in store.list("predictions/")} == before


class Gate:
    """A door before the store: open, shut (connections are refused) or mute (taken, and never answered)."""

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self._target = (parts.hostname, parts.port)
        self.port = free_port()
        self.puts = 0
        self.mute_after: float = float("inf")
        self._connections: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self.open()

    def open(self) -> None:
        self.shut()
        self.mute_after = float("inf")
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def mute(self, after: int = 0) -> None:
        """Let so many more writes through, and then nothing."""
        self.mute_after = self.puts + after

    def shut(self) -> None:
        with self._lock:
            listener, connections = self._listener, self._connections
            self._listener, self._connections = None, []
        for each in [listener, *connections] if listener else []:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self._target)
                with self._lock:
                    if self._listener is not listener:  # shut meanwhile
                        client.close()
                        return server.close()
                    self._connections += [client, server]
                for pair in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                self.puts += upwards and data.startswith(b"PUT ")
                if self.puts <= self.mute_after:
                    sink.sendall(data)


@pytest.fixture
def gate(store: Store) -> Iterator[Gate]:
    gate = Gate(store.endpoint)
    yield gate
    gate.shut()


def through(gate: Gate, store: Store) -> Settings:
    return replace(store.settings, s3_endpoint=f"http://127.0.0.1:{gate.port}")


def load(servers: Sequence[Running], seconds: float) -> list[list[float]]:
    """Seconds of each answer by server, which are asked in turns; each has to be good."""
    times: list[list[float]] = [[] for _ in servers]
    end = time.monotonic() + seconds
    with httpx.Client(headers={"content-type": "image/png"}) as client:
        while time.monotonic() < end:
            for server, told in zip(servers, times, strict=True):
                begun = time.perf_counter()
                answer = client.post(f"{server.url}/v1/models/tiny:predict", content=SCENE)
                told.append(time.perf_counter() - begun)
                assert answer.status_code == 200, answer.text
    return times


def test_a_store_that_is_away_costs_samples_and_no_request(folder: Path, store: Store, gate: Gate) -> None:
    # Beside one that keeps nothing, not against other times: the machine may be busier now than it was.
    with running(folder, env=keeping(through(gate, store))) as server, running(folder) as other:
        near = load([server, other], 1)
        gate.shut()
        away = load([server, other], AWAY)
        for _ in range(5):  # 320 images: more than may wait, however slow the machine is
            assert ask(server, *[EMPTY] * 64).is_success
        gate.open()
        gate.mute()
        mute = load([server, other], 3)
        gate.open()
        before = len(records(store))
        until = time.monotonic() + 25
        while len(records(store)) <= before and time.monotonic() < until:
            time.sleep(0.2)
        assert len(records(store)) > before, "it never wrote again"
    total = counts(store)
    assert total["seen"] == total["kept"] == len(near[0]) + len(away[0]) + len(mute[0]) + 320
    # A write whose answer was lost on the way counts as dropped, though it arrived.
    assert total["stored"] <= len(records(store)) <= total["stored"] + total["dropped_store"]
    dropped = {name: value for name, value in total.items() if name.startswith("dropped_")}
    assert total["kept"] == total["stored"] + sum(dropped.values())
    assert dropped["dropped_queue"] > 0
    for times, others in (away, mute):
        assert statistics.median(times) < 3 * statistics.median(others)


def test_a_kill_leaves_no_record_without_its_image(folder: Path, store: Store, gate: Gate) -> None:
    with running(folder, env=keeping(through(gate, store))) as server:
        gate.mute(after=7)  # three samples, and of the fourth what is written first
        assert ask(server, *[SCENE] * 8).is_success
        until = time.monotonic() + 20
        while gate.puts <= 7 and time.monotonic() < until:
            time.sleep(0.05)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    found = records(store)
    keys = {item.key for item in store.list("predictions/")}
    assert len(found) == 3 and len(keys) == 7
    assert all(record["image"]["key"] in keys for record in found.values())


@pytest.mark.parametrize("state", ["open", "shut", "mute"])
def test_the_end_writes_what_waits_but_not_for_long(folder: Path, store: Store, gate: Gate, state: str) -> None:
    with running(folder, env=keeping(through(gate, store))) as server:
        assert ask(server, EMPTY).is_success
        getattr(gate, state)()
        for _ in range(5):
            assert ask(server, *[EMPTY] * 8).is_success
        begun = time.monotonic()
        server.process.terminate()
        _, log = server.process.communicate(timeout=30)
        assert server.process.returncode == 0, log
        assert time.monotonic() - begun < 20  # a store that hangs is given up after minutes only
    if state == "open":
        assert counts(store) == {"seen": 41, "kept": 41, "stored": 41}


ORIGIN_ROW = Row("tiny", 500_000, "door", "tiny", "0123456789ab")


def sample_of(image: Any, model: ModelFolder, held: int = 1000) -> Sample:
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, dtype=np.int64))
    moment = datetime(2026, 10, 12, 10, 15, 2, 123_000, UTC)
    origin = Origin(ORIGIN_ROW, model, Parameters(), Design(1, 0, 0), moment, "r", "v2", "door", 1)
    return Sample(origin, 0, image, held, Prediction(nothing, 4, 2), Decision(("random",), 1.0, 0.0, 1.0), 1)


def test_tensors_are_kept_without_loss(folder: Path, store: Store) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 4, 3), dtype=np.uint8)
    planes = pixels.transpose(2, 0, 1).astype(np.float32) / 255
    writer = SampleWriter(store, Counts())
    model = ModelFolder.load(folder)
    for image in (pixels, planes):
        writer.offer(sample_of(image, model))
    writer.close()
    found = list(records(store).values())
    assert [record["image"]["came_as"] for record in found] == ["uint8", "float32"]
    for record in found:
        assert record["image"]["key"].startswith("predictions/tiny/dt=2026-10-12/door/101502-123-")
        kept = np.asarray(Image.open(io.BytesIO(store.get(record["image"]["key"]))))
        assert (kept == pixels).all()


def test_what_waits_is_bounded_in_number_and_bytes(folder: Path, settings: Settings) -> None:
    model = ModelFolder.load(folder)
    nowhere = Store(replace(settings, s3_endpoint=f"http://127.0.0.1:{free_port()}"))
    for held, room in ((1, MAX_ITEMS), (8 * 2**20, 4)):
        told: Counter[tuple[str, str]] = Counter()
        tally = Counts(lambda model, outcome, told=told: told.update([(model, outcome)]))
        writer = SampleWriter(nowhere, tally, backoff=60)
        for _ in range(MAX_ITEMS + 50):
            writer.offer(sample_of(EMPTY, model, held))
        # One is in the thread's hands; it counts for the bytes, and not for the number.
        assert told["tiny", "dropped_queue"] in (MAX_ITEMS + 50 - room, MAX_ITEMS + 49 - room)
        writer.close(0)
        assert sum(told.values()) == MAX_ITEMS + 50


def test_one_image_that_cannot_be_written_does_not_end_the_others(folder: Path, store: Store) -> None:
    writer = SampleWriter(store, Counts())
    model = ModelFolder.load(folder)
    for image in (b"no image", EMPTY):
        writer.offer(sample_of(image, model))
    writer.close()
    assert counts(store) == {"kept": 2, "stored": 1, "dropped_error": 1}


def test_counts_that_could_not_be_written_are_written_once_later(folder: Path, store: Store, gate: Gate) -> None:
    writer = SampleWriter(Store(through(gate, store)), Counts(), backoff=0.02, longest=0.02, every=0.1)
    writer.counts.add(ORIGIN_ROW, "seen", 3)
    gate.shut()
    time.sleep(1)
    writer.counts.add(ORIGIN_ROW, "seen", 4)
    time.sleep(1)
    assert counts(store) == {}
    gate.open()
    writer.close()
    assert counts(store) == {"seen": 7}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", UNNAMED),
        ("door-1", "door-1"),
        ("Cam_02.left", "Cam_02.left"),
        ("Door Cam #1", "Door-Cam-1-"),
        ("../../etc", "etc-"),
        ("a/b", "a-b-"),
        ("현관", ""),
        (".hidden", "hidden-"),
        ("_others", "others-"),
        ("x" * 500, "x" * 48 + "-"),
    ],
)
def test_camera_names_are_safe_in_keys_and_stay_apart(name: str, expected: str) -> None:
    made = camera_folder(name)
    assert made == expected or (made.startswith(expected) and len(made) == len(expected) + 8)
    assert "/" not in made and not made.startswith(".") and len(made) <= 64
    assert camera_folder(name + "!") != made


def test_more_cameras_than_anybody_has_share_one_folder(folder: Path, store: Store) -> None:
    sampler = Sampler(Design(1, 0, 60), SampleWriter(store, Counts()))
    cameras = [sampler._quota("tiny", f"cam-{number}", 0.0)[0] for number in range(300)]
    assert cameras == [f"cam-{number}" for number in range(256)] + [OTHERS] * 44
    assert sampler._quota("tiny", "cam-7", 0.0)[0] == "cam-7"
    # Those who were silent long enough make room.
    assert sampler._quota("tiny", "cam-299", 7200.0)[0] == "cam-299"
    sampler.close()


def test_sampling_is_off_by_default_and_loads_no_s3_client() -> None:
    assert open_sampler(ServingSettings()) is None
    check = "import sys, haechi.serving.serve; print('minio' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("chosen", "match"),
    [({}, "HAECHI_S3_ENDPOINT is not set"), ({"sample_service": "Front Door"}, "SAMPLE_SERVICE: name is 'Front Door'")],
)
def test_samples_without_a_place_to_put_them_are_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, Any], match: str
) -> None:
    monkeypatch.delenv("HAECHI_S3_ENDPOINT", raising=False)
    with pytest.raises(SettingsError, match=match):
        open_sampler(ServingSettings(sample_share=0.1, **chosen))


def test_records_are_plain_json_without_pixels(folder: Path, store: Store) -> None:
    writer = SampleWriter(store, Counts())
    writer.offer(sample_of(EMPTY, ModelFolder.load(folder)))
    writer.close()
    [(key, record)] = records(store).items()
    assert record["image"]["key"] == key.removesuffix(".json") + ".png"
    assert len(store.get(key)) < 2000 and json.loads(store.get(key)) == record

"""Metrics: what `/metrics` of a real process says, and that neither callers nor swaps make it grow."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families as families

from haechi.components.shared.detections import Detections
from haechi.components.shared.errors import AccessError, InputError
from haechi.serving.app import create_app
from haechi.serving.engine import Models
from haechi.serving.gpu import GpuCollector
from haechi.serving.inference import InferenceRequest, Prediction
from haechi.serving.metrics import Metrics
from haechi.serving.pool import Pool
from haechi.serving.service import Call, Role, Service
from tests.serving_process import Running, running
from tests.tiny_models import paint, shade, tiny_model_folder

SCENE = paint({(2, 3): shade(0, 0.9), (5, 5): shade(1, 0.6), (7, 7): shade(0, 0.8)})
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    tiny_model_folder(folder, ["person", "dog", "car"])
    with running(folder) as process:
        yield process


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Values by name and label values, labels in the order of their names."""
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in families(text)
        for sample in family.samples
    }


def scrape(server: Running) -> dict[tuple[str, ...], float]:
    return samples(httpx.get(f"{server.url}/metrics").text)


def predict(server: Running, content: bytes = SCENE, model: str = "tiny") -> httpx.Response:
    return httpx.post(f"{server.url}/v1/models/{model}:predict", content=content)


def fake_engine(version: str, classes: Sequence[str]) -> Any:
    backend = SimpleNamespace(engine="onnxruntime", precision="fp32")
    return SimpleNamespace(model=SimpleNamespace(version=version, classes=list(classes)), backend=backend)


def detections(scores: Sequence[float], ids: Sequence[int]) -> Prediction:
    boxes = np.zeros((len(scores), 4), np.float32)
    return Prediction(Detections(boxes, np.array(scores, np.float32), np.array(ids, np.int64)), 640, 480)


def answered(engine: Any, *predictions: Prediction) -> Call:
    call = Call("v2", "/v2/models/m/infer", "POST", model="m", engine=engine, status=200)
    call.request = InferenceRequest((b"",) * max(1, len(predictions)))
    call.predictions = list(predictions)
    call.stages.add("infer", time.perf_counter() - 0.01)
    call.seconds = 0.02
    return call


def test_calls_stages_and_detections_are_counted(server: Running) -> None:
    before = scrape(server)
    for content in (SCENE, SCENE, b"no image"):
        predict(server, content)
    httpx.get(f"{server.url}/v1/models")
    httpx.get(f"{server.url}/v2/health/ready")
    after = scrape(server)
    gained = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    expected = {
        ("haechi_requests_total", "tiny", "ok", "v1"): 2,
        ("haechi_requests_total", "tiny", "refused", "v1"): 1,
        ("haechi_requests_total", "", "ok", "http"): 1,  # the list; no health check and no scrape
        ("haechi_request_duration_seconds_count", "tiny", "v1"): 3,
        ("haechi_stage_duration_seconds_count", "tiny", "queue"): 3,
        ("haechi_stage_duration_seconds_count", "tiny", "infer"): 2,
        ("haechi_stage_duration_seconds_count", "tiny", "post"): 2,
        ("haechi_batch_size_count", "tiny"): 2,
        ("haechi_detections_total", "person", "tiny"): 4,
        ("haechi_detections_total", "dog", "tiny"): 2,
        ("haechi_detection_confidence_count", "tiny"): 6,
        ("haechi_detection_confidence_bucket", "0.7", "tiny"): 2,
        ("haechi_detection_confidence_bucket", "+Inf", "tiny"): 6,
    }
    assert {name: gained.get(name) for name in expected} == expected
    assert sum(value for name, value in gained.items() if name[0] == "haechi_requests_total") == 4
    assert gained["haechi_detection_confidence_sum", "tiny"] == pytest.approx(2 * (0.9 + 0.6 + 0.8), abs=0.05)


def test_the_model_and_the_process_are_described(server: Running) -> None:
    found = scrape(server)
    [(engine, *info)] = [name[1:] for name in found if name[0] == "haechi_model_info"]
    assert engine in ("onnxruntime", "openvino")
    assert info == ["tiny", "fp32", server.version]
    assert found["haechi_model_ready", "tiny"] == 1
    assert found[("haechi_requests_in_flight",)] == 0
    assert found["haechi_detections_total", "car", "tiny"] == 0  # a class that was never seen is told, too
    assert found[("process_resident_memory_bytes",)] > 10e6
    assert any(name[0] == "python_gc_collections_total" for name in found)
    assert not any(name[0].endswith("_created") for name in found)


def test_a_prediction_is_in_flight_until_it_is_answered(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.http)) as client:
        head = f"POST /v1/models/tiny:predict HTTP/1.1\r\nhost: x\r\ncontent-length: {len(SCENE)}\r\n\r\n"
        client.sendall(head.encode())
        until(lambda: scrape(server)[("haechi_requests_in_flight",)] == 1)
        client.sendall(SCENE)
        until(lambda: scrape(server)[("haechi_requests_in_flight",)] == 0)


def until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_names_that_callers_make_up_are_no_labels(server: Running) -> None:
    names = set(scrape(server))
    for number in range(20):
        assert predict(server, model=f"made-up-{number}").status_code == 404
        httpx.request(f"VERB{number}", f"{server.url}/somewhere/{number}")
    assert {name for name in set(scrape(server)) - names if "made-up" in str(name)} == set()
    assert len(set(scrape(server)) - names) <= 2


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4; charset=utf-8"),
        ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
        (OPEN_METRICS, "application/openmetrics-text; version=1.0.0"),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2", "application/openmetrics"),
        ("application/openmetrics-text; version=abc", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/plain; version=.", "text/plain; version=0.0.4; charset=utf-8"),
    ],
)
def test_the_format_is_the_one_that_was_asked_for(server: Running, accept: str, content_type: str) -> None:
    answer = httpx.get(f"{server.url}/metrics", headers={"accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(content_type)
    read = open_families if "openmetrics" in content_type else families
    assert "haechi_model_ready" in {family.name for family in read(answer.text)}


def test_a_thousand_swaps_leave_nothing_behind() -> None:
    models = Models()
    models.announce("m")
    metrics = Metrics(models)
    lines = []
    for number in range(1000):
        engine = fake_engine(f"v{number}", ["person", f"only-in-{number}"])
        models.put("m", engine)
        metrics.swapped("m", "swapped")
        call = answered(engine, detections([0.9, 0.7], [0, 1]))
        metrics.started(call)
        metrics.finished(call)
        if number in (10, 999):
            lines.append(len(metrics.text()[0].splitlines()))
    found = samples(metrics.text()[0].decode())
    assert lines[0] == lines[1]
    assert [name[-1] for name in found if name[0] == "haechi_model_info"] == ["v999"]
    assert {name[1]: found[name] for name in found if name[0] == "haechi_detections_total"} == {
        "person": 1000,
        "only-in-999": 1,
    }
    assert found["haechi_swaps_total", "m", "swapped"] == 1000


def test_a_model_that_is_loading_is_not_ready_and_has_no_version() -> None:
    models = Models()
    models.announce("m")
    found = samples(Metrics(models).text()[0].decode())
    assert found["haechi_model_ready", "m"] == 0
    assert not [name for name in found if name[0] == "haechi_model_info"]


def test_failed_predictions_count_no_detections() -> None:
    models = Models()
    models.put("m", fake_engine("v", ["person"]))
    metrics = Metrics(models)
    call = answered(models.get("m"), detections([0.9], [0]))
    call.error, call.status = InputError("no"), 400
    metrics.finished(call)
    found = samples(metrics.text()[0].decode())
    assert found["haechi_requests_total", "m", "refused", "v2"] == 1
    assert found["haechi_detections_total", "person", "m"] == 0


def test_every_detection_of_a_large_request_falls_into_its_bucket() -> None:
    models = Models()
    models.put("m", fake_engine("v", ["a", "b", "c"]))
    metrics = Metrics(models)
    rng = np.random.default_rng(0)
    scores, ids = rng.random((64, 300)).astype(np.float32), rng.integers(0, 3, (64, 300))
    scores[0, :3] = 0.0, 0.5, 1.0
    metrics.finished(answered(models.get("m"), *(detections(*row) for row in zip(scores, ids, strict=True))))
    found = samples(metrics.text()[0].decode())
    for limit in ("0.05", "0.5", "1.0"):
        assert found["haechi_detection_confidence_bucket", limit, "m"] == (scores <= float(limit)).sum()
    for index, name in enumerate("abc"):
        assert found["haechi_detections_total", name, "m"] == (ids == index).sum()


def test_other_rooms_count_from_any_thread() -> None:
    metrics = Metrics(Models())
    batch = metrics.batches("m")

    def work() -> None:
        for _ in range(500):
            batch(3)
            metrics.sampled("m", "kept")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = samples(metrics.text()[0].decode())
    assert found["haechi_batch_size_sum", "m"] == 12_000
    assert found["haechi_batch_size_bucket", "2.0", "m"] == 0
    assert found["haechi_samples_total", "m", "kept"] == 4000


def test_whoever_may_not_predict_may_not_scrape() -> None:
    class Nobody:
        async def check(self, headers: Mapping[str, str], role: Role) -> str:
            raise AccessError("who are you")

    async def ask(service: Service, metrics: Metrics) -> int:
        app = create_app(service, more=tuple(metrics.routes()))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return (await client.get("/metrics")).status_code

    models, pool = Models(), Pool(1, 1)
    metrics = Metrics(models)
    assert asyncio.run(ask(Service(models, pool, access=Nobody()), metrics)) == 401
    assert asyncio.run(ask(Service(models, pool), metrics)) == 200
    pool.close()


class Driver(SimpleNamespace):
    """Two cards as `pynvml` tells of them; the second one does not tell how busy it is, as slices of a card do not."""

    def __init__(self, wait: threading.Event | None = None) -> None:
        super().__init__()
        self.wait = wait

    def nvmlInit(self) -> None:
        if self.wait:
            self.wait.wait(30)

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"Card {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=10.0, total=100.0)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        if handle == 1:
            raise RuntimeError("Not Supported")
        return SimpleNamespace(gpu=25)


def gpu_values(collector: GpuCollector) -> list[tuple[str, str, float]]:
    return [
        (sample.name.removeprefix("haechi_gpu_"), sample.labels["gpu"], sample.value)
        for family in collector.collect()
        for sample in family.samples
    ]


def test_gpus_are_told_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver())
    collector = GpuCollector()
    assert gpu_values(collector) == [
        ("utilization_ratio", "0", 0.25),
        *(
            (name, gpu, value)
            for name, value in (("memory_used_bytes", 10), ("memory_total_bytes", 100))
            for gpu in "01"
        ),
    ]


def test_a_driver_that_hangs_costs_a_scrape_little(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = threading.Event()
    monkeypatch.setitem(sys.modules, "pynvml", Driver(wait))
    collector = GpuCollector()
    threads, begun = threading.active_count(), time.monotonic()
    assert [gpu_values(collector) for _ in range(3)] == [[], [], []]
    assert time.monotonic() - begun < 3
    assert threading.active_count() == threads + 1
    wait.set()
    until(lambda: gpu_values(collector))


@pytest.mark.parametrize("library", [None, SimpleNamespace()])
def test_no_gpu_is_no_error(monkeypatch: pytest.MonkeyPatch, library: object) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library)
    collector = GpuCollector()
    assert gpu_values(collector) == gpu_values(collector) == []


def test_the_runtime_counts_its_log_lines(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path, ["person"])
    with running(tmp_path, env={"HAECHI_SERVING_LOG_SHARE": "0"}) as server:
        time.sleep(0.3)  # health checks that came too early have lines
        before = scrape(server).get(("haechi_log_lines_total", "written"), 0)
        predict(server)
        predict(server, b"no image")
        until(lambda: scrape(server).get(("haechi_log_lines_total", "written"), 0) == before + 1)

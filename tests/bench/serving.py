"""`make bench-serving`: the runtime against its peers in one run on one machine; ratios, raw figures, JSON.

Peers take turns with the runtime in every round, and each ratio is the median over rounds, so that a machine that
slows down slows both. See peers.py for what they are and load.py for the client.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from haechi.components.shared.detections import Detections
from haechi.components.shared.images import decode, encode_jpeg
from haechi.components.shared.model_folder import ModelFolder
from haechi.components.shared.parity import Tolerance, agree, compare
from tests.serving_process import Running, free_port, running
from tests.tiny_models import tiny_model_folder

HERE = Path(__file__).parent
DATA = Path(__file__).parents[2].parent / "shared" / "data"
EXACT = {"HAECHI_SERVING_ENGINE": "onnxruntime", "HAECHI_SERVING_PRECISION": "fp32", "HAECHI_SERVING_LOG_SHARE": "0"}
FASTEST = {"HAECHI_SERVING_LOG_SHARE": "0"}
# The runtime's own choice of threads, not the test helper's.
FREE = {"HAECHI_SERVING_THREADS": "0"}
CONF = 0.25


@dataclass
class Bench:
    """What was measured so far.

    Attributes:
        seconds: of each measurement.
        rounds: how often peers take turns.
        rows: name of each ratio, its rounds, its target.
        raw: everything that was measured.
    """

    seconds: float
    rounds: int
    room: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    def ratio(
        self, name: str, ours: Sequence[float], theirs: Sequence[float], target: float, most: bool = False
    ) -> None:
        """Note the median of ours/theirs; `most` where it must stay below its target."""
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        self.value(name, statistics.median(ratios), target, most)
        self.raw[name] = {"ours": list(ours), "theirs": list(theirs)}

    def value(self, name: str, value: float, target: float, most: bool = True) -> None:
        """Note a figure and what it must reach."""
        reached = value <= target if most else value >= target
        self.rows.append({"name": name, "value": value, "target": target, "most": most, "reached": reached})
        sign = "≤" if most else "≥"
        say(f"{name:58} {value:9.2f}   {sign} {target:g}   {'reached' if reached else 'MISSED'}")

    def load(self, name: str, protocol: str, port: int, body: Path, *more: str, longer: float = 1.0) -> dict[str, Any]:
        """Ask one server over four connections; `longer` than the others where it answers about once a second."""
        command = [sys.executable, str(HERE / "load.py"), "--protocol", protocol, "--port", str(port)]
        command += ["--body", str(body), "--clients", "4", "--seconds", str(longer * self.seconds), *more]
        result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        if result["statuses"] != [200]:
            raise SystemExit(f"{name}: answers of status {result['statuses']}")
        self.raw.setdefault("loads", []).append({"name": name, **result})
        return result

    def peer(self, name: str, *arguments: str) -> dict[str, Any]:
        """Run a peer that measures itself."""
        command = [sys.executable, str(HERE / "peers.py"), name, "--seconds", str(self.seconds), *arguments]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        return result


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def machine() -> dict[str, Any]:
    """What this was measured on."""
    names = ("onnxruntime", "openvino", "ultralytics-opencv-headless", "kserve", "torch", "numpy", "uvicorn", "grpcio")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory = round(psutil.virtual_memory().total / 2**30)
    return {"cpu": model, "cpus": os.cpu_count(), "memory_gib": memory, "python": platform.python_version()} | versions


def yolo_folder(bench: Bench, weights: str) -> Path:
    """A model folder of yolo11n at 640; untrained where no weights are given, which takes as long to run."""
    folder, frames = bench.room / "model", bench.room / "frames"
    if not weights and (DATA / "weights" / "yolo11n.pt").is_file():
        weights = str(DATA / "weights" / "yolo11n.pt")
    if not weights:
        from haechi.components.shared.yolo import tame

        weights = str(bench.room / "yolo11n.pt")
        tame().YOLO("yolo11n.yaml").save(weights)
        say(
            "no weights given (--weights yolo11n.pt): an untrained network, whose speed is the same but which sees nothing"
        )
    command = [sys.executable, "-m", "haechi.pipelines.cli", "export", "--checkpoint", weights, "--imgsz", "640"]
    subprocess.run([*command, "--images", str(frames), "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder


def frames_720p(room: Path) -> list[Path]:
    """Real frames scaled to 1280×720 where there are some, else drawn ones, as JPEG files of quality 85."""
    from PIL import Image

    sources = sorted((DATA / "cam_lobby").glob("*.jpg"))[:: max(1, len(list((DATA / "cam_lobby").glob("*.jpg"))) // 16)]
    rng = np.random.default_rng(0)
    drawn = [Image.fromarray(rng.integers(0, 255, (9, 16, 3), dtype=np.uint8)) for _ in range(8)]
    pictures = [Image.open(path).convert("RGB") for path in sources] or drawn
    (room / "frames").mkdir()
    paths = []
    for place, picture in enumerate(pictures):
        path = room / "frames" / f"{place:02}.jpg"
        path.write_bytes(encode_jpeg(np.asarray(picture.resize((1280, 720), Image.Resampling.BICUBIC)), quality=85))
        paths.append(path)
    return paths


@contextlib.contextmanager
def health_probe(port: int, times: list[float]) -> Iterator[None]:
    """Ask for health every 50 ms over one connection, and note how long each answer takes."""
    stop = threading.Event()

    def probe() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        while not stop.wait(0.05):
            begun = time.perf_counter()
            connection.request("GET", "/v2/health/live")
            connection.getresponse().read()
            times.append(1000 * (time.perf_counter() - begun))

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def detector_ratios(bench: Bench, folder: Path, frames: list[Path]) -> None:
    """yolo11n: against a loop without a server, and against Ultralytics."""
    image, name = frames[len(frames) // 2], ModelFolder.load(folder).name
    http_arguments = ("--path", f"/v1/models/{name}:predict", "--header", "Content-Type=image/jpeg")
    common = ("--model", str(folder), "--image", str(image))
    exact_loop, exact, fastest, theirs = [], [], [], []
    tails, health, boxes = [], [], []
    rss: list[float] = []
    for number in range(bench.rounds):
        say(f"yolo11n, round {number + 1} of {bench.rounds}")
        exact_loop.append(bench.peer("bare", *common, "--engine", "onnxruntime", "--precision", "fp32")["per_second"])
        with running(folder, env=FREE | EXACT) as server:
            with health_probe(server.http, health):
                result = bench.load("haechi fp32", "http", server.http, image, *http_arguments)
            exact.append(result["per_second"])
            tails.append(result["p99_ms"] / result["p50_ms"])
            rss.append(psutil.Process(server.process.pid).memory_info().rss / 2**20)
            ours = [served_boxes(server, name, path) for path in frames]
        peer = bench.peer("ultralytics", *common, "--conf", str(CONF), "--frames", *map(str, frames))
        theirs.append(peer["per_second"])
        boxes.append(agreement(frames, ours, [as_detections(rows) for rows in peer["boxes"]]))
        with running(folder, env=FREE | FASTEST) as server:
            fastest.append(bench.load("haechi auto", "http", server.http, image, *http_arguments)["per_second"])
            chosen = httpx.get(f"{server.url}/metrics").text
            rss.append(psutil.Process(server.process.pid).memory_info().rss / 2**20)
    bench.raw["chosen"] = [line for line in chosen.splitlines() if line.startswith("haechi_model_info")]
    bench.raw["rates"] = {"bare fp32": exact_loop, "fp32": exact, "auto": fastest, "ultralytics": theirs}
    bench.ratio("images/s of the bare loop that HTTP reaches, fp32", exact, exact_loop, 0.90)
    bench.value("p99 over p50 of the answers", statistics.median(tails), 3.0)
    bench.value("health under full load, p99 (ms)", sorted(health)[int(0.99 * len(health))], 20.0)
    bench.value("health under full load, slowest (ms)", max(health), 20.0)
    bench.ratio("images/s over HTTP against Ultralytics, fp32", exact, theirs, 1.25)
    bench.value("frames whose boxes differ from Ultralytics'", max(boxes), 0)
    bench.ratio("images/s over HTTP against Ultralytics, chosen by itself", fastest, theirs, 1.60)
    bench.value("resident memory after load (MiB)", max(rss), 400)


def served_boxes(server: Running, name: str, path: Path) -> Detections:
    answer = httpx.post(f"{server.url}/v1/models/{name}:predict?conf={CONF}", content=path.read_bytes(), timeout=30)
    rows = answer.json()["predictions"][0]["detections"]
    return as_detections([[*row["box"], row["score"], row["class_id"]] for row in rows])


def as_detections(rows: list[list[float]]) -> Detections:
    table = np.asarray(rows, dtype=np.float32).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


def agreement(frames: list[Path], ours: list[Detections], theirs: list[Detections]) -> int:
    """How many frames have other boxes, by the tolerance of export and runtime."""
    results = []
    for path, mine, other in zip(frames, ours, theirs, strict=True):
        longest = max(decode(path.read_bytes()).shape[:2])
        results.append(compare(mine, other, CONF, Tolerance(), longest))
    say(f"boxes compared with Ultralytics': {agree(results)}")
    return sum(not result.ok for result in results)


def protocol_ratios(bench: Bench, frames: list[Path]) -> None:
    """A network that costs next to nothing: what is left is the server."""
    from tritonclient import http as triton_http
    from tritonclient.grpc import service_pb2

    folder = bench.room / "tiny"
    tiny_model_folder(folder, ["person", "dog"], imgsz=640)
    image = frames[0]
    tensor = bench.room / "tensor"
    values = np.random.default_rng(0).random((1, 3, 640, 640), dtype=np.float32)
    wanted = triton_http.InferInput("images", values.shape, "FP32")
    wanted.set_data_from_numpy(values)
    body, header = triton_http.InferenceServerClient.generate_request_body([wanted])
    tensor.write_bytes(body)
    encoded = np.array([image.read_bytes()], dtype=np.object_)
    as_bytes = triton_http.InferInput("images", [1], "BYTES")
    as_bytes.set_data_from_numpy(encoded)
    jpeg, jpeg_header = triton_http.InferenceServerClient.generate_request_body([as_bytes])
    (bench.room / "jpeg_v2").write_bytes(jpeg)
    message = service_pb2.ModelInferRequest(model_name="tiny")
    message.inputs.add(name="images", datatype="BYTES", shape=[1])
    message.raw_input_contents.append(struct.pack("<I", image.stat().st_size) + image.read_bytes())
    (bench.room / "grpc").write_bytes(message.SerializeToString())

    def header_of(length: int) -> tuple[str, ...]:
        return (
            "--header",
            f"Inference-Header-Content-Length={length}",
            "--header",
            "Content-Type=application/octet-stream",
        )

    v2 = ("--path", "/v2/models/tiny/infer")
    cases: list[tuple[str, str, Path, tuple[str, ...], float]] = [
        ("V2 binary FP32 1x3x640x640", "http", tensor, (*v2, *header_of(header)), 20.0),
        (
            "V1 raw JPEG",
            "http",
            image,
            ("--path", "/v1/models/tiny:predict", "--header", "Content-Type=image/jpeg"),
            1.5,
        ),
        ("gRPC raw BYTES JPEG", "grpc", bench.room / "grpc", (), 1.3),
    ]
    with running(folder, env=FREE | EXACT) as ours, kserve_server(folder) as (http_port, grpc_port):
        for name, protocol, path, more, target in cases:
            mine, other = [], []
            for _ in range(bench.rounds):
                port, peer_port = (ours.http, http_port) if protocol == "http" else (ours.grpc, grpc_port)
                mine.append(bench.load(f"haechi {name}", protocol, port, path, *more)["per_second"])
                longer = 4.0 if path is tensor else 1.0
                peer = bench.load(f"kserve {name}", protocol, peer_port, path, *more, longer=longer)
                other.append(peer["per_second"])
            bench.ratio(f"requests/s against kserve, {name}", mine, other, target)
        refused = httpx.post(
            f"http://127.0.0.1:{http_port}/v2/models/tiny/infer", content=jpeg,
            headers={"Inference-Header-Content-Length": str(jpeg_header), "Content-Type": "application/octet-stream"},
        )  # fmt: skip
        answer = bench.load(
            "haechi V2 BYTES JPEG", "http", ours.http, bench.room / "jpeg_v2", *v2, *header_of(jpeg_header)
        )
        bench.raw["v2_bytes_jpeg"] = {"kserve_status": refused.status_code, "haechi_per_second": answer["per_second"]}
        say(
            f"JPEG in a V2 BYTES tensor: kserve answers {refused.status_code}, we {answer['per_second']:.0f} requests/s"
        )


@contextlib.contextmanager
def kserve_server(folder: Path) -> Iterator[tuple[int, int]]:
    """The kserve Python server as a process; its ports."""
    ports = free_port(), free_port()
    command = [sys.executable, str(HERE / "peers.py"), "kserve", "--model", str(folder)]
    process = subprocess.Popen(
        [*command, "--http-port", str(ports[0]), "--grpc-port", str(ports[1])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{ports[0]}/v2/health/ready").status_code == 200:
                    break
            time.sleep(0.1)
        yield ports
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


def start_ratios(bench: Bench, folder: Path) -> None:
    """From the start of the process to ready."""
    for name, env in (("fp32", EXACT), ("chosen by itself", FASTEST)):
        times = []
        for _ in range(bench.rounds):
            with running(folder, env=FREE | env) as server:
                times.append(server.seconds_to_ready)
        bench.value(f"start to ready, {name} (s)", statistics.median(times), 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", default="", help="yolo11n.pt")
    parser.add_argument("--out", type=Path, default=Path(".haechi/bench/serving.json"))
    arguments = parser.parse_args()
    room = Path(tempfile.mkdtemp(prefix="haechi-bench-"))
    bench = Bench(arguments.seconds, arguments.rounds, room)
    try:
        frames = frames_720p(room)
        folder = yolo_folder(bench, arguments.weights)
        start_ratios(bench, folder)
        detector_ratios(bench, folder, frames)
        protocol_ratios(bench, frames)
    finally:
        shutil.rmtree(room)
    report = {"machine": machine(), "rows": bench.rows, "raw": bench.raw}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1))
    say(f"{sum(row['reached'] for row in bench.rows)} of {len(bench.rows)} reached; all figures in {arguments.out}")
    sys.stdout.write(json.dumps({"machine": report["machine"], "rows": bench.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

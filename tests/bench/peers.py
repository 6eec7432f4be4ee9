"""The peers that the runtime is measured against, each a process of its own.

`bare`        the least there can be: threads that decode, letterbox, run and suppress in a loop, no server
`ultralytics` its own predict on the same ONNX file
`kserve`      the kserve Python server around the same functions, as its users write models
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _rate(work: Callable[[], Any], threads: int, seconds: float) -> float:
    """Calls a second of `work` in `threads` threads."""
    counts = [0] * threads
    for _ in range(3):
        work()
    end = time.perf_counter() + seconds

    def loop(place: int) -> None:
        while time.perf_counter() < end:
            work()
            counts[place] += 1

    begun = time.perf_counter()
    workers = [threading.Thread(target=loop, args=(place,)) for place in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - begun)


def bare(arguments: argparse.Namespace) -> None:
    """As many threads and the same engine as the server, without a server."""
    from haechi.components.shared.images import decode
    from haechi.components.shared.model_folder import ModelFolder
    from haechi.serving.backends import BackendOptions, open_backend

    folder = Path(arguments.model)
    model = ModelFolder.load(folder)
    backend = open_backend(folder, model, BackendOptions(arguments.engine, arguments.precision))
    data = Path(arguments.image).read_bytes()
    limits = model.limits()

    def work() -> None:
        prepared = [backend.detector.prepare(decode(data))]
        for raw in backend.detector.infer_prepared(prepared, min(limits)):
            backend.detector.decode(raw, prepared[0][1], limits, model.iou, 300)

    rate = _rate(work, backend.streams, arguments.seconds)
    sys.stdout.write(json.dumps({"per_second": rate, "threads": backend.streams}))


def ultralytics(arguments: argparse.Namespace) -> None:
    """Ultralytics' predict, decoding by OpenCV as it does itself; and its boxes for the comparison."""
    import cv2
    import numpy as np

    from haechi.components.shared.model_folder import ModelFolder
    from haechi.components.shared.yolo import tame

    folder = Path(arguments.model)
    model = ModelFolder.load(folder)
    network = tame().YOLO(str(folder / "model.onnx"), task="detect")

    def work(path: str = arguments.image) -> Any:
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
        return network.predict(pixels, imgsz=model.imgsz, conf=arguments.conf, iou=model.iou, verbose=False)[0].boxes

    rate = _rate(work, 1, arguments.seconds)
    boxes = [
        [[*map(float, box.xyxy[0]), float(box.conf), int(box.cls)] for box in work(path)] for path in arguments.frames
    ]
    sys.stdout.write(json.dumps({"per_second": rate, "boxes": boxes}))


def kserve(arguments: argparse.Namespace) -> None:
    """A custom model on the kserve Python server: V1 with a raw image, V2 and gRPC with FP32 or BYTES."""
    import kserve as sdk
    import numpy as np

    from haechi.components.shared.images import decode
    from haechi.components.shared.model_folder import ModelFolder

    folder = Path(arguments.model)
    description = ModelFolder.load(folder)
    detector = description.detector(folder, threads=1)
    limits = description.limits()

    def detect(data: bytes) -> list[dict[str, Any]]:
        prepared = [detector.prepare(decode(data))]
        raw = detector.infer_prepared(prepared, min(limits))[0]
        return detector.decode(raw, prepared[0][1], limits, description.iou, 300).to_list(description.classes)

    class Model(sdk.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(description.name)
            self.ready = True

        def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
            if isinstance(payload, bytes):
                return {"predictions": [detect(payload)]}
            tensor = payload.inputs[0]
            if tensor.datatype == "BYTES":
                found = [detect(bytes(item)) for item in tensor.as_numpy().ravel()]
                return self.answer(payload, [json.dumps(row) for row in found])
            raw = detector.infer(np.ascontiguousarray(tensor.as_numpy(), dtype=np.float32))
            return self.answer(payload, [str(raw.shape)])

        def answer(self, payload: Any, rows: list[str]) -> Any:
            output = sdk.InferOutput("detections", [len(rows)], "BYTES", [row.encode() for row in rows])
            return sdk.InferResponse(payload.id or "1", self.name, [output])

    sdk.ModelServer(http_port=arguments.http_port, grpc_port=arguments.grpc_port, workers=1).start([Model()])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=["bare", "ultralytics", "kserve"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--image")
    parser.add_argument("--frames", nargs="*", default=[])
    parser.add_argument("--conf", type=float, default=0.25)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--http-port", type=int, default=0)
    parser.add_argument("--grpc-port", type=int, default=0)
    arguments = parser.parse_args()
    {"bare": bare, "ultralytics": ultralytics, "kserve": kserve}[arguments.peer](arguments)


if __name__ == "__main__":
    main()

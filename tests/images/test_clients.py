"""Published clients against the runtime as a real process: tritonclient, kserve's, curl, and one made by reflection."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from haechi.components.shared.images import decode
from tests.serving_process import Running
from tests.tiny_models import cell_box, paint, shade

SCENE = paint({(2, 3): shade(0, 0.9), (5, 5): shade(1, 0.6), (7, 7): shade(0, 0.3)})
EMPTY = paint({}, width=320, height=160)
PIXELS = decode(SCENE)
TENSOR = np.ascontiguousarray(PIXELS.transpose(2, 0, 1)[None].astype(np.float32) / 255)
BOXES = [[*cell_box(2, 3)], [*cell_box(5, 5)]]
ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "BYTES": np.array([SCENE], dtype=object),
    "UINT8": PIXELS,
    "FP32": TENSOR,
}


def same_boxes(result: Any) -> None:
    """What every client must get for SCENE; `result` has `as_numpy`."""
    assert result.as_numpy("num_detections").tolist() == [2]
    assert result.as_numpy("boxes").tolist() == BOXES
    assert np.allclose(result.as_numpy("scores"), [0.9, 0.6], atol=0.01)
    assert result.as_numpy("class_ids").tolist() == [0, 1]
    assert [str(label, "utf-8") if isinstance(label, bytes) else label for label in result.as_numpy("labels")] == [
        "person",
        "dog",
    ]
    assert result.as_numpy("sizes").tolist() == [[320, 320]]


def triton_input(module: Any, array: np.ndarray[Any, Any], datatype: str, **how: Any) -> Any:
    tensor = module.InferInput("images", list(array.shape), datatype)
    tensor.set_data_from_numpy(array, **how)
    return tensor


# Into JSON, both clients write bytes as text, which no image is.
@pytest.mark.parametrize(
    ("datatype", "binary"), [("BYTES", True), ("UINT8", True), ("UINT8", False), ("FP32", True), ("FP32", False)]
)
def test_tritonclient_over_http(server: Running, datatype: str, binary: bool) -> None:
    with triton_http.InferenceServerClient(f"127.0.0.1:{server.http}") as client:
        entry = triton_input(triton_http, ARRAYS[datatype], datatype, binary_data=binary)
        result = client.infer("door", [entry], request_id="r1")
        same_boxes(result)
        wanted = [triton_http.InferRequestedOutput(name, binary_data=binary) for name in result_names(result)]
        same_boxes(client.infer("door", [entry], outputs=wanted, model_version=server.version))
    told = result.get_response()
    assert (told["id"], told["model_name"], told["model_version"]) == ("r1", "door", server.version)


def result_names(result: Any) -> list[str]:
    return [row["name"] for row in result.get_response()["outputs"]]


def test_tritonclient_over_http_asks_for_state_metadata_and_empty_images(server: Running) -> None:
    with triton_http.InferenceServerClient(f"127.0.0.1:{server.http}") as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("door")
        assert not client.is_model_ready("other")
        assert client.get_server_metadata()["name"] == "haechi"
        assert client.get_model_metadata("door")["outputs"][1] == {
            "name": "boxes",
            "datatype": "FP32",
            "shape": [-1, 4],
        }
        both = triton_input(triton_http, np.array([EMPTY, SCENE], dtype=object), "BYTES")
        result = client.infer("door", [both], parameters={"classes": "person", "conf": 0.2})
        assert result.as_numpy("num_detections").tolist() == [0, 2]
        nothing = client.infer("door", [triton_input(triton_http, np.array([EMPTY], dtype=object), "BYTES")])
        assert nothing.as_numpy("boxes").shape == (0, 4) and len(nothing.as_numpy("labels")) == 0
        with pytest.raises(InferenceServerException, match="not an image"):
            client.infer("door", [triton_input(triton_http, np.array([b"x"], dtype=object), "BYTES")])


@pytest.mark.parametrize("datatype", ARRAYS)
def test_tritonclient_over_grpc(server: Running, datatype: str) -> None:
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        entry = triton_input(triton_grpc, ARRAYS[datatype], datatype)
        result = client.infer("door", [entry], request_id="r1", client_timeout=30)
        same_boxes(result)
        told = result.get_response()
        assert (told.id, told.model_name, told.model_version) == ("r1", "door", server.version)
        wanted = [triton_grpc.InferRequestedOutput("labels")]
        few = client.infer("door", [entry], outputs=wanted, parameters={"conf": 0.2, "max_det": 1, "camera": "c"})
        assert few.as_numpy("labels").tolist() == [b"person"] and few.as_numpy("boxes") is None


def test_tritonclient_over_grpc_asks_for_state_metadata_and_empty_images(server: Running) -> None:
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("door")
        assert client.get_server_metadata().name == "haechi"
        about = client.get_model_metadata("door", as_json=True)
        assert about["versions"] == [server.version] and about["inputs"][0]["datatype"] == "BYTES"
        with pytest.raises(InferenceServerException, match=r"NOT_FOUND.*no model 'other'"):
            client.get_model_metadata("other")
        nothing = client.infer("door", [triton_input(triton_grpc, np.array([EMPTY], dtype=object), "BYTES")])
        assert nothing.as_numpy("boxes").shape == (0, 4)


def test_tritonclient_asyncio(server: Running) -> None:
    async def over_http() -> None:
        async with triton_http_aio.InferenceServerClient(f"127.0.0.1:{server.http}") as client:
            same_boxes(await client.infer("door", [triton_input(triton_http, ARRAYS["BYTES"], "BYTES")]))

    async def over_grpc() -> None:
        async with triton_grpc_aio.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
            entry = triton_input(triton_grpc, ARRAYS["BYTES"], "BYTES")
            for result in await asyncio.gather(*[client.infer("door", [entry]) for _ in range(8)]):
                same_boxes(result)

    asyncio.run(over_http())
    asyncio.run(over_grpc())


def test_the_clients_of_kserve(server: Running, tmp_path: Path) -> None:
    """In a process of its own: kserve's messages and tritonclient's bear the same names, and one process takes one."""
    (tmp_path / "scene").write_bytes(SCENE)
    np.save(tmp_path / "pixels.npy", PIXELS)
    np.save(tmp_path / "tensor.npy", TENSOR)
    files = [str(tmp_path / name) for name in ("scene", "pixels.npy", "tensor.npy")]
    command = [
        sys.executable,
        str(Path(__file__).with_name("kserve_client.py")),
        str(server.http),
        str(server.grpc),
        *files,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("rest state") == [True, True, True, False]
    assert found.pop("v1 state") == [True, True]
    assert found.pop("grpc state") == [True, True, True]
    v1 = found.pop("v1")
    assert [item["box"] for item in v1["predictions"][0]["detections"]] == BOXES
    assert "['person']" in found.pop("grpc parameters")[3]["labels"].replace("b'", "'")
    assert len(found) == 5 + 1 + 5
    for form, (name, model, version, values) in found.items():
        # kserve's reader of REST answers forgets the version.
        assert (name, model) == ("k1", "door") and version == (server.version if "grpc" in form else None), form
        assert values["num_detections"] == "[2]" and values["class_ids"] == "[0, 1]", form
        assert np.reshape(json.loads(values["boxes"]), (-1, 4)).tolist() == BOXES, form


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(server: Running, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(SCENE)
    for options in (["-H", "Content-Type: image/png"], [], ["-H", "Content-Type:"]):
        for path in ("v2/models/door/infer?conf=0.7", "v1/models/door:predict?conf=0.7"):
            command = ["curl", "-sS", "--fail-with-body", *options, "--data-binary", "@a.png", f"{server.url}/{path}"]
            done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "person" in done.stdout and "dog" not in done.stdout


@pytest.fixture
def channel(server: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        yield channel


def test_a_client_that_knows_nothing_learns_all_by_reflection(server: Running, channel: grpc.Channel) -> None:
    """As grpcurl does: list the services, fetch their descriptors, send JSON."""
    database = ProtoReflectionDescriptorDatabase(channel)
    services = sorted(database.get_services())
    assert services == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
    ]
    pool = descriptor_pool.DescriptorPool(database)
    described = {name: pool.FindServiceByName(name) for name in services}
    inference = described["inference.GRPCInferenceService"]

    def ask(method: str, message: dict[str, Any]) -> dict[str, Any]:
        about = inference.methods_by_name[method]
        request = json_format.ParseDict(message, message_factory.GetMessageClass(about.input_type)())
        call = channel.unary_unary(
            f"/{inference.full_name}/{method}",
            request_serializer=lambda item: item.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(about.output_type).FromString,
        )
        told: dict[str, Any] = json_format.MessageToDict(call(request, timeout=30), preserving_proto_field_name=True)
        return told

    assert ask("ServerLive", {}) == {"live": True}
    assert ask("ModelMetadata", {"name": "door"})["versions"] == [server.version]
    image = {"bytes_contents": [base64.b64encode(SCENE).decode()]}
    entry = {"name": "images", "datatype": "BYTES", "shape": [1], "contents": image}
    told = ask("ModelInfer", {"model_name": "door", "inputs": [entry], "parameters": {"conf": {"double_param": 0.7}}})
    labels = told["raw_output_contents"][[row["name"] for row in told["outputs"]].index("labels")]
    assert base64.b64decode(labels) == b"\x06\0\0\0person"


def test_reflection_tells_of_what_is_answered_and_of_nothing_else(channel: grpc.Channel) -> None:
    """The messages' package describes Triton's whole service, which has three times as many methods."""
    database = ProtoReflectionDescriptorDatabase(channel)
    file: FileDescriptorProto = database.FindFileContainingSymbol("inference.GRPCInferenceService")
    told = {method.name for method in file.service[0].method}
    assert told >= {"ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"}

    def answered(method: str) -> bool:
        ask = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        try:
            ask(b"", timeout=30)
        except grpc.RpcError as error:
            return error.code() is not grpc.StatusCode.UNIMPLEMENTED
        return True

    every = {method.name for method in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
    assert {method for method in every if answered(method)} == told
    names = {message.name for message in file.message_type}
    assert {"ModelInferRequest", "InferParameter", "InferTensorContents"} <= names
    assert not [name for name in names if name.startswith(("CudaShared", "ModelStat", "ModelConfig", "Trace"))]
    assert not file.dependency

"""V2 over HTTP: every form of input gives the same boxes, every lie gets a 400 that names it."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from typing import Any

import httpx
import numpy as np
import pytest

from haechi.components.shared.errors import InputError
from haechi.components.shared.images import decode
from haechi.serving.app import create_app
from haechi.serving.engine import Models
from haechi.serving.pool import Pool
from haechi.serving.service import Service
from haechi.serving.v2 import V2Exchange
from haechi.serving.v2_routes import v2_routes
from tests.serving_process import Running
from tests.tiny_models import cell_box, paint, shade

SCENE = paint({(2, 3): shade(0, 0.9), (5, 5): shade(1, 0.6), (7, 7): shade(0, 0.3)})
EMPTY = paint({}, width=320, height=160)
PIXELS = decode(SCENE)
TENSOR = np.ascontiguousarray(PIXELS.transpose(2, 0, 1).astype(np.float32) / 255)
BOXES = [[*cell_box(2, 3)], [*cell_box(5, 5)]]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def framed(*items: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def tensor(datatype: str, shape: Any, **more: Any) -> dict[str, Any]:
    return {"name": "images", "datatype": datatype, "shape": shape, **more}


def asked(server: Running, entry: Any, binary: bytes = b"", headers: dict[str, str] | None = None) -> httpx.Response:
    text = json.dumps(entry).encode()
    fields = {"inference-header-content-length": str(len(text))} if binary else {"content-type": "application/json"}
    url = f"{server.url}/v2/models/door/infer"
    return httpx.post(url, content=text + binary, headers=fields | (headers or {}), timeout=30)


def outputs(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return {row["name"]: row["data"] for row in answer.json()["outputs"]}


FORMS: dict[str, tuple[dict[str, Any], bytes]] = {
    "BYTES, base64": (tensor("BYTES", [1], data=[b64(SCENE)]), b""),
    "BYTES, base64 with line breaks, [n, 1]": (
        tensor("BYTES", [1, 1], data=[[base64.encodebytes(SCENE).decode()]]),
        b"",
    ),
    "BYTES, binary": (tensor("BYTES", [1]), framed(SCENE)),
    "UINT8, nested": (tensor("UINT8", [320, 320, 3], data=PIXELS.tolist()), b""),
    "UINT8, flat": (tensor("UINT8", [1, 320, 320, 3], data=PIXELS.ravel().tolist()), b""),
    "UINT8, binary": (tensor("UINT8", [320, 320, 3]), PIXELS.tobytes()),
    "UINT8, binary, several": (tensor("UINT8", [1, 320, 320, 3]), PIXELS.tobytes()),
    "FP32, nested": (tensor("FP32", [1, 3, 320, 320], data=[TENSOR.tolist()]), b""),
    "FP32, flat": (tensor("FP32", [3, 320, 320], data=TENSOR.ravel().tolist()), b""),
    "FP32, binary": (tensor("FP32", [1, 3, 320, 320]), TENSOR.tobytes()),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_input_gives_the_same_boxes(server: Running, form: str) -> None:
    entry, binary = FORMS[form]
    if binary:
        entry = {**entry, "parameters": {"binary_data_size": len(binary)}}
    answer = asked(server, {"id": "7", "inputs": [entry | {"name": "whatever"}]}, binary)
    found = outputs(answer)
    assert np.reshape(found["boxes"], (-1, 4)).tolist() == BOXES
    assert np.allclose(found["scores"], [0.9, 0.6], atol=0.01)
    rest = {name: found[name] for name in ("num_detections", "class_ids", "labels", "sizes")}
    assert rest == {"num_detections": [2], "class_ids": [0, 1], "labels": ["person", "dog"], "sizes": [320, 320]}
    body = answer.json()
    assert (body["model_name"], body["model_version"], body["id"]) == ("door", server.version, "7")


def test_several_images_stand_in_one_list_with_their_numbers(server: Running) -> None:
    answer = asked(server, {"inputs": [tensor("BYTES", [3], data=[b64(SCENE), b64(EMPTY), b64(SCENE)])]})
    found = outputs(answer)
    assert found["num_detections"] == [2, 0, 2]
    assert np.reshape(found["boxes"], (-1, 4)).tolist() == BOXES * 2
    assert found["sizes"] == [320, 320, 320, 160, 320, 320]
    shapes = {row["name"]: row["shape"] for row in answer.json()["outputs"]}
    assert shapes == {
        "num_detections": [3],
        "boxes": [4, 4],
        "scores": [4],
        "class_ids": [4],
        "labels": [4],
        "sizes": [3, 2],
    }


@pytest.mark.parametrize(
    ("content_type", "data"),
    [("image/png", SCENE), ("IMAGE/JPEG; q=1", SCENE), ("application/octet-stream", SCENE), ("", SCENE)],
)
def test_an_image_may_be_the_whole_body(server: Running, content_type: str, data: bytes) -> None:
    headers = {"content-type": content_type} if content_type else {}
    url = f"{server.url}/v2/models/door/versions/{server.version}/infer"
    assert outputs(httpx.post(url, params={"conf": "0.7"}, content=data, headers=headers))["labels"] == ["person"]


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/octet-stream", "", "text/x"])
def test_json_needs_no_exact_content_type(server: Running, content_type: str) -> None:
    entry = {"inputs": [tensor("BYTES", [1], data=[b64(SCENE)])]}
    assert outputs(asked(server, entry, headers={"content-type": content_type}))["num_detections"] == [2]


def test_an_image_without_detections_gives_empty_tensors(server: Running) -> None:
    entry = {"inputs": [tensor("BYTES", [1], data=[b64(EMPTY)])]}
    found = outputs(asked(server, entry))
    assert found == {
        "num_detections": [0],
        "boxes": [],
        "scores": [],
        "class_ids": [],
        "labels": [],
        "sizes": [320, 160],
    }
    binary = asked(server, entry | {"parameters": {"binary_data_output": True}})
    assert len(binary.content) == int(binary.headers["inference-header-content-length"]) + 4 + 8


@pytest.mark.parametrize(
    ("parameters", "labels"),
    [
        ({"conf": 0.2}, ["person", "dog", "person"]),
        ({"conf": "0.7"}, ["person"]),
        ({"conf": 0.2, "max_det": 1}, ["person"]),
        ({"classes": ["dog"]}, ["dog"]),
        ({"classes": "1"}, ["dog"]),
        ({"iou": 0.5, "conf": 0.2, "camera": "door-1", "priority": 3}, ["person", "dog", "person"]),
    ],
)
def test_parameters_hold_for_the_request(server: Running, parameters: dict[str, Any], labels: list[str]) -> None:
    entry = {"inputs": [tensor("BYTES", [1], data=[b64(SCENE)])], "parameters": parameters}
    assert outputs(asked(server, entry))["labels"] == labels


def test_outputs_are_those_asked_for_each_in_its_form(server: Running) -> None:
    wanted = [{"name": "labels", "parameters": {"binary_data": True}}, {"name": "sizes"}, {"name": "boxes"}]
    wanted[2]["parameters"] = {"binary_data": True}
    answer = asked(server, {"inputs": [tensor("BYTES", [1], data=[b64(SCENE)])], "outputs": wanted})
    length = int(answer.headers["inference-header-content-length"])
    rows, rest = json.loads(answer.content[:length])["outputs"], answer.content[length:]
    assert [row["name"] for row in rows] == ["labels", "sizes", "boxes"]
    assert rows[1]["data"] == [320, 320] and "data" not in rows[0]
    size = rows[0]["parameters"]["binary_data_size"]
    assert rest[:size] == framed(b"person", b"dog")
    assert np.frombuffer(rest[size:], "<f4").reshape(-1, 4).tolist() == BOXES
    assert rows[2]["parameters"]["binary_data_size"] == len(rest) - size == 32


def test_the_camera_reaches_those_who_watch() -> None:
    entry = {"inputs": [tensor("BYTES", [1], data=[b64(SCENE)])], "parameters": {"camera": "gate"}}
    exchange = V2Exchange("door", json.dumps(entry).encode(), "application/json", None, {})
    exchange.parse()
    assert exchange.camera == "gate"
    exchange = V2Exchange("door", SCENE, "image/png", None, {"camera": "yard"})
    exchange.parse()
    assert exchange.camera == "yard"


GOOD = tensor("BYTES", [1], data=[b64(SCENE)])


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ([], "not an object"),
        ({}, "`inputs` holds 0 tensors"),
        ({"inputs": {}}, "`inputs` is not a list of objects"),
        ({"inputs": [7]}, "`inputs` is not a list of objects"),
        ({"inputs": [GOOD, GOOD]}, "`inputs` holds 2 tensors"),
        ({"inputs": [GOOD], "id": 7}, "`id` is missing or not text"),
        ({"inputs": [GOOD], "parameters": []}, "`parameters` of the request"),
        ({"inputs": [GOOD], "parameters": {"conf": 2}}, "`conf` is 2"),
        ({"inputs": [GOOD], "parameters": {"camera": 7}}, "`camera` is '7'"),
        ({"inputs": [GOOD], "parameters": {"camera": "x" * 129}}, "`camera` is 'xxx"),
        ({"inputs": [GOOD], "parameters": {"classes": ["cat"]}}, "`classes` names cat.*person, dog"),
        ({"inputs": [GOOD], "parameters": {"binary_data_output": 1}}, "`binary_data_output` is '1'"),
        ({"inputs": [GOOD], "outputs": [{"name": "output0"}]}, "no output `output0`. Ask for num_detections"),
        ({"inputs": [GOOD], "outputs": [{"name": "boxes"}] * 2}, "asked for twice"),
        ({"inputs": [GOOD], "outputs": [{"name": None}]}, "output's `name`"),
        (
            {"inputs": [GOOD], "outputs": [{"name": "boxes", "parameters": {"classification": 3}}]},
            "output `boxes` has the parameter `classification`",
        ),
        (
            {"inputs": [tensor("BYTES", [1], parameters={"shared_memory_region": "r", "shared_memory_byte_size": 4})]},
            "input `images` has the parameter `shared_memory_region`",
        ),
        ({"inputs": [{**GOOD, "name": 7}]}, "input's `name`"),
        ({"inputs": [{**GOOD, "name": "frame", "datatype": "FP16"}]}, "input `frame` is FP16"),
        ({"inputs": [{**GOOD, "datatype": ["BYTES"]}]}, "input's `datatype`"),
        ({"inputs": [{**GOOD, "shape": 1}]}, "input's `shape` is not a list"),
        ({"inputs": [{**GOOD, "shape": []}]}, r"BYTES of shape \[\]"),
        ({"inputs": [{**GOOD, "shape": [0]}]}, r"BYTES of shape \[0\]"),
        ({"inputs": [{**GOOD, "shape": [True]}]}, r"BYTES of shape \[True\]"),
        ({"inputs": [{**GOOD, "shape": [1.0]}]}, r"BYTES of shape \[1.0\]"),
        ({"inputs": [{**GOOD, "shape": [-1]}]}, r"BYTES of shape \[-1\]"),
        ({"inputs": [{**GOOD, "shape": [2]}]}, r"has 1 elements. Its shape \[2\] takes 2"),
        ({"inputs": [{**GOOD, "shape": [65]}]}, "holds 65 images"),
        ({"inputs": [{**GOOD, "shape": [10**30]}]}, "shape|holds"),
        ({"inputs": [{**GOOD, "data": b64(SCENE)}]}, "`data` that is no list"),
        ({"inputs": [{**GOOD, "data": [7]}]}, r"`data\[0\]` is missing or not text"),
        ({"inputs": [{**GOOD, "data": ["%%%"]}]}, r"`data\[0\]` is not base64"),
        ({"inputs": [{**GOOD, "data": [""]}]}, "file is empty"),
        ({"inputs": [{**GOOD, "data": [b64(b"GIF89a")]}]}, "not an image"),
        ({"inputs": [tensor("BYTES", [2], data=[b64(SCENE), b64(SCENE[:99])])]}, "image 1: the PNG is damaged"),
        ({"inputs": [tensor("BYTES", [1])]}, "both `data` and `binary_data_size`, or neither"),
        ({"inputs": [{**GOOD, "parameters": {"binary_data_size": 4}}]}, "both `data` and"),
        ({"inputs": [tensor("BYTES", [1], parameters={"binary_data_size": 4})]}, "size` 4 and 0 bytes follow"),
        ({"inputs": [tensor("BYTES", [1], parameters=[])]}, "`parameters` of an input"),
        ({"inputs": [tensor("UINT8", [2, 2, 3], data=[1] * 11)]}, r"shape \[11\]. Send 12 numbers"),
        ({"inputs": [tensor("UINT8", [2, 2, 3], data=[[1] * 6] * 2)]}, r"shape \[2, 6\]"),
        ({"inputs": [tensor("UINT8", [2, 2, 3], data=[[1], [1, 2]])]}, "nested unevenly"),
        ({"inputs": [tensor("UINT8", [2, 2, 3], data=[256] * 12)]}, "whole numbers from 0 to 255"),
        ({"inputs": [tensor("UINT8", [2, 2, 3], data=[-1] * 12)]}, "whole numbers from 0 to 255"),
        ({"inputs": [tensor("UINT8", [2, 2, 3], data=[0.5] * 12)]}, "whole numbers from 0 to 255"),
        ({"inputs": [tensor("UINT8", [2, 2, 3], data=["1"] * 12)]}, "whole numbers from 0 to 255"),
        ({"inputs": [tensor("UINT8", [2, 2, 4], data=[1] * 16)]}, r"UINT8 of shape \[2, 2, 4\]"),
        ({"inputs": [tensor("UINT8", [3, 2, 2], data=[1] * 12)]}, r"UINT8 of shape \[3, 2, 2\]"),
        ({"inputs": [tensor("UINT8", [2**31, 2**31, 3], data=[1])]}, "takes|Send 13835058055282163712 numbers"),
        ({"inputs": [tensor("FP32", [3, 2, 2], data=[None] * 12)]}, "other than numbers"),
        ({"inputs": [tensor("FP32", [3, 2, 2], data=["0.1"] * 12)]}, "other than numbers"),
        ({"inputs": [tensor("FP32", [3, 2, 2], data=[1e300] * 12)]}, "not all from 0 to 1"),
        ({"inputs": [tensor("FP32", [3, 2, 2], data=[10**40] * 12)]}, "not all from 0 to 1"),
        ({"inputs": [tensor("FP32", [3, 2, 2], data=[255] * 12)]}, "not all from 0 to 1"),
        ({"inputs": [tensor("FP32", [2, 2, 3], data=[0.1] * 12)]}, r"FP32 of shape \[2, 2, 3\]"),
    ],
)
def test_wrong_requests_get_400_and_the_reason(server: Running, entry: Any, match: str) -> None:
    refused(asked(server, entry), match)


def refused(answer: httpx.Response, match: str) -> None:
    assert answer.status_code == 400, answer.text
    assert list(answer.json()) == ["error"]
    with pytest.raises(InputError, match=match):
        raise InputError(answer.json()["error"])


SMALL = np.zeros((2, 2, 3), np.uint8).tobytes()


@pytest.mark.parametrize(
    ("datatype", "shape", "binary", "size", "match"),
    [
        ("UINT8", [2, 2, 3], SMALL, 11, "size` 11 and 12 bytes follow"),
        ("UINT8", [2, 2, 3], SMALL, 13, "size` 13 and 12 bytes follow"),
        ("UINT8", [2, 2, 3], SMALL, -1, "size` -1 and 12"),
        ("UINT8", [2, 2, 3], SMALL, 2**63, "size` 9223372036854775808 and 12"),
        ("UINT8", [2, 2, 3], SMALL, "12", "size` 12 and 12"),
        ("UINT8", [2, 2, 3], SMALL, 12.0, "size` 12.0 and 12"),
        ("UINT8", [2, 2, 3], SMALL, True, "size` True and 12"),
        ("UINT8", [2, 2, 3], SMALL, None, "or neither"),
        ("UINT8", [2, 3, 3], SMALL, 12, "has 12 bytes. UINT8 .* takes exactly 18"),
        ("UINT8", [2**40, 2**40, 3], SMALL, 12, "takes exactly 3626777458843887524118528"),
        ("FP32", [3, 2, 2], SMALL, 12, "has 12 bytes. FP32 .* takes exactly 48"),
        ("FP32", [3, 1, 1], struct.pack("<3f", 0, np.nan, 0), 12, "not all from 0 to 1"),
        ("FP32", [3, 1, 1], struct.pack("<3f", 0, np.inf, 0), 12, "not all from 0 to 1"),
        ("BYTES", [1], b"abc", 3, "ends within element 0"),
        ("BYTES", [1], struct.pack("<I", 9) + b"abc", 7, "ends within element 0"),
        ("BYTES", [1], struct.pack("<I", 2**32 - 1) + b"abc", 7, "ends within element 0"),
        ("BYTES", [2], framed(b"abc"), 7, "ends within element 1 of 2"),
        ("BYTES", [1], framed(b"abc", b"x"), 12, "has 5 bytes after its 1 elements"),
        ("BYTES", [1], framed(b""), 4, "file is empty"),
        ("BYTES", [1], SCENE, len(SCENE), "ends within element 0"),
    ],
)
def test_binary_data_that_contradict_their_header_get_400(
    server: Running, datatype: str, shape: list[int], binary: bytes, size: Any, match: str
) -> None:
    entry = tensor(datatype, shape, parameters={} if size is None else {"binary_data_size": size})
    refused(asked(server, {"inputs": [entry]}, binary), match)


@pytest.mark.parametrize(
    ("length", "match"),
    [
        ("0", "is '0' for a body of"),
        ("-5", "is '-5'"),
        ("999999", "is '999999'"),
        ("1e3", "is '1e3'"),
        ("9" * 5000, "is '999"),
        ("\u00b2", "is "),
        ("20", "not JSON"),
    ],
)
def test_a_lie_about_the_length_of_the_json_gets_400(server: Running, length: str, match: str) -> None:
    body = json.dumps({"inputs": [tensor("UINT8", [2, 2, 3], parameters={"binary_data_size": 12})]}).encode() + SMALL
    headers = {b"inference-header-content-length": length.encode("latin-1")}
    refused(httpx.post(f"{server.url}/v2/models/door/infer", content=body, headers=headers), match)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"inputs": [' + b"[" * 100_000, "not JSON"),
        (b'{"inputs": [NaN]}', "not JSON"),
        (b'{"id": "\xed\xa0\x80"}', "not JSON"),
        (b"[" + b"0," * 2**23 + b"0]", "more than 4194304 values"),
    ],
)
def test_a_body_that_is_no_json_gets_400(server: Running, body: bytes, match: str) -> None:
    refused(httpx.post(f"{server.url}/v2/models/door/infer", content=body, timeout=30), match)


def test_a_compressed_body_is_refused_by_name(server: Running) -> None:
    answer = httpx.post(f"{server.url}/v2/models/door/infer", content=b"x", headers={"content-encoding": "gzip"})
    assert answer.status_code == 415 and "'gzip'" in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/other/ready", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("GET", "/v2/models/door/versions/1", 404),
        ("GET", "/v2/models/door/versions/1/ready", 404),
        ("POST", "/v2/models/door/versions/1/infer", 404),
        ("GET", "/v2/models/door/infer", 405),
        ("POST", "/v2/models/door", 405),
    ],
)
def test_wrong_addresses_get_a_json_error(server: Running, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == status and isinstance(answer.json()["error"], str)


def test_metadata_tells_what_is_served(server: Running) -> None:
    told = httpx.get(f"{server.url}/v2").json()
    assert told["name"] == "haechi" and told["version"] and "binary_tensor_data" in told["extensions"]
    model = httpx.get(f"{server.url}/v2/models/door").json()
    assert (model["name"], model["versions"], model["platform"]) == ("door", [server.version], "haechi_yolo")
    assert model["properties"]["classes"] == ["person", "dog"]
    assert model["properties"]["proof"] == {"golden_images": 2, "golden_boxes": 2}
    assert model["inputs"] == [{"name": "images", "datatype": "BYTES", "shape": [-1]}]
    assert httpx.get(f"{server.url}/v2/models/door/versions/{server.version}").json() == model


def test_answers_are_as_the_metadata_says(server: Running) -> None:
    said = httpx.get(f"{server.url}/v2/models/door").json()["outputs"]
    rows = asked(server, {"inputs": [GOOD]}).json()["outputs"]
    assert [(row["name"], row["datatype"]) for row in rows] == [(row["name"], row["datatype"]) for row in said]
    for row, wanted in zip(rows, said, strict=True):
        assert len(row["shape"]) == len(wanted["shape"])
        assert all(want in (-1, size) for size, want in zip(row["shape"], wanted["shape"], strict=True))
        assert len(row["data"]) == np.prod(row["shape"])


def test_every_model_and_version_says_whether_it_is_ready(server: Running) -> None:
    for path in ("/v2/models/door/ready", f"/v2/models/door/versions/{server.version}/ready"):
        answer = httpx.get(server.url + path)
        assert (answer.status_code, answer.json()) == (200, {"name": "door", "ready": True})


def test_a_model_that_loads_is_not_ready() -> None:
    models = Models()
    models.announce("door")

    async def story() -> list[httpx.Response]:
        app = create_app(Service(models, Pool(1, 0)), more=tuple(v2_routes()))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            told = [await client.get(f"/v2/models/door{path}") for path in ("/ready", "")]
            return [*told, await client.post("/v2/models/door/infer", content=SCENE)]

    answers = asyncio.run(story())
    assert [answer.status_code for answer in answers] == [503, 503, 503]
    assert answers[0].json() == {"name": "door", "ready": False}


def test_v1_calls_the_model_by_its_served_name(server: Running) -> None:
    answer = httpx.post(f"{server.url}/v1/models/door:predict", content=SCENE).json()
    assert (answer["model_name"], answer["model_version"]) == ("door", server.version)

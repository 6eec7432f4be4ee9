"""A program: ask a runtime with all clients that kserve publishes, and print what they got as JSON.

python kserve_client.py HTTP_PORT GRPC_PORT SCENE.png PIXELS.npy TENSOR.npy
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

SCENE = Path(sys.argv[3]).read_bytes()
ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "BYTES": np.array([SCENE], dtype=object),
    "UINT8": np.load(sys.argv[4]),
    "FP32": np.load(sys.argv[5]),
}
# Into JSON, kserve writes bytes as text, which no image is.
FORMS = [("BYTES", True), ("UINT8", True), ("UINT8", False), ("FP32", True), ("FP32", False)]


def request(datatype: str, binary: bool, **more: Any) -> InferRequest:
    tensor = InferInput("images", list(ARRAYS[datatype].shape), datatype)
    tensor.set_data_from_numpy(ARRAYS[datatype], binary_data=binary)
    return InferRequest("door", [tensor], request_id="k1", **more)


def told(answer: Any) -> list[Any]:
    values = {row.name: str(row.as_numpy().tolist()) for row in answer.outputs}
    return [answer.id, answer.model_name, answer.model_version, values]


async def over_v2(url: str) -> dict[str, Any]:
    async with InferenceRESTClient(RESTConfig(protocol="v2", retries=0)) as client:
        found: dict[str, Any] = {
            "rest state": [
                await client.is_server_live(url),
                await client.is_server_ready(url),
                await client.is_model_ready(url, "door"),
                await client.is_model_ready(url, "other"),
            ]
        }
        for form in FORMS:
            found[f"rest {form}"] = told(await client.infer(url, request(*form), model_name="door"))
        binary = request("BYTES", True, parameters={"binary_data_output": True})
        return found | {"rest binary out": told(await client.infer(url, binary, model_name="door"))}


async def over_v1(url: str) -> dict[str, Any]:
    entry = {"instances": [{"image": {"b64": base64.b64encode(SCENE).decode()}}]}
    async with InferenceRESTClient(RESTConfig(protocol="v1", retries=0)) as client:
        state = [await client.is_server_live(url), await client.is_model_ready(url, "door")]
        return {"v1 state": state, "v1": await client.infer(url, entry, model_name="door")}


async def over_grpc(address: str) -> dict[str, Any]:
    async with InferenceGRPCClient(address, retries=0) as client:
        found: dict[str, Any] = {
            "grpc state": [
                await client.is_server_live(),
                await client.is_server_ready(),
                await client.is_model_ready("door"),
            ]
        }
        for form in FORMS:
            found[f"grpc {form}"] = told(await client.infer(request(*form)))
        chosen = request("BYTES", True, parameters={"conf": "0.7", "max_det": 5})
        return found | {"grpc parameters": told(await client.infer(chosen))}


async def main() -> None:
    url = f"http://127.0.0.1:{sys.argv[1]}"
    print(json.dumps(await over_v2(url) | await over_v1(url) | await over_grpc(f"127.0.0.1:{sys.argv[2]}")))


asyncio.run(main())

"""The gRPC side: status codes and what they say, deadlines, overload, health and its watchers, lies in messages."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from haechi.components.shared.errors import AccessError, IntegrityError, OverloadError, StorageError
from haechi.serving import grpc_calls, grpc_health, grpc_service
from haechi.serving.engine import Engine, Models
from haechi.serving.grpc_health import OPEN_STREAMS
from haechi.serving.grpc_service import GrpcSide
from haechi.serving.pool import Pool
from haechi.serving.service import Call, Outcome, Role, Service
from haechi.serving.settings import ServingSettings
from tests.serving_process import Running, running
from tests.tiny_models import paint, shade, tiny_model_folder

SCENE = paint({(2, 3): shade(0, 0.9), (5, 5): shade(1, 0.6)})
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def channel(server: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> Any:
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensor(datatype: str, shape: list[int], **contents: Any) -> Any:
    row = pb.ModelInferRequest.InferInputTensor(name="images", datatype=datatype, shape=shape)
    if contents:
        row.contents.CopyFrom(pb.InferTensorContents(**contents))
    return row


def request(row: Any = None, raw: tuple[bytes, ...] = (), **more: Any) -> Any:
    row = tensor("BYTES", [1], bytes_contents=[SCENE]) if row is None else row
    message = pb.ModelInferRequest(model_name="door", id="7", inputs=[row], raw_input_contents=raw)
    message.MergeFrom(pb.ModelInferRequest(**more))
    return message


def failure(ask: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        ask()
    return caught.value.code(), caught.value.details()


def value(answer: Any, name: str) -> bytes:
    place = [row.name for row in answer.outputs].index(name)
    raw: bytes = answer.raw_output_contents[place]
    return raw


def parameter(choice: Any) -> Any:
    kinds: dict[type, str] = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    return pb.InferParameter(**{kinds[type(choice)]: choice})


@pytest.mark.parametrize(
    ("parameters", "count"),
    [
        ({}, 2),
        ({"conf": 0.7}, 1),
        ({"conf": "0.7"}, 1),
        ({"max_det": 1}, 1),
        ({"classes": "dog"}, 1),
        ({"classes": "cat"}, "`classes` names cat"),
        ({"conf": True}, "`conf` is 'True'"),
        ({"max_det": 0}, "`max_det` is 0"),
        ({"camera": 7}, "`camera` is '7'"),
    ],
)
def test_parameters_hold_for_the_request(stub: Any, parameters: dict[str, Any], count: int | str) -> None:
    message = request(parameters={name: parameter(choice) for name, choice in parameters.items()})
    if isinstance(count, str):
        code, details = failure(lambda: stub.ModelInfer(message))
        assert code is Code.INVALID_ARGUMENT and count in details
    else:
        answer = stub.ModelInfer(message)
        assert np.frombuffer(value(answer, "num_detections"), "<i4").tolist() == [count] and answer.id == "7"


SMALL = bytes(12)
GOOD = tensor("BYTES", [1], bytes_contents=[SCENE])


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (pb.ModelInferRequest(model_name="door"), "holds 0 tensors"),
        (request(inputs=[GOOD]), "holds 2 tensors"),
        (request(tensor("BYTES", [1])), "has 0 raw contents and no typed contents"),
        (request(raw=(b"x",)), "has 1 raw contents and bytes_contents typed"),
        (request(tensor("UINT8", [2, 2, 3]), (SMALL, SMALL)), "has 2 raw contents"),
        (request(tensor("UINT8", [2, 2, 3], int_contents=[1] * 12)), "in `int_contents`. UINT8 belongs in `uint_con"),
        (request(tensor("FP32", [3, 1, 1], fp64_contents=[0.1] * 3)), "in `fp64_contents`. FP32 belongs in `fp32_con"),
        (request(tensor("UINT8", [2, 2, 3], uint_contents=[256] * 12)), "whole numbers from 0 to 255"),
        (request(tensor("UINT8", [2, 2, 3], uint_contents=[1] * 11)), "Send 12 numbers"),
        (request(tensor("FP32", [3, 1, 1], fp32_contents=[0, float("nan"), 0])), "not all from 0 to 1"),
        (request(tensor("BYTES", [2], bytes_contents=[SCENE])), "has 1 elements"),
        (request(tensor("BYTES", [1], bytes_contents=[b""])), "file is empty"),
        (request(tensor("UINT8", [2, 2, 3]), (b"x",)), "has 1 bytes. UINT8 .* exactly 12"),
        (request(tensor("UINT8", [-2, -2, 3]), (SMALL,)), r"UINT8 of shape \[-2, -2, 3\]"),
        (request(tensor("UINT8", [2**62, 2**62, 3]), (SMALL,)), "takes exactly"),
        (request(tensor("BYTES", [1]), (b"\xff\xff\xff\xffabc",)), "ends within element 0"),
        (request(tensor("FP16", [3, 1, 1]), (b"123456",)), "is FP16 of shape"),
        (request(outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="output0")]), "no output `output0`"),
        (
            request(
                outputs=[
                    pb.ModelInferRequest.InferRequestedOutputTensor(
                        name="boxes", parameters={"classification": parameter(3)}
                    )
                ]
            ),
            "parameter `classification`",
        ),
    ],
)
def test_lies_in_a_message_are_invalid_arguments(stub: Any, message: Any, match: str) -> None:
    code, details = failure(lambda: stub.ModelInfer(message))
    assert code is Code.INVALID_ARGUMENT
    with pytest.raises(ValueError, match=match):
        raise ValueError(details)


def test_other_models_and_versions_are_not_found(stub: Any, server: Running) -> None:
    for ask in (
        lambda: stub.ModelInfer(pb.ModelInferRequest(model_name="other")),
        lambda: stub.ModelInfer(request(model_version="1")),
        lambda: stub.ModelReady(pb.ModelReadyRequest(name="other")),
        lambda: stub.ModelMetadata(pb.ModelMetadataRequest(name="door", version="1")),
    ):
        assert failure(ask)[0] is Code.NOT_FOUND
    assert stub.ModelReady(pb.ModelReadyRequest(name="door", version=server.version)).ready


def test_what_is_not_served_is_unimplemented(stub: Any) -> None:
    assert failure(lambda: stub.ModelStatistics(pb.ModelStatisticsRequest()))[0] is Code.UNIMPLEMENTED
    assert failure(lambda: list(stub.ModelStreamInfer(iter([request()]))))[0] is Code.UNIMPLEMENTED


def test_bytes_that_are_no_message_are_invalid(channel: grpc.Channel) -> None:
    ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    code, details = failure(lambda: ask(b"\xff" * 100, timeout=10))
    assert code is Code.INVALID_ARGUMENT and "no ModelInferRequest" in details


def test_an_rpc_without_a_message_is_invalid(channel: grpc.Channel) -> None:
    ask = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
    code, details = failure(lambda: ask(iter(()), timeout=10))
    assert code is Code.INVALID_ARGUMENT and "holds no message" in details


def test_a_message_above_the_limit_is_refused(folder: Path) -> None:
    limit = {"HAECHI_SERVING_MAX_BODY": "100000"}
    with running(folder, env=limit) as server, grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        message = request(tensor("BYTES", [1], bytes_contents=[bytes(200_000)]))
        assert failure(lambda: stub.ModelInfer(message))[0] is Code.RESOURCE_EXHAUSTED
        assert stub.ServerLive(pb.ServerLiveRequest()).live


def test_the_request_id_comes_back(stub: Any) -> None:
    def told(call: Any) -> str:
        return str(dict(call.trailing_metadata())["x-request-id"])

    assert told(stub.ModelInfer.with_call(request())[1]) == "7"
    assert told(stub.ModelInfer.with_call(request(), metadata=(("x-request-id", "abc"),))[1]) == "abc"
    assert len(told(stub.ServerLive.with_call(pb.ServerLiveRequest())[1])) == 32
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(pb.ModelInferRequest(model_name="other", id="9"))
    assert told(caught.value) == "9"


@pytest.mark.parametrize(
    ("name", "status"), [("", "SERVING"), ("door", "SERVING"), ("inference.GRPCInferenceService", "SERVING")]
)
def test_health(channel: grpc.Channel, name: str, status: str) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    expected = health_pb2.HealthCheckResponse.ServingStatus.Value(status)
    assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == expected
    watch = health.Watch(health_pb2.HealthCheckRequest(service=name))
    assert next(watch).status == expected
    watch.cancel()


def test_health_of_what_is_not_here(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    question = health_pb2.HealthCheckRequest(service="other")
    assert failure(lambda: health.Check(question))[0] is Code.NOT_FOUND
    watch = health.Watch(question)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


def test_watchers_and_reflection_have_places_of_their_own(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    endless = health.Watch(health_pb2.HealthCheckRequest(service="x" * 1000))
    assert failure(lambda: next(endless))[0] is Code.INVALID_ARGUMENT, "it would be kept as long as somebody watches"

    def refusals() -> int:
        done = threading.Event()

        def asks() -> Iterator[reflection_pb2.ServerReflectionRequest]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            done.wait(20)

        many = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(30)]
        many += [reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asks()) for _ in range(10)]
        refused = 0
        for stream in many:
            try:
                next(stream)
            except grpc.RpcError as error:
                assert error.code() is Code.RESOURCE_EXHAUSTED
                refused += 1
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == health_pb2.HealthCheckResponse.SERVING
        done.set()
        for stream in many:
            stream.cancel()
        return refused

    assert refusals() == 30 + 10 - OPEN_STREAMS
    end = time.monotonic() + 30
    while refusals() != 30 + 10 - OPEN_STREAMS:
        assert time.monotonic() < end, "places do not come back"
        time.sleep(0.1)


def test_rpcs_whose_message_never_comes_keep_nobody_out(channel: grpc.Channel) -> None:
    end = threading.Event()

    def nothing() -> Iterator[bytes]:
        end.wait(20)
        yield from ()

    ask = channel.stream_unary("/inference.GRPCInferenceService/ModelReady")
    silent = [ask.future(nothing()) for _ in range(150)]
    try:
        time.sleep(0.5)
        health = health_pb2_grpc.HealthStub(channel)
        for _ in range(20):
            question = health_pb2.HealthCheckRequest()
            assert health.Check(question, timeout=5).status == health_pb2.HealthCheckResponse.SERVING
        assert silent[0].code() is Code.DEADLINE_EXCEEDED and not silent[-1].done()
    finally:
        end.set()
        for call in silent:
            call.cancel()


def test_idle_connections_leave_files_for_http(server: Running) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
    with contextlib.ExitStack() as closing:
        for _ in range(450):
            connection = closing.enter_context(socket.create_connection(("127.0.0.1", server.grpc), timeout=5))
            with contextlib.suppress(OSError):
                connection.sendall(preface)
        files, end = Path(f"/proc/{server.process.pid}/fd"), time.monotonic() + 30
        while len(list(files.iterdir())) >= 450 and time.monotonic() < end:
            time.sleep(0.1)
        assert len(list(files.iterdir())) < 450
        assert httpx.get(f"{server.url}/v2/health/live", timeout=5).status_code == 200
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as again:
        question = health_pb2.HealthCheckRequest()
        answer = health_pb2_grpc.HealthStub(again).Check(question, timeout=10, wait_for_ready=True)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


class Watcher:
    """Keeps the calls that have ended."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def started(self, call: Call) -> None:
        pass

    def finished(self, call: Call) -> None:
        self.calls.append(call)


class Keys:
    """Access for those who hold `x-key: good`; `x-key: weak` is known but may nothing."""

    async def check(self, headers: Mapping[str, str], role: Role) -> str:
        key = headers.get("x-key")
        if key != "good":
            raise AccessError("this key may not predict", "Ask for another.", known=key == "weak")
        return "tester"


class Local:
    """The gRPC side in this process, on its own loop, with what a test wants to look at."""

    def __init__(self, folder: Path, workers: int = 1, queue: int = 1, access: Any = None, ready: bool = True) -> None:
        self.watcher = Watcher()
        self.models = Models()
        self.models.announce("door")
        model = tiny_model_folder(folder, ["person"])
        if ready:
            self.models.put("door", Engine(folder, model, ServingSettings(threads=1)))
        self.service = Service(self.models, Pool(workers, queue), 30.0, access, [self.watcher])

    async def __aenter__(self) -> Local:
        self.side = GrpcSide(self.service, "127.0.0.1:0", 2**20)
        await self.side.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.side.port}")
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self.side.stop(5)
        self.service.pool.close()

    async def code(self, call: Any) -> grpc.StatusCode:
        try:
            await call
        except grpc.aio.AioRpcError as error:
            self.details = error.details() or ""
            return error.code()
        return Code.OK

    async def ended(self, count: int) -> list[Call]:
        """The first calls to end, once there are so many: an answer reaches its caller before its call has ended here."""
        async with asyncio.timeout(10):
            while len(self.watcher.calls) < count:
                await asyncio.sleep(0.001)
        return self.watcher.calls


def test_overload_and_deadlines(tmp_path: Path) -> None:
    async def story() -> list[grpc.StatusCode]:
        async with Local(tmp_path) as local:
            hold = threading.Event()
            held = asyncio.create_task(local.service.pool.run(hold.wait))
            await asyncio.sleep(0.05)
            waiting = asyncio.create_task(local.code(local.stub.ModelInfer(request())))
            await asyncio.sleep(0.05)
            begun = time.monotonic()
            refused = await local.code(local.stub.ModelInfer(request()))
            assert time.monotonic() - begun < 1 and "holds 2 requests" in local.details
            alive = await local.code(local.stub.ServerLive(pb.ServerLiveRequest()))
            hold.set()
            await held
            codes = [refused, alive, await waiting]
            hold.clear()
            held = asyncio.create_task(local.service.pool.run(hold.wait))
            await asyncio.sleep(0.05)
            codes.append(await local.code(local.stub.ModelInfer(request(), timeout=0.2)))
            hold.set()
            await held
            outcomes = [call.outcome for call in await local.ended(4) if call.path.endswith("Infer")]
            assert outcomes[:2] == [Outcome.OVERLOAD, Outcome.OK]
            assert outcomes[2] in (Outcome.DEADLINE, Outcome.CANCELLED)
            return codes

    assert asyncio.run(story()) == [Code.RESOURCE_EXHAUSTED, Code.OK, Code.OK, Code.DEADLINE_EXCEEDED]


def test_our_own_time_limit_counts_too(tmp_path: Path) -> None:
    async def story() -> grpc.StatusCode:
        async with Local(tmp_path) as local:
            local.service.timeout = 0.1
            hold = threading.Event()
            held = asyncio.create_task(local.service.pool.run(hold.wait))
            await asyncio.sleep(0.05)
            code = await local.code(local.stub.ModelInfer(request()))
            hold.set()
            await held
            return code

    assert asyncio.run(story()) is Code.DEADLINE_EXCEEDED


def test_who_may_not_is_told_so_before_a_message_is_read(tmp_path: Path) -> None:
    async def story() -> list[grpc.StatusCode]:
        async with Local(tmp_path, access=Keys()) as local:
            infer = local.stub.ModelInfer
            codes = [await local.code(infer(request(), metadata=meta)) for meta in ((), (("x-key", "weak"),))]
            assert [call.bytes_in for call in await local.ended(2)] == [0, 0]
            codes.append(await local.code(infer(request(), metadata=(("x-key", "good"),))))
            calls = await local.ended(3)
            assert [call.outcome for call in calls] == [Outcome.DENIED, Outcome.DENIED, Outcome.OK]
            assert calls[-1].caller == "tester"
            return codes

    assert asyncio.run(story()) == [Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.OK]


def test_watchers_see_the_whole_call(tmp_path: Path) -> None:
    async def story() -> Call:
        async with Local(tmp_path) as local:
            metadata = (("x-haechi-camera", "gate"), ("trace-bin", b"\xff"))
            await local.stub.ModelInfer(request(), metadata=metadata)
            named = request(parameters={"camera": parameter("yard")})
            await local.stub.ModelInfer(named, metadata=metadata)
            calls = await local.ended(2)
            assert [call.camera for call in calls] == ["gate", "yard"]
            return calls[0]

    call = asyncio.run(story())
    assert (call.protocol, call.path) == ("grpc", "/inference.GRPCInferenceService/ModelInfer")
    assert (call.model, call.request_id, call.status, call.outcome) == ("door", "7", 0, Outcome.OK)
    assert call.bytes_in == len(request().SerializeToString()) and call.engine and call.predictions
    assert set(call.stages.seconds) == {"queue", "decode", "infer", "post"}


def test_while_a_model_loads_nothing_is_ready_and_watchers_hear_when_it_is(tmp_path: Path) -> None:
    status = health_pb2.HealthCheckResponse

    async def story() -> list[int]:
        async with Local(tmp_path, ready=False) as local:
            assert await local.code(local.stub.ModelInfer(request())) is Code.UNAVAILABLE
            assert await local.code(local.stub.ModelMetadata(pb.ModelMetadataRequest(name="door"))) is Code.UNAVAILABLE
            assert not (await local.stub.ServerReady(pb.ServerReadyRequest())).ready
            assert not (await local.stub.ModelReady(pb.ModelReadyRequest(name="door"))).ready
            health = health_pb2_grpc.HealthStub(local.channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(service="door"))
            heard = [(await watch.read()).status]
            engine = Engine(tmp_path, tiny_model_folder(tmp_path, ["person"]), ServingSettings(threads=1))
            local.models.put("door", engine)
            heard.append((await watch.read()).status)
            begun = time.monotonic()
            stopping = asyncio.create_task(local.side.stop(20))
            heard.append((await watch.read()).status)
            assert await watch.read() is grpc.aio.EOF
            await stopping
            assert time.monotonic() - begun < 5, "a watcher does not hold up the end"
            return heard

    assert asyncio.run(story()) == [status.NOT_SERVING, status.SERVING, status.NOT_SERVING]


def test_a_message_that_never_comes_ends_the_rpc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_calls, "_MESSAGE_SECONDS", 0.1)

    async def story() -> grpc.StatusCode:
        async with Local(tmp_path) as local:
            call = local.channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")()
            code = await local.code(call)
            assert "did not arrive" in local.details
            assert await local.code(local.stub.ModelInfer(request())) is Code.OK
            return code

    assert asyncio.run(story()) is Code.DEADLINE_EXCEEDED


def test_a_forgotten_reflection_stream_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_health, "_REFLECTION_SECONDS", 0.2)

    async def story() -> grpc.StatusCode:
        async with Local(tmp_path) as local:
            stream = reflection_pb2_grpc.ServerReflectionStub(local.channel).ServerReflectionInfo()
            await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            assert len((await stream.read()).list_services_response.service) == 3
            return await local.code(stream.read())

    assert asyncio.run(story()) is Code.DEADLINE_EXCEEDED


def test_more_rpcs_than_may_run_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_service, "_SPARE", -grpc_calls.ARRIVING - OPEN_STREAMS)  # as if it were two in all

    async def story() -> grpc.StatusCode:
        async with Local(tmp_path) as local:
            health = health_pb2_grpc.HealthStub(local.channel)
            watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
            for watch in watches:
                await watch.read()
            code = await local.code(local.stub.ModelInfer(request()))
            for watch in watches:
                watch.cancel()
            return code

    assert asyncio.run(story()) is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("error", "code", "details"),
    [
        (OverloadError("full"), Code.RESOURCE_EXHAUSTED, "full"),
        (StorageError("away"), Code.UNAVAILABLE, "away"),
        (StorageError("x" * 9000), Code.UNAVAILABLE, "x" * 1000),
        (IntegrityError("secret path"), Code.INTERNAL, "internal error; the server's log has the details"),
        (ValueError("secret"), Code.INTERNAL, "internal error; the server's log has the details"),
    ],
)
def test_errors_have_their_code_and_our_own_no_details(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: grpc.StatusCode, details: str
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(Engine, "predict", broken)

    async def story() -> tuple[grpc.StatusCode, str]:
        async with Local(tmp_path) as local:
            told = await local.code(local.stub.ModelInfer(request()))
            call = (await local.ended(1))[-1]
            assert call.error is error and call.status == code.value[0]
            return told, local.details

    assert asyncio.run(story()) == (code, details)

"""Hot swaps: what the folder holds is proven beside what serves, and takes its place without a failed request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from haechi.components.shared.errors import LoadRefused, ModelError, NotFoundError
from haechi.components.shared.files import read_json, write_json
from haechi.components.shared.model_folder import ModelFolder
from haechi.serving.api_keys import new_key
from haechi.serving.engine import Engine, Models
from haechi.serving.service import Role
from haechi.serving.settings import ServingSettings
from haechi.serving.swap import Swapper
from tests.load_threads import LoadThreads
from tests.serving_process import Running, running
from tests.tiny_models import cell_box, paint, shade, tiny_model_folder

SCENE = paint({(2, 3): shade(0, 0.9)})
PLAIN = {"HAECHI_SERVING_ENGINE": "onnxruntime", "HAECHI_SERVING_BATCH": "1"}
SETTINGS = ServingSettings(engine="onnxruntime", threads=1, batch=1)


class World:
    """A swapper over `folder`, what it opened and what it told."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.models, self.folder = Models(), folder
        self.models.announce("tiny")
        self.opened: list[str] = []
        self.told: list[tuple[str, str]] = []
        self.during: Callable[[], object] = lambda: None
        self.swapper = Swapper(self.models, "tiny", folder, self._open, 0.02, on_swap=self._tell, **options)

    @property
    def served(self) -> str:
        return self.models.find("tiny").model.version

    def _tell(self, outcome: str, version: str) -> None:
        self.told.append((outcome, version))

    def _open(self, folder: Path, model: ModelFolder) -> Engine:
        self.opened.append(model.version)
        engine = Engine(folder, model, SETTINGS)
        self.during()
        return engine

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        await self.swapper.first()
        watching = asyncio.create_task(self.swapper.watch())
        try:
            yield
            assert not watching.done(), "nothing ends the watch"
        finally:
            watching.cancel()
            self.swapper.close()

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not true():
                await asyncio.sleep(0.01)


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scene)


def point(link: Path, to: Path) -> None:
    following = link.with_name(".next")
    following.symlink_to(to)
    following.replace(link)


def version(folder: Path) -> str:
    told: str = read_json(folder / "model.json")["version"]
    return told


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`a`, `b` and `c` with boxes 0, 4 and 8 pixels off, and `current` that names `a`, as deploy leaves them."""
    for name, shift in (("a", 0), ("b", 4), ("c", 8)):
        tiny_model_folder(tmp_path / name, ["person"], shift=shift)
    (tmp_path / "current").symlink_to("a")
    return tmp_path


def by_symlink(root: Path) -> None:
    point(root / "current", Path("b"))


def by_rename(root: Path) -> None:
    (root / "a").rename(root / "old")
    shutil.copytree(root / "b", root / "a.partial")
    (root / "a.partial").rename(root / "a")


def in_place(root: Path) -> None:
    shutil.copytree(root / "b", root / "a", dirs_exist_ok=True)


def with_times(root: Path) -> None:
    """As `rsync -t` writes: old times, and here even the same size."""
    for file in ("model.onnx", "model.json", "golden/golden.json"):
        shutil.copy2(root / "b" / file, root / "a" / file)


@pytest.mark.parametrize("change", [by_symlink, by_rename, in_place, with_times])
def test_another_model_in_the_folder_is_served(root: Path, change: Callable[[Path], None]) -> None:
    async def scene() -> None:
        world = World(root / "current")
        async with world.watched():
            former, wanted = world.served, version(root / "b")
            change(root)
            await world.until(lambda: world.served == wanted)
            assert world.told[-1] == ("swapped", wanted) and former != wanted

    play(scene())


def test_new_thresholds_are_another_model_and_a_touched_file_is_not(root: Path) -> None:
    async def scene() -> None:
        world = World(root / "current")
        async with world.watched():
            engine = world.models.find("tiny")
            (root / "a" / "model.onnx").touch()
            await asyncio.sleep(0.2)
            assert world.models.find("tiny") is engine and world.told == []
            entry = read_json(root / "a" / "model.json")
            write_json(root / "a" / "model.json", entry | {"thresholds": {"person": 0.9}})
            await world.until(lambda: world.models.find("tiny").model.thresholds == {"person": 0.9})
            assert world.told == [("swapped", version(root / "a"))]

    play(scene())


def test_a_folder_that_is_away_for_a_moment_is_no_error(root: Path) -> None:
    async def scene() -> None:
        world = World(root / "current")
        async with world.watched():
            (root / "a").rename(root / "away")
            await asyncio.sleep(0.2)
            with pytest.raises(LoadRefused, match="no complete model folder"):
                await world.swapper.load("tiny")
            point(root / "current", root / "current")  # a symlink to itself
            await asyncio.sleep(0.1)
            assert world.served == version(root / "away") and world.told == []
            point(root / "current", Path("b"))
            await world.until(lambda: world.served == version(root / "b"))

    play(scene())


def test_what_is_still_being_written_is_never_opened(root: Path) -> None:
    """A slow copy in place: description first, then the graph in pieces, with no pause as long as two looks."""

    async def scene() -> None:
        world = World(root / "current")
        async with world.watched():
            world.opened.clear()
            data = (root / "b" / "model.onnx").read_bytes()
            shutil.copy(root / "b" / "model.json", root / "a")
            shutil.copytree(root / "b" / "golden", root / "a" / "golden", dirs_exist_ok=True)
            with (root / "a" / "model.onnx").open("wb", buffering=0) as file:
                for start in range(0, len(data), 100):
                    file.write(data[start : start + 100])
                    await asyncio.sleep(0.005)
            await world.until(lambda: world.served == version(root / "b"))
            assert world.told == [("swapped", version(root / "b"))] and len(world.opened) == 1

    play(scene())


def test_a_half_written_model_is_refused_once_and_taken_when_it_is_whole(root: Path) -> None:
    async def scene() -> None:
        world = World(root / "current")
        async with world.watched():
            data = (root / "b" / "model.onnx").read_bytes()
            in_place(root)
            (root / "a" / "model.onnx").write_bytes(data[:1000])
            former = world.served
            await world.until(lambda: bool(world.told))
            await asyncio.sleep(0.2)
            assert world.told == [("refused", version(root / "b"))] and world.served == former
            assert "not the file that model.json describes" in world.swapper.index()[0]["reason"]
            (root / "a" / "model.onnx").write_bytes(data)
            await world.until(lambda: world.served == version(root / "b"))
            assert world.swapper.index()[0]["reason"] == ""

    play(scene())


def test_what_changes_while_it_is_read_is_not_served(root: Path) -> None:
    async def scene() -> None:
        world = World(root / "current")
        await world.swapper.first()
        former = world.models.find("tiny")
        point(root / "current", Path("b"))
        world.during = (root / "b" / "golden" / "empty.png").touch
        with pytest.raises(LoadRefused, match="changed while it was read"):
            await world.swapper.load("tiny")
        assert world.models.find("tiny") is former and world.told == []
        world.during = lambda: None
        assert await world.swapper.load("tiny") == version(root / "b")
        world.swapper.close()

    play(scene())


def golden_off(folder: Path) -> None:
    golden = read_json(folder / "golden" / "golden.json")
    golden["images"][0]["boxes"][0]["box"][0] += 20
    write_json(folder / "golden" / "golden.json", golden)


def no_graph(folder: Path) -> None:
    from haechi.components.shared.files import sha256_file

    (folder / "model.onnx").write_bytes(b"no graph")
    digest = sha256_file(folder / "model.onnx")
    entry = read_json(folder / "model.json")
    write_json(folder / "model.json", entry | {"onnx_sha256": digest, "version": digest[:12]})


def unproven(folder: Path) -> None:
    shutil.rmtree(folder / "golden")
    write_json(folder / "model.json", read_json(folder / "model.json") | {"golden": 0})


def another(folder: Path) -> None:
    write_json(folder / "model.json", read_json(folder / "model.json") | {"name": "other"})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (golden_off, "golden images give other boxes"),
        (no_graph, "cannot be opened"),
        (unproven, "no golden images"),
        (another, "holds model other now, not tiny"),
        (lambda folder: (folder / "model.json").write_text("{"), "model.json cannot be read"),
        (lambda folder: (folder / "golden" / "empty.png").unlink(), "golden images"),
    ],
)
def test_a_bad_model_is_refused_once_with_its_reason(
    root: Path, spoil: Callable[[Path], object], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    async def scene() -> None:
        world = World(root / "current", any_name=False)
        async with world.watched():
            former = world.models.find("tiny")
            spoil(root / "b")
            world.opened.clear()
            point(root / "current", Path("b"))
            await world.until(lambda: bool(world.told))
            await asyncio.sleep(0.3)
            assert [outcome for outcome, _ in world.told] == ["refused"] and len(world.opened) <= 1
            assert world.models.find("tiny") is former and reason in world.swapper.index()[0]["reason"]
            with pytest.raises(LoadRefused, match=reason):  # asked by a person, it is tried again
                await world.swapper.load("tiny")
            point(root / "current", Path("c"))
            await world.until(lambda: world.served == version(root / "c"))

    play(scene())
    log = capfd.readouterr().err
    assert log.count("is refused") == 1 and reason in log


def test_a_crash_of_the_engine_does_not_end_the_watch(root: Path) -> None:
    async def scene() -> None:
        world = World(root / "current")
        async with world.watched():
            world.during = lambda: 1 / 0
            point(root / "current", Path("b"))
            await world.until(lambda: world.told == [("refused", version(root / "b"))])
            world.during = lambda: None
            point(root / "current", Path("c"))
            await world.until(lambda: world.served == version(root / "c"))

    play(scene())


def test_the_first_load_starts_over_where_the_folder_changes_under_it(root: Path) -> None:
    async def scene() -> None:
        world = World(root / "current")
        changes = iter([root / "a" / "model.json"])
        world.during = lambda: [path.touch() for path in changes]
        assert (await world.swapper.first()).version == version(root / "a")
        assert len(world.opened) == 2
        endless = World(root / "current")
        endless.during = (root / "a" / "model.json").touch
        with pytest.raises(ModelError, match="changes all the time"):
            await endless.swapper.first()
        with pytest.raises(NotFoundError):
            await world.swapper.load("other")
        world.swapper.close()
        endless.swapper.close()

    play(scene())


# The process: administration, and swaps under load -----------------------------------------------------------------


@contextlib.contextmanager
def guarded(folder: Path, keys: Path, **env: str) -> Iterator[tuple[Running, dict[str, str], dict[str, str]]]:
    """A runtime with an administrator and one who may only predict: the process and their headers."""
    admin, predict = new_key("boss", [Role.ADMIN]), new_key("camera", [Role.PREDICT])
    keys.write_text(f"{admin[1]}\n{predict[1]}\n")
    with running(folder, env={**PLAIN, "HAECHI_SERVING_API_KEYS": str(keys), **env}) as server:
        # A line for each swap: a pipe that nobody reads would be full after some hundred.
        threading.Thread(target=_swallow, args=[server.process], daemon=True).start()
        yield server, {"authorization": f"Bearer {admin[0]}"}, {"x-api-key": predict[0]}


def _swallow(process: subprocess.Popen[str]) -> None:
    assert process.stderr
    while os.read(process.stderr.fileno(), 65536):
        pass


def test_an_administrator_loads_with_tritons_client(root: Path, tmp_path: Path) -> None:
    with guarded(root / "current", tmp_path / "keys", HAECHI_SERVING_WATCH="0") as (server, admin, camera):
        client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.http}")
        row = {"name": "tiny", "version": version(root / "a"), "state": "READY", "reason": ""}
        assert client.get_model_repository_index(headers=admin) == [row]
        point(root / "current", Path("b"))
        client.load_model("tiny", headers=admin)
        assert client.get_model_repository_index(headers=admin)[0]["version"] == version(root / "b")
        metadata = client.get_model_metadata("tiny", headers=camera)
        assert metadata["versions"] == [version(root / "b")]

        golden_off(root / "c")
        point(root / "current", Path("c"))
        for ask, problem in (
            (lambda: client.load_model("tiny", headers=admin), "golden images give other boxes"),
            (lambda: client.load_model("other", headers=admin), "no model 'other'"),
            (lambda: client.load_model("tiny", headers=admin, config="{}"), "cannot be sent along"),
            (lambda: client.unload_model("tiny", headers=admin), "is the only model here"),
            (lambda: client.load_model("tiny", headers=camera), "wants the role admin"),
            (lambda: client.load_model("tiny"), "not known"),
        ):
            with pytest.raises(InferenceServerException, match=problem) as caught:
                ask()
            assert caught.value.status().startswith("4"), caught.value
        row = client.get_model_repository_index(headers=admin)[0]
        assert (row["version"], row["state"]) == (version(root / "b"), "READY") and "refused" in row["reason"]
        for body in (b"[", b"[]", b"\xff"):
            told = httpx.post(f"{server.url}/v2/repository/models/tiny/load", content=body, headers=admin)
            assert told.status_code == 400
        client.close()


def test_an_administrator_loads_over_grpc(root: Path, tmp_path: Path) -> None:
    with guarded(root / "current", tmp_path / "keys", HAECHI_SERVING_WATCH="0") as (server, admin, camera):
        client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        point(root / "current", Path("b"))
        client.load_model("tiny", headers=admin)
        row = client.get_model_repository_index(headers=admin, as_json=True)["models"][0]
        assert row == {"name": "tiny", "version": version(root / "b"), "state": "READY"}
        golden_off(root / "c")
        point(root / "current", Path("c"))
        for ask, code, problem in (
            (lambda: client.load_model("tiny", headers=admin), "FAILED_PRECONDITION", "golden images give other boxes"),
            (lambda: client.load_model("other", headers=admin), "NOT_FOUND", "no model 'other'"),
            (lambda: client.load_model("tiny", headers=admin, config="{}"), "INVALID_ARGUMENT", "cannot be sent along"),
            (lambda: client.unload_model("tiny", headers=admin), "INVALID_ARGUMENT", "is the only model here"),
            (lambda: client.load_model("tiny", headers=camera), "PERMISSION_DENIED", "wants the role admin"),
            (lambda: client.get_model_repository_index(), "UNAUTHENTICATED", "not known"),
        ):
            with pytest.raises(InferenceServerException, match=problem) as caught:
                ask()
            assert caught.value.status() == f"StatusCode.{code}"
        assert "refused" in client.get_model_repository_index(headers=admin).models[0].reason
        client.close()


def test_nobody_administers_where_no_one_is_known(root: Path) -> None:
    with running(root / "current", env=PLAIN) as server:
        for path in ("index", "models/tiny/load", "models/tiny/unload"):
            told = httpx.post(f"{server.url}/v2/repository/{path}")
            assert told.status_code == 403 and "HAECHI_SERVING_API_KEYS" in told.json()["error"]


class Askers(LoadThreads):
    """Threads that ask without a pause, over HTTP and gRPC, and compare each answer with the version that it names."""

    def __init__(self, server: Running, headers: dict[str, str], boxes: dict[str, list[float]]) -> None:
        self._server, self._headers, self._boxes = server, headers, boxes
        super().__init__(self._http, self._http, self._grpc)

    def _compare(self, protocol: str, named: str, box: list[float]) -> None:
        time.sleep(0.01)  # most of both cores is for the swaps
        self.seen[protocol] += 1
        self.seen[named] += 1
        if not np.allclose(box, self._boxes[named], atol=0.1):
            self.wrong.append(f"{protocol}: {named} with {box}")

    def _http(self) -> None:
        with httpx.Client(headers=self._headers, timeout=30) as client:
            while not self.ended:
                told = client.post(f"{self._server.url}/v1/models/tiny:predict", content=SCENE)
                if told.status_code != 200:
                    self.wrong.append(told.text)
                    return
                answer = told.json()
                self._compare("http", answer["model_version"], answer["predictions"][0]["detections"][0]["box"])

    def _grpc(self) -> None:
        client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{self._server.grpc}")
        data = np.array([SCENE], dtype=np.object_)
        tensor = tritonclient.grpc.InferInput("images", [1], np_to_triton_dtype(data.dtype))
        tensor.set_data_from_numpy(data)
        while not self.ended:
            told = client.infer("tiny", [tensor], headers=self._headers)
            self._compare("grpc", told.get_response().model_version, told.as_numpy("boxes").reshape(-1, 4)[0].tolist())
        client.close()


def boxes_of(root: Path, shifts: dict[str, int]) -> dict[str, list[float]]:
    """The box of SCENE by version."""
    x1, y1, x2, y2 = cell_box(2, 3)
    return {version(root / name): [x1 + shift, y1, x2 + shift, y2] for name, shift in shifts.items()}


def test_a_thousand_swaps_under_load_fail_no_request_and_leave_nothing_behind(root: Path, tmp_path: Path) -> None:
    boxes = boxes_of(root, {"a": 0, "b": 4, "c": 8})
    with guarded(root / "current", tmp_path / "keys", HAECHI_SERVING_WATCH="0") as (server, admin, camera):
        process = psutil.Process(server.process.pid)
        sizes, folders = [], itertools.cycle("bca")
        with Askers(server, camera, boxes) as askers, httpx.Client(headers=admin, timeout=30) as client:
            for number in range(1000):
                name = next(folders)
                point(root / "current", Path(name))
                told = client.post(f"{server.url}/v2/repository/models/tiny/load")
                assert told.status_code == 200 and told.json() == {"version": version(root / name)}
                if number % 50 == 0:
                    sizes.append(process.memory_info().rss / 2**20)
        assert askers.wrong == []
        assert askers.seen["http"] > 100 and askers.seen["grpc"] > 50 and all(askers.seen[each] for each in boxes)
        told = metrics_of(server, camera)
        assert told['haechi_swaps_total{model="tiny",outcome="swapped"}'] == 1000
    print("\nMiB:", [round(size, 1) for size in sizes], dict(askers.seen))
    # A session takes about 1 MiB: kept ones would show as hundreds.
    assert min(sizes[-5:]) < max(sizes[2:6]) + 10, sizes


def metrics_of(server: Running, headers: dict[str, str]) -> dict[str, float]:
    lines = httpx.get(f"{server.url}/metrics", headers=headers).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_the_watch_swaps_under_load_too(root: Path, tmp_path: Path) -> None:
    boxes = boxes_of(root, {"a": 0, "b": 4})
    with guarded(root / "current", tmp_path / "keys", HAECHI_SERVING_WATCH="0.1") as (server, _, camera):
        with Askers(server, camera, boxes) as askers:
            for name in "baba":
                point(root / "current", Path(name))
                end, wanted = time.monotonic() + 10, version(root / name)
                while askers.seen[wanted] == 0 and time.monotonic() < end:
                    time.sleep(0.02)
                assert askers.seen[wanted], f"{name} was not served"
                askers.seen.clear()
        assert askers.wrong == []

"""The API's description against the real process: it names every path, its examples work, and nothing answers otherwise."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from PIL import Image
from starlette.routing import Route

from haechi.serving import serve as process
from haechi.serving.api_keys import new_key
from haechi.serving.openapi import openapi
from haechi.serving.service import Role
from haechi.serving.settings import ServingSettings
from tests.serving_process import Running, running
from tests.tiny_models import paint, shade, tiny_model_folder

CLASSES = ["smoke", "fire", "person_down"]
SCENE = paint({(2, 3): shade(0, 0.9), (5, 5): shade(1, 0.6)})
EVIL = """<b>it's "red" & more"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    tiny_model_folder(folder, CLASSES)
    return folder


@pytest.fixture(scope="module")
def guarded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, dict[str, str]]]:
    """A process that wants keys, and the headers of an administrator."""
    key, line = new_key("ops", [Role.ADMIN])
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(line)
    with running(
        folder, "--name", "safety", env={"HAECHI_SERVING_API_KEYS": str(keys)}, stdout=subprocess.DEVNULL
    ) as server:
        yield server, {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def evil(folder: Path) -> Iterator[Running]:
    """A process that is open, and whose model has a name that breaks whatever does not quote it."""
    with running(folder, "--name", EVIL, stdout=subprocess.DEVNULL) as server:
        yield server


@pytest.fixture(scope="module")
def document(guarded: tuple[Running, dict[str, str]]) -> dict[str, Any]:
    answer = httpx.get(f"{guarded[0].url}/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    told: dict[str, Any] = answer.json()
    return told


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def filled(path: str, server: Running) -> str:
    return server.url + path.replace("{name}", "safety").replace("{version}", server.version)


def valid(value: Any, schema: dict[str, Any], document: dict[str, Any]) -> None:
    Draft202012Validator({**schema, "components": document["components"]}).validate(value)


class Seen(Exception):
    """The application was made."""


def test_every_route_that_the_process_has_is_described_and_no_other(
    folder: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    create = process.create_app

    def catch(*arguments: Any) -> Any:
        made.append(create(*arguments))
        raise Seen

    monkeypatch.setattr(process, "create_app", catch)
    with pytest.raises(Seen):
        process.serve(folder, 0, 0, settings=ServingSettings())
    routes = [route for route in made[0]._app.routes if isinstance(route, Route)]
    assert len(routes) == len(made[0]._app.routes)
    real = {(route.path, method) for route in routes for method in route.methods or () if method != "HEAD"}
    assert {(path, method.upper()) for path, method, _ in operations(document)} == real


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("name", ["safety", EVIL])
def test_the_document_is_valid(name: str, closed: bool) -> None:
    document = openapi(name, closed)
    OpenAPIV31SpecValidator(document).validate()
    used = json.dumps(document)
    for kind, parts in document["components"].items():
        for part in parts:
            assert kind == "securitySchemes" or f'"#/components/{kind}/{part}"' in used, f"{kind}/{part} is not used"


def test_the_examples_work_and_are_answered_as_described(
    guarded: tuple[Running, dict[str, str]], document: dict[str, Any]
) -> None:
    server, admin = guarded
    sent = 0
    for path, method, operation in operations(document):
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        bodies = [example["value"] for example in content.get("examples", {}).values()] or [None]
        for body in bodies:
            if body is not None:
                valid(body, content["schema"], document)
            answer = httpx.request(method, filled(path, server), json=body, headers=admin)
            assert answer.status_code == (400 if path.endswith("/unload") else 200), (path, answer.text)
            assert answer.headers["x-request-id"]
            sent += 1
            good = operation["responses"].get("200", {}).get("content", {}).get("application/json")
            if good and answer.status_code == 200:
                valid(answer.json(), good["schema"], document)
                if "example" in good:
                    valid(good["example"], good["schema"], document)
    assert sent == 24


@pytest.mark.parametrize("form", ["image/*", "application/octet-stream"])
def test_an_image_may_be_the_body_where_it_says_so(
    guarded: tuple[Running, dict[str, str]], document: dict[str, Any], form: str
) -> None:
    server, admin = guarded
    kind = form.replace("*", "png")
    for path, method, operation in operations(document):
        if form in operation.get("requestBody", {}).get("content", {}):
            answer = httpx.request(method, filled(path, server), content=SCENE, headers={**admin, "content-type": kind})
            assert answer.status_code == 200, answer.text
            valid(answer.json(), operation["responses"]["200"]["content"]["application/json"]["schema"], document)


def test_a_key_is_wanted_where_it_says_so(guarded: tuple[Running, dict[str, str]], document: dict[str, Any]) -> None:
    server, _ = guarded
    for path, method, operation in operations(document):
        answer = httpx.request(method, filled(path, server))
        assert (answer.status_code == 401) == bool(operation["security"]), path
        if answer.status_code == 401:
            assert answer.headers["www-authenticate"] == "Bearer"


def test_without_keys_only_administration_is_closed(evil: Running) -> None:
    document = httpx.get(f"{evil.url}/openapi.json").json()
    closed = {path for path, _, operation in operations(document) if operation["security"]}
    assert closed and all(path.startswith("/v2/repository/") for path in closed)
    assert httpx.post(f"{evil.url}/v2/repository/index").status_code == 403
    assert document["components"]["parameters"]["name"]["schema"]["enum"] == [EVIL]


def test_schemathesis_finds_no_answer_that_is_not_described(
    guarded: tuple[Running, dict[str, str]], tmp_path: Path
) -> None:
    server, admin = guarded
    # Names that we do not know are passed over, in bodies and addresses, as gateways and clients add their own.
    (tmp_path / "schemathesis.toml").write_text("[generation]\nallow-extra-parameters = false\n")
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("schemathesis")), "--no-color"),
            *("--config-file", "schemathesis.toml", "run", f"{server.url}/openapi.json"),
            *("--phases", "examples,coverage,fuzzing", "--max-examples", "60", "--seed", "7"),
            *("--header", f"Authorization: {admin['authorization']}", "--max-response-time", "10"),
            # No schema can say which base64 text is an image, or that a shape fits its data.
            *("--exclude-checks", "positive_data_acceptance", "--warnings", "off", "--no-shrink"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(operations(openapi('safety')))} passed" in done.stdout.partition("Fuzzing")[2], done.stdout
    assert httpx.get(f"{server.url}/v2/health/ready").status_code == 200


@pytest.fixture
def view(browser: Any) -> Iterator[Any]:
    """A page; `view.asked` and `view.told` are the addresses that it went to and what it complained of."""
    view = browser.new_page(viewport={"width": 1000, "height": 900})
    view.asked, view.told = [], []
    view.on("request", lambda request: view.asked.append(request.url))
    view.on("console", lambda message: view.told.append(message.text))
    view.on("pageerror", lambda error: view.told.append(str(error)))
    view.on("dialog", lambda dialog: view.told.append("dialog"))
    yield view
    view.close()


def drawn(view: Any) -> Image.Image:
    """What the canvas shows."""
    read = """() => {
        const canvas = document.getElementById('drawn');
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return [canvas.width, canvas.height, [...data]];
    }"""
    width, height, values = view.evaluate(read)
    return Image.frombytes("RGBA", (width, height), bytes(values)).convert("RGB")


def test_the_page_works_by_itself_and_draws_the_boxes(evil: Running, view: Any, tmp_path: Path) -> None:
    answer = view.goto(f"{evil.url}/docs")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert view.locator("h1").inner_text().startswith(EVIL)
    view.locator("#state", has_text="ready").wait_for()
    (tmp_path / "scene.png").write_bytes(SCENE)
    view.set_input_files("#image", str(tmp_path / "scene.png"))
    assert not view.locator("#drawn").is_visible() and not view.locator("#key").is_visible()
    view.click("button")
    view.wait_for_selector("#drawn:visible")
    assert view.locator("#said").inner_text().startswith("200 in ")
    # Class 1 lies in the scene's cell 5,5: the edge in the class's colour, the picture inside of it.
    picture = drawn(view)
    assert picture.size == (320, 320)
    assert picture.getpixel((160, 176)) == pytest.approx((217, 242, 13), abs=12)
    assert picture.getpixel((176, 180)) == pytest.approx(shade(1, 0.6), abs=3)
    assert picture.getpixel((250, 50)) == (0, 0, 0)
    view.fill("#conf", "0.7")
    view.click("button")
    view.locator("#said", has_not_text="fire").wait_for()
    assert view.told == []
    name = quote(EVIL, safe="'")
    assert {address.split("?")[0] for address in view.asked} == {
        f"{evil.url}/docs",
        f"{evil.url}/v2/health/ready",
        f"{evil.url}/v1/models/{name}:predict",
    }


def test_the_page_says_why_an_image_was_refused(evil: Running, view: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(SCENE[:200])
    view.goto(f"{evil.url}/docs")
    view.set_input_files("#image", str(tmp_path / "a.png"))
    view.click("button")
    view.locator("#said", has_text=re.compile("^400")).wait_for()
    assert "the PNG is damaged" in view.locator("#said").inner_text()


def test_the_page_takes_a_key_where_one_is_wanted(
    guarded: tuple[Running, dict[str, str]], view: Any, tmp_path: Path
) -> None:
    server, admin = guarded
    (tmp_path / "scene.png").write_bytes(SCENE)
    view.goto(f"{server.url}/docs")
    view.set_input_files("#image", str(tmp_path / "scene.png"))
    view.click("button")
    view.locator("#said", has_text=re.compile("^401")).wait_for()
    view.fill("#key", admin["authorization"].removeprefix("Bearer "))
    view.click("button")
    view.wait_for_selector("#drawn:visible")


def test_the_commands_on_the_page_work(evil: Running, view: Any, tmp_path: Path) -> None:
    Image.open(io.BytesIO(SCENE)).convert("RGB").save(tmp_path / "frame.jpg", quality=95)
    view.goto(f"{evil.url}/docs")
    commands = view.locator("#curl pre").all_inner_texts()
    assert len(commands) == 6
    for command in commands:
        assert evil.url in command
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0 and "smoke" in done.stdout, (command, done)

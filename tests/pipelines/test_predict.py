"""`haechi predict`: files, folders and URLs, by a folder or by an endpoint; bad ones told, the others predicted."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from haechi.components.shared.errors import InputError, ModelError
from haechi.components.shared.images import decode, read_header
from haechi.pipelines.predict import predict
from tests.serving_process import free_port, running
from tests.tiny_models import cell_box, paint, shade, tiny_model_folder

SCENE = paint({(2, 3): shade(0, 0.9), (5, 5): shade(1, 0.6), (7, 7): shade(0, 0.3)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model_folder(path, ["person", "dog"])
    return path


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    path.write_bytes(SCENE)
    return path


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """A web server on loopback with what is put into tmp_path/site."""
    root = tmp_path / "site"
    root.mkdir()
    (root / "porch.png").write_bytes(SCENE)
    (root / "page.html").write_bytes(b"<html></html>")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

        def do_GET(self) -> None:
            if self.path == "/elsewhere":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()
            elif self.path == "/endless":
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # the reader hangs up, as it should
                    for _ in range(70):
                        self.wfile.write(b"\0" * 2**20)
            else:
                super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def found(row: dict[str, Any]) -> list[tuple[str, list[float]]]:
    return [(item["class"], item["box"]) for item in row["detections"]]


PERSON, DOG = ("person", list(cell_box(2, 3))), ("dog", list(cell_box(5, 5)))


def test_a_file_gives_the_boxes_above_the_thresholds(folder: Path, scene: Path) -> None:
    (row,) = predict([str(scene)], model=folder)
    assert (row["input"], row["width"], row["height"]) == (str(scene), 320, 320)
    assert found(row) == [PERSON, DOG] and "drawn" not in row


@pytest.mark.parametrize(
    ("conf", "expected"), [(0.95, []), (0.7, [PERSON]), (0.2, [PERSON, DOG, ("person", list(cell_box(7, 7)))])]
)
def test_conf_replaces_the_thresholds(folder: Path, scene: Path, conf: float, expected: list[Any]) -> None:
    assert found(predict([str(scene)], model=folder, conf=conf)[0]) == expected


def test_an_endpoint_gives_the_same_as_the_folder(folder: Path, scene: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    inputs = [str(scene), str(tmp_path / "bad.jpg"), str(scene)]
    with running(folder) as server:
        for endpoint in (f"{server.url}/v1/models/tiny", f"{server.url}/v1/models/tiny:predict"):
            assert predict(inputs, endpoint=endpoint) == predict(inputs, model=folder)
        assert found(predict([str(scene)], endpoint=endpoint, conf=0.7)[0]) == [PERSON]
        with pytest.raises(ModelError, match="404: there is no model 'other'"):
            predict([str(scene)], endpoint=f"{server.url}/v1/models/other")


def test_an_endpoint_that_is_away_is_told_once(scene: Path) -> None:
    with pytest.raises(ModelError, match="cannot be reached"):
        predict([str(scene)] * 1000, endpoint=f"http://127.0.0.1:{free_port()}/v1/models/tiny")


def test_an_endpoint_of_another_kind_is_told(scene: Path, site: str) -> None:
    with pytest.raises(ModelError, match="answered 501"):
        predict([str(scene)], endpoint=f"{site}/v1/models/tiny")


def test_a_folder_is_read_in_order_with_all_below(folder: Path, tmp_path: Path) -> None:
    album = tmp_path / "album"
    for name, cell in (("b.png", (2, 3)), ("a/z.png", (4, 4)), ("c.PNG", (5, 5))):
        (album / name).parent.mkdir(parents=True, exist_ok=True)
        (album / name).write_bytes(paint({cell: shade(0, 0.9)}))
    (album / "notes.txt").write_text("not an image, and not named like one")
    rows = predict([str(album)], model=folder)
    assert [Path(row["input"]).relative_to(album).as_posix() for row in rows] == ["a/z.png", "b.png", "c.PNG"]
    assert [found(row)[0][1] for row in rows] == [list(cell_box(*cell)) for cell in ((4, 4), (2, 3), (5, 5))]


def test_bad_inputs_are_told_and_the_others_go_on(folder: Path, scene: Path, tmp_path: Path, site: str) -> None:
    (tmp_path / "cut.png").write_bytes(SCENE[:200])
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    expected = {
        str(scene): None,
        str(tmp_path / "absent.jpg"): "cannot be read",
        str(tmp_path / "cut.png"): "damaged",
        str(tmp_path / "zero.jpg"): "empty",
        str(tmp_path / "empty"): "no images",
        f"{site}/porch.png": None,
        f"{site}/none.png": "404",
        f"{site}/page.html": "not an image",
        f"{site}/elsewhere": "cannot be fetched",
        f"{site}/endless": "more than",
        f"http://127.0.0.1:{free_port()}/x.jpg": "cannot be fetched",
        "http://": "cannot be fetched",
        "file:///etc/passwd": "not an http",
        "ftp://host/x.jpg": "not an http",
    }
    rows = predict(list(expected), model=folder)
    assert [row["input"] for row in rows] == list(expected)
    for row, words in zip(rows, expected.values(), strict=True):
        if words is None:
            assert found(row) == [PERSON, DOG]
        else:
            assert set(row) == {"input", "error"} and words in row["error"], row


def test_drawn_pictures_are_written_one_an_input(folder: Path, scene: Path, tmp_path: Path, site: str) -> None:
    other = tmp_path / "other" / "scene.png"
    other.parent.mkdir()
    other.write_bytes(paint({}, ground=(200, 200, 200)))
    out = tmp_path / "drawn"
    rows = predict([str(scene), str(other), f"{site}/porch.png?x=1"], model=folder, out=out)
    assert [Path(row["drawn"]).name for row in rows] == ["scene.jpg", "scene-2.jpg", "porch.jpg"]
    picture = decode(Path(rows[0]["drawn"]).read_bytes())
    assert picture.shape == (320, 320, 3)
    # The box is drawn around the cell, and the picture without a box is as it was.
    assert abs(picture[112, 64].astype(int) - decode(SCENE)[112, 64]).max() > 60
    plain = decode(Path(rows[1]["drawn"]).read_bytes()).astype(int)
    assert abs(plain - 200).max() < 5


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "exactly one"),
        ({"model": Path("x"), "endpoint": "http://x/v1/models/y"}, "exactly one"),
        ({"endpoint": "localhost:8080"}, "--endpoint"),
        ({"endpoint": "http://localhost:8080"}, "--endpoint"),
        ({"model": Path("x"), "conf": 1.5}, "conf is 1.5"),
    ],
)
def test_contradicting_parameters_are_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        predict(["a.jpg"], **given)


def test_a_folder_that_is_no_model_is_told_before_any_image(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a model folder"):
        predict(["a.jpg"], model=tmp_path)


@pytest.mark.realdata
def test_real_camera_frames_are_predicted_and_drawn(realdata: Path, folder: Path, tmp_path: Path) -> None:
    frames = sorted((realdata / "cam_lobby").rglob("*.jpg"))[:3]
    rows = predict([str(frame) for frame in frames], model=folder, out=tmp_path / "drawn")
    for frame, row in zip(frames, rows, strict=True):
        header = read_header(frame.read_bytes())
        assert (row["width"], row["height"]) == (header.width, header.height)
        assert read_header(Path(row["drawn"]).read_bytes()).width == header.width

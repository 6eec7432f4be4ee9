"""The object store's door, against a real SeaweedFS: listing, folders, bounds, and every way not to reach it."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from haechi.components.shared.errors import InputError, SettingsError, StorageError
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import ObjectMissing, Store, ordered_map, parse_s3_uri


def test_an_object_comes_back_as_it_went(store: Store) -> None:
    store.put("a/b.bin", b"\0\1\2", metadata={"camera": "door"})
    assert store.get("a/b.bin") == b"\0\1\2"
    assert store.exists("a/b.bin") and not store.exists("a/b") and not store.exists("a")
    assert store.user_metadata("a/b.bin") == {"camera": "door"}
    (item,) = store.list("a/")
    assert (item.key, item.size) == ("a/b.bin", 3)
    assert item.etag and '"' not in item.etag
    assert abs(item.modified - time.time()) < 60
    store.remove("a/b.bin")
    assert not store.exists("a/b.bin")


@pytest.mark.parametrize("size", [0, 1, 5 * 2**20, 5 * 2**20 + 1, 12 * 2**20])
def test_objects_of_any_size(store: Store, size: int) -> None:
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    store.put("big", data)
    assert store.get("big") == data


KEYS = [
    "plain",
    "sp ace",
    "p+lus",
    "per%cent",
    "한국/카메라.jpg",
    "emoji-😀",
    "amp&er=sand?",
    "hash#tag",
    "quo'te\"",
    "a//b",
    "~t",
]


@pytest.mark.parametrize("key", KEYS)
def test_any_key_is_listed_as_it_was_written(store: Store, key: str) -> None:
    if key == "a//b":
        key = "a/b"  # SeaweedFS, as any file system behind S3, takes // for /
    store.put(f"x/{key}", key.encode())
    assert [item.key for item in store.list("x/")] == [f"x/{key}"]
    assert store.get(f"x/{key}") == key.encode()


def test_listing_goes_beyond_a_page_and_in_key_order(store: Store) -> None:
    keys = [f"many/{number:05d}" for number in range(1200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b"x"), keys))
    assert [item.key for item in store.list("many/")] == keys
    assert [item.key for item in store.list("many/011")] == keys[1100:1200]


def test_listing_is_complete_across_folders_and_the_same_each_time(store: Store) -> None:
    """`-` and `.` sort before `/`, so that a store that lists by folders is not in key order: SeaweedFS is not."""
    keys = ["o/a-b", "o/a.b", "o/a/b", "o/a/c/d", "o/a0", "o/b"]
    for key in reversed(keys):
        store.put(key, b"x")
    listed = [item.key for item in store.list("o/")]
    assert sorted(listed) == keys
    assert [item.key for item in store.list("o/")] == listed


def test_listing_nothing_is_empty(store: Store) -> None:
    assert list(store.list("none/")) == []


def test_json_round_trip(store: Store) -> None:
    store.put_json("a.json", {"이름": [1, None, 2.5]})
    assert store.get_json("a.json") == {"이름": [1, None, 2.5]}
    with pytest.raises(ValueError, match="JSON"):
        store.put_json("a.json", float("inf"))


def test_put_if_absent_writes_once(store: Store) -> None:
    assert store.put_if_absent("k", b"first") is True
    assert store.put_if_absent("k", b"second") is False
    assert store.get("k") == b"first"


def test_a_missing_object_is_told_apart(store: Store) -> None:
    for work in (store.get, store.get_json, store.user_metadata):
        with pytest.raises(ObjectMissing, match="none/here does not exist"):
            work("none/here")


def test_get_is_bounded(store: Store) -> None:
    store.put("k", b"x" * 1000)
    assert len(store.get("k", limit=1000)) == 1000
    with pytest.raises(InputError, match="has 1000 bytes, more than 999"):
        store.get("k", limit=999)


def test_get_file_replaces_whole(store: Store, tmp_path: Path) -> None:
    store.put("k", b"new")
    (tmp_path / "f").write_bytes(b"old")
    assert store.get_file("k", tmp_path / "f").read_bytes() == b"new"
    with pytest.raises(ObjectMissing):
        store.get_file("none", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"new"


def test_a_folder_goes_up_marker_last_and_comes_back(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "model"
    for name in ("model.json", "model.onnx", "golden/a.png", "zz/last.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    order: list[str] = []

    class Watching(Store):
        def put(self, key: str, data: bytes, *rest: object, **more: object) -> None:
            order.append(key)
            super().put(key, data)

    Watching(store.settings).put_folder("models/m/1/", source, "model.json")
    assert order[-1] == "models/m/1/model.json" and len(order) == 4
    store.get_folder("models/m/1/", tmp_path / "back")
    assert {
        path.relative_to(tmp_path / "back").as_posix() for path in (tmp_path / "back").rglob("*") if path.is_file()
    } == {
        "model.json",
        "model.onnx",
        "golden/a.png",
        "zz/last.txt",
    }


def test_a_folder_without_its_marker_does_not_go_up(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(InputError, match=r"has no model\.json"):
        store.put_folder("models/m/1/", tmp_path, "model.json")
    assert list(store.list("models/")) == []


# Ways not to reach it --------------------------------------------------------------------------------------------


def test_without_an_endpoint_the_setting_is_named() -> None:
    with pytest.raises(SettingsError, match="HAECHI_S3_ENDPOINT is not set"):
        Store(Settings())


def every_call(store: Store) -> list[object]:
    return [
        lambda: store.check(),
        lambda: store.ensure_bucket(),
        lambda: list(store.list("")),
        lambda: store.get("k"),
        lambda: store.put("k", b"x"),
        lambda: store.exists("k"),
    ]


def test_a_missing_bucket_is_named(settings: Settings) -> None:
    """Only of reading: SeaweedFS makes a bucket when its administrator writes to it; `check` is for the steps to call."""
    store = Store(settings, bucket="no-such-bucket")
    for work in (store.check, lambda: list(store.list("")), lambda: store.get("k")):
        with pytest.raises(StorageError, match="'no-such-bucket' does not exist"):
            work()


@pytest.mark.parametrize("bucket", ["X", "a", "has space", "a/b", "..", "한국"])
def test_an_impossible_bucket_name_is_refused(settings: Settings, bucket: str) -> None:
    with pytest.raises(InputError, match="is no bucket name"):
        Store(settings, bucket=bucket)


@pytest.mark.parametrize("key", ["wrong key", "wrong secret"])
def test_wrong_credentials_are_named_but_not_shown(store: Store, settings: Settings, key: str) -> None:
    wrong = {"s3_access_key": "nobody"} if key == "wrong key" else {"s3_secret_key": "n0t-the-secret"}
    stranger = Store(replace(settings, **wrong))
    for work in every_call(stranger):
        with pytest.raises(StorageError, match="refuses our credentials") as caught:
            work()  # type: ignore[operator]
        assert "HAECHI_S3_ACCESS_KEY" in caught.value.remedy and "n0t-the-secret" not in str(caught.value)


def test_anonymous_access_is_refused_too(settings: Settings) -> None:
    with pytest.raises(StorageError, match="credentials"):
        Store(replace(settings, s3_access_key="", s3_secret_key="")).put("k", b"x")


def _told_within(store: Store, seconds: float, match: str) -> None:
    begun = time.monotonic()
    with pytest.raises(StorageError, match=match) as caught:
        store.get("k")
    assert time.monotonic() - begun < seconds
    assert "HAECHI_S3_ENDPOINT" in caught.value.remedy


def somewhere(port: int) -> Store:
    return Store(Settings(s3_endpoint=f"http://127.0.0.1:{port}", s3_access_key="k", s3_secret_key="s"))


def test_a_refused_connection_is_told_within_seconds() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _told_within(somewhere(port), 5, f"cannot reach the object store at http://127.0.0.1:{port}")


def test_an_unknown_host_is_told_within_seconds() -> None:
    store = Store(Settings(s3_endpoint="http://no-such-host.invalid", s3_access_key="k", s3_secret_key="s"))
    _told_within(store, 15, "cannot reach")


def test_a_host_that_does_not_answer_is_told_within_15_seconds() -> None:
    """A full accept queue drops connection attempts, as a firewall does."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        address = deaf.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(address)
            time.sleep(0.2)
            _told_within(somewhere(address[1]), 15, "cannot reach")
        finally:
            for filler in fillers:
                filler.close()


class _Site(http.server.BaseHTTPRequestHandler):
    """Answers everything with one status and an HTML page, as a proxy or the wrong service does."""

    status = 200
    asked = 0

    def _page(self) -> None:
        type(self).asked += 1
        body = b"<html>not S3</html>"
        self.send_response(self.status)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _page

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def site() -> Iterator[tuple[type[_Site], int]]:
    handler = type("Site", (_Site,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield handler, server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("status", [404, 405, 500, 503])
def test_a_service_that_is_no_object_store_is_a_storage_error(site: tuple[type[_Site], int], status: int) -> None:
    handler, port = site
    handler.status = status
    store = somewhere(port)
    for work in (lambda: list(store.list("x/")), lambda: store.get("k"), lambda: store.put("k", b"x")):
        with pytest.raises(StorageError):
            work()


def test_a_server_error_is_tried_again_a_few_times(site: tuple[type[_Site], int]) -> None:
    handler, port = site
    handler.status = 503
    with pytest.raises(StorageError):
        somewhere(port).get("k")
    assert 2 <= handler.asked <= 5


def test_a_body_that_breaks_off_is_a_storage_error() -> None:
    def half(listener: socket.socket) -> None:
        for _ in range(6):
            try:
                wire, _ = listener.accept()
            except OSError:
                return
            with wire:
                wire.recv(65536)
                wire.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nETag: x\r\n\r\nonly this")

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        thread = threading.Thread(target=half, args=(listener,), daemon=True)
        thread.start()
        with pytest.raises(StorageError):
            somewhere(listener.getsockname()[1]).get("k")


# Names and order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://bucket/some/prefix", ("bucket", "some/prefix")),
        ("s3://bucket/", ("bucket", "")),
        ("s3://bucket", ("bucket", "")),
        ("s3://b/with?mark#and", ("b", "with?mark#and")),
        ("s3://b//double", ("b", "double")),
        ("s3://b/한국/", ("b", "한국/")),
    ],
)
def test_uris_are_split(uri: str, expected: tuple[str, str]) -> None:
    assert parse_s3_uri(uri) == expected


@pytest.mark.parametrize(
    "uri", ["", "bucket/key", "s3:/bucket", "s3://", "s3:///key", "file:///x", "http://b/k", "S4://b"]
)
def test_what_is_no_s3_uri_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match="is not an s3:// URI"):
        parse_s3_uri(uri)


def test_results_keep_the_items_order_whoever_is_first() -> None:
    def slow_start(number: int) -> int:
        time.sleep(0.05 if number == 0 else 0)
        return number * number

    assert list(ordered_map(slow_start, range(50), 8)) == [number * number for number in range(50)]
    assert list(ordered_map(slow_start, [], 8)) == []


def test_no_more_than_four_times_the_workers_are_held() -> None:
    taken = 0

    def source() -> Iterator[int]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    results = ordered_map(lambda number: number, source(), 3)
    for seen in range(100):
        next(results)
        assert taken - seen <= 4 * 3 + 1
    results.close()  # type: ignore[attr-defined]
    assert taken <= 100 + 4 * 3


def test_an_error_comes_out_at_its_place_and_the_rest_is_given_up() -> None:
    done: list[int] = []

    def work(number: int) -> int:
        if number == 5:
            raise InputError("item 5")
        time.sleep(0.01)
        done.append(number)
        return number

    results = ordered_map(work, range(10_000), 2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(InputError, match="item 5"):
        next(results)
    assert len(done) < 20


def test_an_error_of_the_items_comes_out_too() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise StorageError("the listing broke off")

    with pytest.raises(StorageError, match="broke off"):
        list(ordered_map(lambda number: number, source(), 4))

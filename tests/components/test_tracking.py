"""Tracking: against a real MLflow server, and against servers that are away or are something else."""

from __future__ import annotations

import http.server
import math
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from haechi.components.shared.errors import InputError, TrackingError
from haechi.components.shared.settings import Settings
from haechi.components.shared.tracking import VERSION_TAG, Tracker, metric_names

VERSION, OTHER = "0123456789ab", "ba9876543210"


@pytest.fixture(scope="module")
def tracker(mlflow_uri: str) -> Tracker:
    return Tracker(Settings(mlflow_tracking_uri=mlflow_uri))


@pytest.fixture
def name() -> str:
    """An experiment or model name that no other test uses."""
    return f"gate-{uuid.uuid4().hex[:8]}"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("test/mAP50-95/fire", "test/mAP50-95/fire"),
        ("metrics/mAP50(B)", "metrics/mAP50_B_"),
        ("test/mAP50-95/person (down)", "test/mAP50-95/person _down_"),
        ("test/mAP50-95/화재", "test/mAP50-95/화재"),
        ("a:b*c", "a_b_c"),
        ("a//../b/", "a/_/_/b/_"),
        ("x" * 300, "x" * 250),
    ],
)
def test_names_become_what_mlflow_takes(given: str, shown: str) -> None:
    assert metric_names([given]) == {given: shown}


def test_names_that_fall_together_stay_apart() -> None:
    found = metric_names(["dog(", "dog)"])
    assert found["dog("] == "dog_"
    assert found["dog)"].startswith("dog_-")
    assert len(found["dog)"]) == len("dog_-") + 6


def test_a_run_keeps_parameters_metrics_tags_and_small_files(tracker: Tracker, name: str, tmp_path: Path) -> None:
    run_id = tracker.start_run(name, "yolo11n", {"stage": "train"})
    settings = {"epochs": 12, "model": "yolo11n", "imgsz": [160, 160], "amp": False}
    for _ in range(2):  # a repeated step logs the same ones again
        tracker.log_params(run_id, settings)
    for step, value in enumerate([0.25, 0.5]):
        tracker.log_metrics(run_id, {"val/mAP50-95": value, "val/mAP50-95/person (down)": 0.125}, step=step)
    tracker.set_tags(run_id, {"haechi.verdict": "promote"})
    report = tmp_path / "curve.html"
    report.write_text("<p>curve</p>")
    tracker.log_artifact(run_id, report)
    tracker.log_text(run_id, "<p>report</p>", "pages/report.html")
    tracker.finish(run_id)

    run = tracker.run(run_id)
    assert run is not None
    assert run.status == "FINISHED"
    assert run.params == {"epochs": "12", "model": "yolo11n", "imgsz": "[160, 160]", "amp": "false"}
    assert run.metrics == {"val/mAP50-95": 0.5, "val/mAP50-95/person _down_": 0.125}
    assert {"stage": "train", "haechi.verdict": "promote"}.items() <= run.tags.items()
    history = tracker._client.get_metric_history(run_id, "val/mAP50-95")
    assert [(item.step, item.value) for item in history] == [(0, 0.25), (1, 0.5)]
    assert [item.path for item in tracker._client.list_artifacts(run_id)] == ["curve.html", "pages"]
    local = tracker._client.download_artifacts(run_id, "pages/report.html", str(tmp_path))
    assert Path(local).read_text() == "<p>report</p>"


def test_unknown_and_endless_values_are_left_out(tracker: Tracker, name: str) -> None:
    run_id = tracker.start_run(name, "some")
    tracker.log_metrics(run_id, {"a": None, "b": math.nan, "c": math.inf, "d": 0.0})
    tracker.log_metrics(run_id, {"a": None})
    run = tracker.run(run_id)
    assert run is not None
    assert run.metrics == {"d": 0.0}


def test_more_values_than_one_request_takes_are_all_kept(tracker: Tracker, name: str) -> None:
    run_id = tracker.start_run(name, "many")
    tracker.log_metrics(run_id, {f"m{index}": index for index in range(1001)})
    tracker.log_params(run_id, {f"p{index}": index for index in range(101)})
    run = tracker.run(run_id)
    assert run is not None
    assert (len(run.metrics), len(run.params)) == (1001, 101)


def test_candidates_that_start_together_share_one_experiment(tracker: Tracker, name: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda index: tracker.start_run(name, f"candidate-{index}"), range(4)))
    experiments = {tracker._client.get_run(run_id).info.experiment_id for run_id in runs}
    assert (len(set(runs)), len(experiments)) == (4, 1)


def test_a_run_is_found_by_its_tag(tracker: Tracker, name: str) -> None:
    assert tracker.find_run(name, {VERSION_TAG: VERSION}) == ""
    first = tracker.start_run(name, "one", {VERSION_TAG: VERSION})
    tracker.start_run(name, "two", {VERSION_TAG: VERSION})
    assert tracker.find_run(name, {VERSION_TAG: VERSION}) == first
    assert tracker.find_run(name, {VERSION_TAG: VERSION, "stage": OTHER}) == ""
    assert tracker.run("no-such-run") is None
    assert tracker.run("") is None


def test_registering_again_makes_no_second_version(tracker: Tracker, name: str) -> None:
    assert tracker.alias(name, "champion") is None
    assert tracker.versions(name) == []
    uri = f"s3://haechi/models/{name}/{VERSION}/"
    first = tracker.register(name, VERSION, uri, "", {"haechi.verdict": "refuse"}, "refused")
    again = tracker.register(name, VERSION, uri, "", {"haechi.verdict": "promote"}, "promoted")
    assert (first.number, again.number) == (1, 1)
    assert tracker.versions(name) == [again]
    assert (again.version, again.source, again.description) == (VERSION, uri, "promoted")
    assert again.tags["haechi.verdict"] == "promote"


def test_two_that_register_together_end_with_one_number(tracker: Tracker, name: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: tracker.register(name, VERSION, "s3://haechi/m/", "", {}), range(4)))
    assert tracker.register(name, VERSION, "s3://haechi/m/", "", {}).number == 1
    assert min(item.number for item in found) == 1


def test_an_alias_moves(tracker: Tracker, name: str) -> None:
    one = tracker.register(name, VERSION, "s3://haechi/one/", "", {})
    two = tracker.register(name, OTHER, "s3://haechi/two/", "", {})
    assert tracker.alias(name, "champion") is None
    for registered in (one, two, two):
        tracker.set_alias(name, "champion", registered.number)
        assert tracker.alias(name, "champion") == registered
    assert [item.version for item in tracker.versions(name)] == [VERSION, OTHER]


def test_refusals_say_what_and_why(tracker: Tracker, name: str) -> None:
    run_id = tracker.start_run(name, "some")
    tracker.log_params(run_id, {"epochs": 1})
    with pytest.raises(TrackingError, match=f"parameters of run {run_id}.*Changing param values"):
        tracker.log_params(run_id, {"epochs": 2})
    with pytest.raises(TrackingError, match=r"metrics of run nope.*not found"):
        tracker.log_metrics("nope", {"a": 1.0})
    tracker.register(name, VERSION, "s3://haechi/one/", "", {})
    with pytest.raises(TrackingError, match=r"alias 'champion'.*version=7.* not found"):
        tracker.set_alias(name, "champion", 7)
    with pytest.raises(InputError, match="cannot be a model's name"):
        tracker.alias("a' or '1'='1", "champion")


def test_a_deleted_experiment_is_told_with_its_remedy(tracker: Tracker, name: str) -> None:
    tracker.start_run(name, "some")
    experiment = tracker._client.get_experiment_by_name(name).experiment_id
    tracker._client.delete_experiment(experiment)
    with pytest.raises(TrackingError, match=f"was deleted.*mlflow experiments restore -x {experiment}"):
        tracker.start_run(name, "again")


def test_a_server_that_is_away_is_told_within_seconds() -> None:
    started = time.monotonic()
    with pytest.raises(
        TrackingError, match=r"cannot reach MLflow at http://127\.0\.0\.1:9: .*Check MLFLOW_TRACKING_URI"
    ):
        Tracker(Settings(mlflow_tracking_uri="http://127.0.0.1:9")).start_run("a", "b")
    assert time.monotonic() - started < 15


@pytest.fixture(
    params=[(401, "who are you"), (403, "Invalid Host header - possible DNS rebinding attack detected"), (404, "")]
)
def stranger(request: pytest.FixtureRequest) -> Iterator[tuple[int, str]]:
    """A plain HTTP server that is no MLflow: it gives every request one status and one text."""
    status, text = request.param

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test's output clean."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield status, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_another_server_or_missing_rights_are_told_apart(stranger: tuple[int, str]) -> None:
    status, uri = stranger
    expected = {401: "refuses our credentials", 403: "--allowed-hosts", 404: "does not answer like MLflow"}[status]
    with pytest.raises(TrackingError, match=expected):
        Tracker(Settings(mlflow_tracking_uri=uri)).start_run("a", "b")


def test_no_address_is_told() -> None:
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI is not set"):
        Tracker(Settings())


def test_importing_the_module_does_not_import_mlflow() -> None:
    code = "import sys, haechi.components.shared.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

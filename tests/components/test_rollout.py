"""What a rollout is judged by, settings and states, and canaries of mode Knative against a stand-in API server."""

from __future__ import annotations

import http.server
import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cluster_stand_in import ClusterStandIn
from tiny_models import tiny_model_folder

from haechi.components.deploy.endpoint import Unanswered
from haechi.components.deploy.inference_service import Patience
from haechi.components.deploy.job import Job
from haechi.components.deploy.kubernetes_api import InferenceServiceApi
from haechi.components.deploy.lease import Lease, holder_of
from haechi.components.deploy.readiness import look_at_canary
from haechi.components.deploy.rollout import Rollout
from haechi.components.deploy.rollout_state import STATE, RolloutState
from haechi.components.deploy.swap import swap
from haechi.components.deploy.traffic import Measured, Pods, Prometheus, judge, percentile, read_metrics
from haechi.components.shared.errors import DeployError, DeployRefused, InputError
from haechi.components.shared.images import decode
from haechi.components.shared.model_folder import GOLDEN_CONF, ModelFolder

# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_rollout_is_read_as_pipelines_hands_it_over() -> None:
    assert Rollout.parse({}) == Rollout()
    read = Rollout.parse({"steps": [10.0, 50.0], "bake": 60, "min_requests": 5.0, "strategy": "canary"})
    assert (read.steps, read.bake, read.min_requests, read.strategy) == ((10, 50), 60.0, 5, "canary")
    assert read.url("models", "a-predictor") == "http://a-predictor.models.svc"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"stps": []}, "rollout has no key 'stps'"),
        ({"steps": [50, 10]}, r"rollout\.steps is \[50, 10\]"),
        ({"steps": [0]}, r"rollout\.steps"),
        ({"steps": [101]}, r"rollout\.steps"),
        ({"steps": [10, 10]}, r"rollout\.steps"),
        ({"steps": ["10"]}, r"rollout\.steps"),
        ({"steps": 10}, r"rollout\.steps is 10"),
        ({"steps": [math.nan]}, r"rollout\.steps"),
        ({"strategy": "blue-green"}, r"rollout\.strategy is 'blue-green'"),
        ({"bake": -1}, r"rollout\.bake"),
        ({"bake": math.inf}, r"rollout\.bake"),
        ({"bake": True}, r"rollout\.bake"),
        ({"poll": 0}, r"rollout\.poll"),
        ({"poll": 61}, r"rollout\.poll is 61"),
        ({"poll": 1e300}, r"rollout\.poll"),
        ({"bake": 1e300}, r"rollout\.bake"),
        ({"bake": 604_801}, r"rollout\.bake"),
        ({"min_requests": 1.5}, r"rollout\.min_requests"),
        ({"max_latency": 0.5}, r"rollout\.max_latency"),
        ({"max_errors": -0.1}, r"rollout\.max_errors"),
        ({"max_disagreement": 2}, r"rollout\.max_disagreement"),
        ({"prometheus": "prometheus:9090"}, r"rollout\.prometheus"),
        ({"prometheus": "http://prometheus:9090\r\nX: y"}, r"rollout\.prometheus"),
        ({"prometheus": "http://[bad"}, r"rollout\.prometheus"),
        ({"address": "http://{pod}"}, r"rollout\.address"),
        ({"address": "http://{service}.models.svc\r\nX-Other: y"}, r"rollout\.address"),
        ({"address": "http://a b/{service}"}, r"rollout\.address"),
        ({"address": "http:///{service}"}, r"rollout\.address"),
        ({"address": "http://[{service}"}, r"rollout\.address"),
        ({"address": "http://same-for-all"}, r"rollout\.address"),
        ({"address": "http://{service.name}"}, r"rollout\.address"),
        ({"address": "http://{service[name]}"}, r"rollout\.address"),
        ({"address": "http://{service}:80800"}, r"rollout\.address"),
    ],
)
def test_what_a_rollout_cannot_be_is_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        Rollout.parse(values)
    assert caught.value.remedy


def test_a_state_survives_its_annotation() -> None:
    state = RolloutState(
        "failed", "canary", "a" * 12, "s3://a", "s3://b", "v-b", 10, "run 1", "2026-01-01T00:00:00Z", "x"
    )
    assert RolloutState.of({"metadata": {"annotations": state.to_annotation()}}) == state
    long = replace(state, reason="y" * 5000).to_annotation()
    assert len(long[STATE]) < 1500, "an object's annotations have 256 KiB in all"


ODD = [
    json.dumps({"phase": "canary", **more})
    for more in (
        {"traffic": 101},
        {"traffic": -1},
        {"version": "../pods"},
        {"former_name": "a b"},
        {"version": "x" * 64},
    )
]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        pytest.param("[" * 100_000, id="brackets"),
        '"x"',
        '{"phase": "flying"}',
        '{"phase": 1}',
        '{"traffic": "10"}',
        *ODD,
    ],
)
def test_a_state_that_cannot_be_read_is_none(text: str) -> None:
    assert RolloutState.of({"metadata": {"annotations": {STATE: text}}}) == RolloutState()
    assert RolloutState.of(None) == RolloutState()


def test_a_lease_expires_and_may_be_given_back() -> None:
    begun = datetime(2026, 1, 1, tzinfo=UTC)
    spec = {"holderIdentity": "run 1", "renewTime": "2026-01-01T00:00:00.000000Z", "leaseDurationSeconds": 60}
    for seconds, holder in ((59, "run 1"), (61, "")):
        assert holder_of({"spec": spec}, lambda seconds=seconds: begun + timedelta(seconds=seconds)) == holder
    assert holder_of({"spec": {"leaseDurationSeconds": 1}}) == holder_of(None) == ""
    for entry in ("renewTime", "leaseDurationSeconds"):
        for value in (None, "", "tomorrow"):
            assert holder_of({"spec": {**spec, entry: value}}) == "", "somebody wrote into it"


# --- judgement --------------------------------------------------------------------------------------------------------

SCRAPE = """# HELP haechi_requests_total Calls that have ended
haechi_requests_total{model="entrance",outcome="ok",protocol="v2"} 90.0
haechi_requests_total{model="entrance",outcome="ok",protocol="http"} 1000.0
haechi_requests_total{model="entrance",outcome="refused",protocol="v1"} 7.0
haechi_requests_total{model="entrance",outcome="deadline",protocol="grpc"} 6.0
haechi_requests_total{model="entrance",outcome="error",protocol="v1"} 4.0
haechi_request_duration_seconds_bucket{le="0.1",model="entrance",protocol="v2"} 80.0
haechi_request_duration_seconds_bucket{le="+Inf",model="entrance",protocol="v2"} 90.0
haechi_request_duration_seconds_bucket{le="0.1",model="entrance",protocol="v1"} 10.0
haechi_request_duration_seconds_bucket{le="+Inf",model="entrance",protocol="v1"} 10.0
process_start_time_seconds 1.7e+09
"""


def test_metrics_are_read_of_predictions_only() -> None:
    process, found = read_metrics(SCRAPE)
    assert process == 1.7e9
    assert found == Measured(90, 10, {0.1: 90, math.inf: 100})
    assert found.failing == 0.1


def test_pods_behind_one_service_are_told_apart() -> None:
    def scrape(start: int, answered: int) -> str:
        line = f'haechi_requests_total{{outcome="ok",protocol="v2"}} {answered}'
        return f"{line}\nprocess_start_time_seconds {start}\n"

    texts = iter([scrape(1, 1000), scrape(2, 5), scrape(1, 1010), scrape(2, 5), scrape(3, 7), scrape(1, 1030)])
    pods = Pods(lambda: next(texts))
    for _ in range(6):
        pods.look()
    assert pods.total().answered == 30, "what a pod did before it was met does not count"


@pytest.mark.parametrize(
    "page",
    [
        "",
        "<!doctype html><title>Sign in</title>",
        'haechi_requests_total{outcome="ok",protocol="v2"} NaN',
        'haechi_requests_total{outcome="ok",protocol="v2"}',
        'haechi_request_duration_seconds_bucket{le="x",protocol="v2"} 1',
        "process_start_time_seconds soon",
    ],
)
def test_a_page_that_is_no_metrics_is_not_taken_for_a_quiet_pod(page: str) -> None:
    texts = iter([page, page, SCRAPE, page])
    pods = Pods(lambda: next(texts))
    pods.look()
    pods.look()
    with pytest.raises(
        Unanswered, match=r"no pod's /metrics could be read: /metrics is not what Haechi's runtime writes"
    ):
        pods.total()
    pods.look()
    pods.look()
    assert pods.total() == Measured(0, 0, {0.1: 0, math.inf: 0}), "one that could be read is enough"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"data": {"result": []}}, "knows no request of the pods .*entrance-v-1.*and we did ask them"),
        (
            {"data": {"result": [{"metric": {"outcome": "ok"}, "value": [0, "NaN"]}]}},
            "with numbers: 'NaN' is no number",
        ),
        ({"data": {"result": [{"metric": {"outcome": "ok"}, "value": [0]}]}}, "does not answer with numbers"),
        ({"data": {"result": [["ok", "1"]]}}, "does not answer with numbers"),
        ({"data": {"result": [{"metric": {}, "value": [0, 10**400]}]}}, "does not answer with numbers"),
        ("[" * 100_000, "does not answer with numbers"),
        ({"status": "error"}, "does not answer with numbers: 'data'"),
        ("<!doctype html><title>Sign in</title>", "does not answer with numbers"),
    ],
)
def test_a_prometheus_without_numbers_is_no_prometheus_without_failures(body: Any, message: str) -> None:
    data = (body if isinstance(body, str) else json.dumps(body)).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        source = Prometheus(f"http://127.0.0.1:{server.server_port}", "models", "entrance-v-1-predictor", lambda: 41.7)
        try:
            with pytest.raises(Unanswered, match=message) as caught:
                source.total()
        finally:
            server.shutdown()
            thread.join()
    assert caught.value.remedy


def test_a_percentile_lies_within_its_bucket() -> None:
    buckets = {0.1: 50.0, 0.2: 90.0, 0.5: 100.0, math.inf: 100.0}
    assert percentile(buckets, 0.5) == pytest.approx(0.1)
    assert percentile(buckets, 0.95) == pytest.approx(0.35)
    assert percentile({0.1: 0.0, math.inf: 10.0}, 0.95) == pytest.approx(0.1)
    assert percentile({}, 0.95) == 0.0


FAST = {0.1: 100.0, 1.0: 100.0, math.inf: 100.0}
SLOW = {0.1: 0.0, 1.0: 100.0, math.inf: 100.0}


@pytest.mark.parametrize(
    ("canary", "stable", "disagree", "reason"),
    [
        (Measured(100, 0, FAST), Measured(100, 0, FAST), 0.9, ""),
        (Measured(), Measured(), 0.0, ""),
        (Measured(100, 1, FAST), Measured(100, 0, FAST), 0.0, ""),
        (Measured(100, 5, FAST), Measured(100, 0, FAST), 0.0, "4.8% of the canary's 105 requests failed, 0.0% of"),
        (Measured(100, 5, FAST), Measured(100, 5, FAST), 0.0, ""),
        (Measured(2, 3, FAST), Measured(100, 0, FAST), 0.0, ""),
        (Measured(100, 0, SLOW), Measured(100, 0, FAST), 0.0, "took up to 955 ms, of the stable model's 95 ms"),
        (Measured(100, 0, SLOW), Measured(1, 0, {0.1: 1.0, math.inf: 1.0}), 0.0, ""),
    ],
)
def test_a_canary_is_judged_by_errors_and_latency(
    canary: Measured, stable: Measured, disagree: float, reason: str
) -> None:
    found = judge(canary, stable, disagree, Rollout())
    assert reason in found
    assert bool(found) == bool(reason)


def test_disagreement_counts_only_where_it_is_limited() -> None:
    found = judge(Measured(), Measured(), 0.5, Rollout(max_disagreement=0.4))
    assert "50.0% of the boxes" in found


def test_prometheus_is_asked_for_the_pods_of_one_deployment() -> None:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)["query"][0]
            asked.append(query)
            if "bucket" in query:
                rows = [({"le": "0.1"}, "9"), ({"le": "+Inf"}, "10")]
            else:
                rows = [({"outcome": "ok"}, "8.5"), ({"outcome": "overload"}, "1.5"), ({"outcome": "refused"}, "3")]
            result = [{"metric": metric, "value": [0, value]} for metric, value in rows]
            data = json.dumps({"status": "success", "data": {"result": result}}).encode()
            self.send_response(200 if len(asked) < 3 else 500)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        source = Prometheus(f"http://127.0.0.1:{server.server_port}", "models", "entrance-v-1-predictor", lambda: 41.7)
        source.look()
        assert source.total() == Measured(8.5, 1.5, {0.1: 9, math.inf: 10})
        with pytest.raises(DeployError, match=r"does not answer with numbers: 500 .*"):
            source.total()
        server.shutdown()
        thread.join()
    assert 'namespace="models",pod=~"entrance-v-1-predictor-[a-z0-9]+-[a-z0-9]+"' in asked[0]
    assert "[42s]" in asked[0]


def test_a_canary_that_nobody_can_schedule_says_so() -> None:
    condition = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available: 3 Insufficient cpu."}
    look = look_at_canary(None, [{"status": {"conditions": [condition]}}], "s3://x", {}, "v-1")
    assert (look.ready, look.blocked) == (False, False)
    assert "Insufficient cpu" in look.reason


# --- mode Knative -----------------------------------------------------------------------------------------------------

QUICK = Patience(timeout=10, poll=0.01, blocked=0.05)


@dataclass
class Knative:
    """The service `entrance` of mode Knative, its two tagged addresses, and the models behind them."""

    cluster: ClusterStandIn
    root: Path
    folders: dict[str, tuple[ModelFolder, Path]] = field(default_factory=dict)
    url: str = ""
    shares: list[int] = field(default_factory=list)

    def model(self, shift: int) -> str:
        folder = self.root / str(shift)
        made = tiny_model_folder(folder, ["person"], name="entrance", shift=shift)
        uri = f"s3://models/entrance/{made.version}"
        self.folders[uri] = (made, folder)
        return uri

    def deploy(self, uri: str, **options: Any) -> str:
        model, folder = self.folders[uri]
        settings = {"steps": (10, 50, 100), "bake": 0.0, "poll": 0.01, "address": self.url + "/{service}", **options}
        api = InferenceServiceApi("models", "entrance")
        with Lease(api, "run 1") as lease:
            return swap(Job(api, lease, model, folder, uri, Rollout(**settings), QUICK))

    @property
    def spec(self) -> dict[str, Any]:
        predictor: dict[str, Any] = self.cluster.objects["models", "entrance"]["spec"]["predictor"]
        return predictor

    def answer(self, service: str, body: bytes) -> dict[str, Any]:
        """As the pods of a tag answer."""
        newest = self.spec["model"]["storageUri"]
        former = next((uri for uri in self.folders if uri != newest), newest)
        model, folder = self.folders[newest if not service.startswith("prev-") else former]
        if service.startswith("latest-"):
            self.shares.append(self.spec.get("canaryTrafficPercent", 100))
        found = model.detector(folder).detect([decode(body)], conf=GOLDEN_CONF, iou=0.7)[0]
        data = {"boxes": found.boxes.ravel().tolist(), "scores": found.scores.tolist()}
        data["class_ids"] = found.class_ids.tolist()
        outputs = [{"name": name, "data": values} for name, values in data.items()]
        return {"model_version": model.version, "outputs": outputs}


@pytest.fixture
def knative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Knative]:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with ClusterStandIn(["models"]) as cluster:
        path = str(cluster.write_kubeconfig(tmp_path / "kubeconfig"))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", path)
        world = Knative(cluster, tmp_path)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _pods(world)) as server:
            world.url = f"http://127.0.0.1:{server.server_port}"
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield world
            server.shutdown()
            thread.join()


def _pods(world: Knative) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(SCRAPE.encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._send(json.dumps(world.answer(self.path.split("/")[1], body)).encode())

        def _send(self, data: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    return Handler


def test_in_mode_knative_traffic_follows_the_percent(knative: Knative) -> None:
    old, new = knative.model(0), knative.model(1)
    knative.deploy(old)
    assert knative.deploy(new) == "canary-knative"
    assert sorted(set(knative.shares)) == [0, 10, 50]
    assert knative.spec["model"]["storageUri"] == new
    assert "canaryTrafficPercent" not in knative.spec
    state = RolloutState.of(knative.cluster.objects["models", "entrance"])
    assert (state.phase, state.former) == ("done", old)


def test_in_mode_knative_the_former_model_gets_a_revision_before_the_percent_goes(
    knative: Knative, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = knative.model(0), knative.model(1)
    knative.deploy(old)
    knative.cluster.outcomes[new] = "BlockedByFailedLoad"
    with pytest.raises(DeployError, match=f"cannot load {new}.*{old} has all traffic again"):
        knative.deploy(new)
    applied = [body for _, _, body in knative.cluster.applied if "haechi.io/rollout" in body["metadata"]["annotations"]]
    told = [
        (body["spec"]["predictor"]["model"]["storageUri"], body["spec"]["predictor"].get("canaryTrafficPercent"))
        for body in applied[-3:]
    ]
    assert told == [(new, 0), (old, 0), (old, None)]
    assert RolloutState.of(knative.cluster.objects["models", "entrance"]).phase == "failed"


def in_a_shadow(knative: Knative) -> dict[str, Any]:
    return {"strategy": "shadow"}


def with_prometheus(knative: Knative) -> dict[str, Any]:
    return {"prometheus": "http://prometheus:9090"}


@pytest.mark.parametrize(
    ("options", "message"),
    [(in_a_shadow, "in mode Knative, which has canaries"), (with_prometheus, "do not tell canary and stable apart")],
)
def test_wrong_combinations_are_refused_before_anything_changes(
    knative: Knative, options: Callable[[Knative], dict[str, Any]], message: str
) -> None:
    old, new = knative.model(0), knative.model(1)
    knative.deploy(old)
    with pytest.raises(DeployRefused, match=message):
        knative.deploy(new, **options(knative))
    assert knative.spec["model"]["storageUri"] == old

"""Alerts and dashboards: expressions parse, name metrics that exist, fire when they should, and have a runbook."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.rendered import MANIFESTS, ROOT, Object, find, patched, pods, render
from tests.serving_process import running
from tests.tiny_models import paint, shade, tiny_model_folder

parser = pytest.importorskip("promql_parser", reason="PromQL is parsed by the package promql-parser")

# What the runtime says at /metrics, and with which labels.
_METRICS = {
    "haechi_requests_total": {"model", "protocol", "outcome"},
    "haechi_request_duration_seconds": {"model", "protocol"},
    "haechi_stage_duration_seconds": {"model", "stage"},
    "haechi_requests_in_flight": set(),
    "haechi_batch_size": {"model"},
    "haechi_detections_total": {"model", "class_name"},
    "haechi_detection_confidence": {"model"},
    "haechi_model_info": {"model", "version", "engine", "precision"},
    "haechi_model_ready": {"model"},
    "haechi_swaps_total": {"model", "outcome"},
    "haechi_samples_total": {"model", "outcome"},
}
_HISTOGRAMS = {name for name in _METRICS if name.endswith(("_seconds", "_size", "_confidence"))}
_PROCESS = {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "process_max_fds", "up"}
# Put on by Prometheus and by the PodMonitor.
_SCRAPED = {"namespace", "pod", "container", "job", "instance", "inferenceservice", "predictor"}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `/metrics` of a real runtime tells after one prediction; the line of a sample comes from its counter alone."""
    from haechi.serving.engine import Models
    from haechi.serving.metrics import Metrics

    folder = tmp_path_factory.mktemp("model")
    tiny_model_folder(folder, ["fire"])
    with running(folder) as process:
        scene = paint({(2, 3): shade(0, 0.9)})
        assert httpx.post(f"{process.url}/v1/models/tiny:predict", content=scene).status_code == 200
        told = httpx.get(f"{process.url}/metrics").text
    metrics = Metrics(Models())
    metrics.sampled("tiny", "stored")
    return told + metrics.text()[0].decode()


def test_the_runtime_says_just_that(said: str) -> None:
    told: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(said):
        for sample in family.samples:
            told[family.name] |= set(sample.labels) - {"le"}
    assert {name: told.get(name.removesuffix("_total")) for name in _METRICS} == _METRICS
    assert {name for name in _PROCESS - {"up"} if name.removesuffix("_total") not in told} == set()


def test_swaps_are_told_before_the_first_since_prometheus_sees_no_rise_in_a_counter_that_appears(said: str) -> None:
    for outcome in ("refused", "swapped"):
        assert f'haechi_swaps_total{{model="tiny",outcome="{outcome}"}} 0.0' in said


@functools.cache
def _groups() -> list[Object]:
    groups: list[Object] = find(render("base/monitoring"), "PrometheusRule")["spec"]["groups"]
    return groups


def _rules(kind: str) -> list[Object]:
    return [rule for group in _groups() for rule in group["rules"] if kind in rule]


@functools.cache
def _dashboard() -> Object:
    (text,) = find(render("base/monitoring"), "ConfigMap")["data"].values()
    board: Object = json.loads(text)
    return board


def _expressions() -> Iterator[tuple[str, str]]:
    for group in _groups():
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]
    board = _dashboard()
    for panel in [*board["panels"], *board["annotations"]["list"]]:
        for target in panel.get("targets", [panel] if "expr" in panel else []):
            yield panel.get("title") or panel["name"], target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            [(series, label)] = re.findall(r"^label_values\((.+), (\w+)\)$", variable["query"]["query"])
            yield f"variable {variable['name']}", f"group by ({label}) ({series})"
    scaler = find(render("components/keda"), "ScaledObject")
    yield "keda", scaler["spec"]["triggers"][0]["metadata"]["query"]


EXPRESSIONS = list(_expressions()) if shutil.which("kubectl") else []


def _selectors(node: Any) -> Iterator[Any]:
    """Every vector selector below a node of a parsed expression."""
    if isinstance(node, parser.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        inner = getattr(node, name, None)
        if isinstance(inner, parser.Expr):
            yield from _selectors(inner)
    for inner in getattr(node, "args", None) or []:
        yield from _selectors(inner)


def _known(name: str) -> set[str] | None:
    """Labels of a metric, or None where the runtime has no such metric."""
    if name in _PROCESS:
        return _SCRAPED
    for rule in _rules("record"):
        if rule["record"] == name:
            return set(re.findall(r"\w+", rule["expr"].split("by (")[1].split(")")[0]))
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    if base in _HISTOGRAMS and base != name:
        return _METRICS[base] | _SCRAPED | ({"le"} if name.endswith("_bucket") else set())
    return _METRICS[name] | _SCRAPED if name in _METRICS and name not in _HISTOGRAMS else None


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS)
def test_an_expression_parses_and_names_metrics_and_labels_of_the_runtime(where: str, expression: str) -> None:
    plain = expression.replace("$__rate_interval", "5m").replace("$namespace", "x").replace("$inferenceservice", "x")
    selectors = list(_selectors(parser.parse(plain)))
    assert selectors
    allowed: set[str] = set()
    for selector in selectors:
        known = _known(selector.name)
        assert known is not None, f"{where}: the runtime has no metric {selector.name}"
        assert {matcher.name for matcher in selector.matchers.matchers} <= known, where
        allowed |= known
    for listed in re.findall(r"\b(?:by|on|group_left|ignoring|without) ?\(([^)]*)\)", plain):
        assert {label.strip() for label in listed.split(",") if label.strip()} <= allowed, where


def test_an_unknown_metric_would_be_found() -> None:
    assert _known("haechi_request_total") is None
    assert _known("haechi_request_duration_seconds") is None, "a histogram has no series of its bare name"
    (selector,) = _selectors(parser.parse("sum by (le) (rate(haechi_nothing_bucket[5m]))"))
    assert _known(selector.name) is None


def test_the_runtime_has_the_outcomes_that_alerts_ask_for() -> None:
    from haechi.serving.service import Outcome
    from haechi.serving.swap import Swap

    asked: dict[str, set[str]] = defaultdict(set)
    for rule in [*_rules("alert"), *_rules("record")]:
        for selector in _selectors(parser.parse(rule["expr"])):
            (counted,) = re.findall("requests|swaps|samples", selector.name) or [""]
            asked[counted] |= {v for m in selector.matchers.matchers if m.name == "outcome" for v in m.value.split("|")}
    assert asked["requests"] <= set(Outcome)
    assert {"error", "deadline", "overload"} <= asked["requests"]
    assert asked["swaps"] == {Swap.REFUSED}


@pytest.mark.parametrize("rule", _rules("alert") if EXPRESSIONS else [], ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_what_it_is_and_has_a_runbook(rule: Object) -> None:
    assert re.fullmatch(r"Haechi([A-Z][a-z]+)+", rule["alert"])
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    notes = rule["annotations"]
    assert {"summary", "description", "runbook_url"} == set(notes)
    page, _, anchor = notes["runbook_url"].partition("#")
    assert page.endswith("/docs/runbooks.md")
    headings = re.findall(r"^## (.+)$", (ROOT / "docs/runbooks.md").read_text(), re.MULTILINE)
    assert anchor in {heading.lower() for heading in headings}
    # A template may only name labels that the expression leaves.
    left = {label for item in re.findall(r"by \(([^)]*)\)", rule["expr"]) for label in re.findall(r"\w+", item)}
    named = set(re.findall(r"\$labels\.(\w+)", json.dumps(notes)))
    assert named <= (left | _SCRAPED if "by (" not in rule["expr"] else left | {"predictor", "inferenceservice"})


def test_every_runbook_belongs_to_an_alert() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs/runbooks.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(rule["alert"] for rule in _rules("alert"))


# ---- alerts fire when they should and are silent when all is well


_POD = 'namespace="haechi-serving",inferenceservice="safety",predictor="safety-predictor",pod="p"'


def _requests(outcome: str) -> str:
    return f'haechi_requests_total{{{_POD},model="safety",protocol="v2",outcome="{outcome}"}}'


_WELL = {
    f'up{{{_POD},job="haechi-serving/haechi-detectors"}}': "1x800",
    f'haechi_model_ready{{{_POD},model="safety"}}': "1x800",
    f'haechi_model_info{{{_POD},model="safety",version="a",engine="onnxruntime",precision="fp32"}}': "1x800",
    _requests("ok"): "0+600x800",
    f'haechi_request_duration_seconds_bucket{{{_POD},le="0.1"}}': "0+600x800",
    f'haechi_request_duration_seconds_bucket{{{_POD},le="2.5"}}': "0+600x800",
    f'haechi_request_duration_seconds_bucket{{{_POD},le="+Inf"}}': "0+600x800",
    f'haechi_detections_total{{{_POD},model="safety",class_name="fire"}}': "0+10x800",
    f'haechi_swaps_total{{{_POD},model="safety",outcome="swapped"}}': "0x400 1x400",
    f'haechi_samples_total{{{_POD},model="safety",outcome="written"}}': "0+60x800",
    f'process_open_fds{{{_POD},job="haechi-serving/haechi-detectors"}}': "80x800",
    f'process_max_fds{{{_POD},job="haechi-serving/haechi-detectors"}}': "1024x800",
}


_INFO = f'haechi_model_info{{{_POD},model="safety",version="a",engine="onnxruntime",precision="fp32"}}'
_TROUBLE: dict[str, dict[str, str]] = {
    "HaechiDetectorDown": {f'up{{{_POD},job="haechi-serving/haechi-detectors"}}': "1x790 0x10"},
    "HaechiDetectorGone": {_INFO: "1x780 stale _x20"},
    "HaechiModelNotReady": {f'haechi_model_ready{{{_POD},model="safety"}}': "1x790 0x10"},
    "HaechiRequestErrors": {_requests("error"): "0+20x800"},
    "HaechiOverloaded": {_requests("overload"): "0+20x800"},
    "HaechiSlow": {f'haechi_request_duration_seconds_bucket{{{_POD},le="0.1"}}': "0+500x800"},
    "HaechiRequestsRefused": {_requests("refused"): "0+400x800"},
    "HaechiSeesNothing": {f'haechi_detections_total{{{_POD},model="safety",class_name="fire"}}': "5x800"},
    "HaechiVersionsDiffer": {_INFO.replace('"a"', '"b"').replace('="p"', '="q"'): "1x800"},
    "HaechiSwapFailed": {f'haechi_swaps_total{{{_POD},model="safety",outcome="refused"}}': "0x795 1x5"},
    "HaechiSamplesDropped": {f'haechi_samples_total{{{_POD},model="safety",outcome="dropped_store"}}': "0+30x800"},
    "HaechiFilesRunOut": {f'process_open_fds{{{_POD},job="haechi-serving/haechi-detectors"}}': "900x800"},
}


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    return found


def _fires(
    promtool: str, folder: Path, series: dict[str, str], expression: str, samples: list[Object], unit: str = "m"
) -> None:
    """Assert what `expression` gives after 800 minutes, or hours, of `series` under our rules."""
    asked = {"expr": expression, "eval_time": f"800{unit}", "exp_samples": samples}
    lines = [{"series": name, "values": text} for name, text in series.items()]
    step = {"interval": f"1{unit}", "input_series": lines, "promql_expr_test": [asked]}
    wanted = {"rule_files": ["rules.yaml"], "evaluation_interval": f"1{unit}", "tests": [step]}
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": _groups()}))
    (folder / "test.yaml").write_text(yaml.safe_dump(wanted))
    command = [promtool, "test", "rules", "test.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", sorted(_TROUBLE))
def test_an_alert_fires_in_the_trouble_that_it_is_for(promtool: str, tmp_path: Path, alert: str) -> None:
    firing = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
    _fires(promtool, tmp_path, _WELL | _TROUBLE[alert], firing, [{"labels": "{}", "value": 1}])


def test_no_alert_fires_when_all_is_well(promtool: str, tmp_path: Path) -> None:
    _fires(promtool, tmp_path, _WELL, "ALERTS", [])


@pytest.mark.parametrize(("unsure", "alerts"), [("0x788 0+100x12", 1), ("0x800", 0)], ids=["moved", "steady"])
def test_confidence_that_moved_within_a_week_is_told(promtool: str, tmp_path: Path, unsure: str, alerts: int) -> None:
    series = {
        f'haechi_detection_confidence_count{{{_POD},model="safety"}}': "0+100x800",
        f'haechi_detection_confidence_bucket{{{_POD},model="safety",le="0.3"}}': unsure,
        f'haechi_detection_confidence_bucket{{{_POD},model="safety",le="0.9"}}': "0+100x800",
        f'haechi_detection_confidence_bucket{{{_POD},model="safety",le="+Inf"}}': "0+100x800",
    }
    firing = 'count(ALERTS{alertname="HaechiConfidenceShift",alertstate="firing"}) or vector(0)'
    _fires(promtool, tmp_path, series, firing, [{"labels": "{}", "value": alerts}], unit="h")


def test_every_alert_is_tried() -> None:
    assert {rule["alert"] for rule in _rules("alert")} == {*_TROUBLE, "HaechiConfidenceShift"}


# ---- what reads the metrics


def test_prometheus_reads_the_detectors_at_their_port() -> None:
    objects = render("overlays/production")
    monitor = find(objects, "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (pod,) = (pod for pod in pods(objects) if pod.owner.startswith("ServingRuntime"))
    assert monitor["metadata"]["namespace"] == pod.namespace
    assert monitor["spec"]["selector"]["matchLabels"].items() <= pod.labels.items()
    assert endpoint["port"] in pod.ports()
    assert endpoint["path"] == "/metrics"
    assert {item["targetLabel"] for item in endpoint["relabelings"]} <= _SCRAPED


def test_prometheus_shows_a_key_where_an_overlay_has_the_patch_of_the_docs() -> None:
    (plain,) = find(render("base/monitoring"), "PodMonitor")["spec"]["podMetricsEndpoints"]
    (endpoint,) = find(patched("base/monitoring", "PodMonitor"), "PodMonitor")["spec"]["podMetricsEndpoints"]
    shown = {"type": "Bearer", "credentials": {"name": "haechi-metrics", "key": "api_key"}}
    assert endpoint == plain | {"authorization": shown}


def test_grafana_finds_a_dashboard_whose_panels_stand_side_by_side() -> None:
    config = find(render("base/monitoring"), "ConfigMap")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    board = _dashboard()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells, f"{panel['title']} lies over another panel"
        assert at["x"] + at["w"] <= 24
        cells |= own
    assert (MANIFESTS / "base/monitoring/dashboards/serving.json").read_text().endswith("}\n")

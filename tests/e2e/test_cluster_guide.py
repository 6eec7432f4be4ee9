"""docs/cluster.md: every command is run on a real API server, or stands in the list of those that nothing here can run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from api_server import ApiServer
from guide_world import CRDS, PAGE, ROOT, Done, Guide, commands, furnish
from kfp_server import KfpServer
from kfp_server import why_absent as why_no_pipelines
from kserve_stand_in import KserveStandIn
from kserve_webhook import KserveWebhook
from pod_network import PodNetwork
from tiny_models import tiny_model_folder

from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.components.shared.tracking import Tracker
from haechi.pipelines import cli
from haechi.pipelines.demo.plan import Plan
from haechi.pipelines.parameters import run_parameters
from tests.pipelines.kfp_stand_in import KfpStandIn
from tests.serving_process import running

TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = commands(TEXT)
# Nothing here can run these: they want Docker, the network, or controllers. A new one fails until somebody decides.
NOT_HERE = (
    r"kind create cluster --name haechi --image kindest/node:v1\.34\.0 --wait 5m",
    r"kubectl apply -f https://github\.com/cert-manager/cert-manager/releases/download/v1\.20\.3/cert-manager\.yaml",
    r"kubectl wait --for=condition=Available deployment --all -n cert-manager --timeout=5m",
    r"helm install eg oci://docker\.io/envoyproxy/gateway-helm --version v1\.8\.1 .*",
    r"helm install kserve-crd oci://ghcr\.io/kserve/charts/kserve-crd --version v0\.20\.0 .*",
    r"helm install kserve oci://ghcr\.io/kserve/charts/kserve-resources --version v0\.20\.0 .*",
    r'kubectl apply -k "github\.com/kubeflow/pipelines/manifests/kustomize/cluster-scoped-resources\?ref=2\.17\.0"',
    r"kubectl wait --for=condition=established crd/applications\.app\.k8s\.io --timeout=60s",
    r'kubectl apply -k "github\.com/kubeflow/pipelines/manifests/kustomize/env/platform-agnostic\?ref=2\.17\.0"',
    r"kubectl wait --for=condition=Available deployment --all -n kubeflow --timeout=20m",
    r"kind load docker-image .*",
    r"helm install prometheus oci://ghcr\.io/prometheus-community/charts/kube-prometheus-stack --version 83\.4\.0 .*",
    r"kind delete cluster --name haechi",
)
# These are run; `make` by --dry-run, a tunnel by a look at its Service, `exec` as the pod's service account.
RUN_HERE = (
    r"kubectl (apply|delete) (--server-side |--field-manager=\w+ )*-[kf] manifests/\S+",
    r"kubectl (patch|annotate|create secret|get|delete|rollout status|port-forward|exec) .*",
    r"(key\(\)|gateway=|export|for space in|cat >|curl|make) ?.*",
    r"\.venv/bin/(haechi|python) .*",
)
# Lines that the page shows and that nothing here can print: what kind, helm, KServe's own columns and running steps say.
NOT_SHOWN_HERE = (
    r" ✓ Ready after .*",
    r"(deployment\.apps|customresourcedefinition\.apiextensions\.k8s\.io)/\S+ condition met",
    r"STATUS: deployed",
    r"== haechi/(steps|train|serving):0\.1\.0",
    r'Image: "haechi/train:0\.1\.0" with ID .*',
    r"Forwarding from 127\.0\.0\.1:9000 -> 8333",
    r"[\d:]+ resolve    running",
    r"NAME +URL +READY .*",
    r"safety +http://safety-haechi-serving\.example\.com +True .*",
)
# The doctor ends with 2 where it could not look at everything.
CODES = {".venv/bin/haechi doctor": (0, 2)}


def _is_one_of(patterns: Iterable[str], command: str) -> bool:
    return any(re.fullmatch(pattern, command, re.S) for pattern in patterns)


# Nothing is run that no list names: an unknown command could reach the reader's own cluster.
HERE = [command for command in COMMANDS if _is_one_of(RUN_HERE, command) and not _is_one_of(NOT_HERE, command)]


@pytest.fixture(scope="module")
def guide(
    can_start: None, tmp_path_factory: pytest.TempPathFactory, s3_settings: Settings, mlflow_uri: str
) -> Iterator[Guide]:
    """The cluster as step 1 leaves it; of its own, since the page deletes namespaces."""
    if not CRDS.is_dir():
        pytest.skip(f"the schemas of KServe and others are not present at {CRDS}")
    settings = replace(s3_settings, bucket="haechi", mlflow_tracking_uri=mlflow_uri)
    folder = tmp_path_factory.mktemp("guide")
    names, classes = ("first", "second"), ["smoke", "fire", "person_down"]
    models = [
        (tiny_model_folder(folder / name, classes, name="safety", shift=shift), folder / name)
        for shift, name in enumerate(names)
    ]
    uris = [f"s3://haechi/models/safety/{model.version}" for model, _ in models]
    (folder / "room").mkdir()
    with (
        ApiServer(folder / "cluster") as server,
        running(folder / "first", "--name", "safety") as one,
        running(folder / "second", "--name", "safety") as two,
        KfpStandIn() as pipelines,
    ):
        furnish(server, settings)
        with (
            KserveWebhook(server, folder),
            KserveStandIn(server, "haechi-serving") as kserve,
            PodNetwork(kserve, dict(zip(uris, (one.url, two.url), strict=True))) as network,
        ):
            kserve.gateway = True
            yield Guide(server, folder / "room", settings, pipelines, kserve, network, models, one.url)
    Tracker(settings)._client.delete_registered_model("safety")


@pytest.fixture(scope="module")
def journey(guide: Guide) -> dict[str, list[Done]]:
    """Every command of the page that can be run, in order; by command, as some stand there twice."""
    found: dict[str, list[Done]] = {}
    for command in HERE:
        found.setdefault(command, []).append(guide.carry_out(command))
    return found


def _label(command: str) -> str:
    return " ".join(command.split())[:70]


@pytest.mark.e2e
@pytest.mark.parametrize("command", list(dict.fromkeys(HERE)), ids=_label)
def test_a_command_of_the_page_does_its_work(journey: dict[str, list[Done]], command: str) -> None:
    for done in journey[command]:
        assert done.code in CODES.get(command, (0,)), done.err + done.out


@pytest.mark.parametrize("command", COMMANDS, ids=_label)
def test_a_command_is_run_here_or_named_as_one_that_cannot_be(command: str) -> None:
    assert command in HERE or _is_one_of(NOT_HERE, command)


def test_the_list_of_commands_that_cannot_be_run_names_none_that_is_gone() -> None:
    assert [p for p in NOT_HERE if not any(_is_one_of([p], command) for command in COMMANDS)] == []


def _only(journey: dict[str, list[Done]], start: str) -> list[Done]:
    return [done for command, dones in journey.items() if command.startswith(start) for done in dones]


@pytest.mark.e2e
def test_the_doctor_finds_nothing_where_the_page_was_followed(journey: dict[str, list[Done]]) -> None:
    (done,) = _only(journey, ".venv/bin/haechi doctor")
    assert done.out.splitlines()[-1].startswith("0 found")
    # By the tunnels of step 4 nothing is left unseen.
    assert done.code == 0
    assert re.findall(r"^ +checks +(.*)", done.out, re.M) == []


@pytest.mark.e2e
def test_status_follows_both_rounds_and_the_way_back(guide: Guide, journey: dict[str, list[Done]]) -> None:
    first, second = (model.version for model, _ in guide.models)
    where = "kserve:haechi-serving/safety names"
    one, two = _only(journey, ".venv/bin/haechi status")
    rolled, back = _only(journey, "kubectl exec")
    assert f"{where} {first}, ready" in one.out
    assert f"champion    {second} (before: {first})\n" in two.out
    assert f"{where} {second}, ready\nrollout     {second} by canary: done" in two.out
    assert rolled.out == f"champion  {first}\nbefore    {second}\n"
    assert f"{where} {first}, ready" in back.out


def _shown() -> list[tuple[str, list[str]]]:
    """Every line of output that the page shows, with the commands of the block before it."""
    blocks = re.findall(r"```sh\n((?:(?!```).)*)```\n```text\n(.*?)```", TEXT, re.S)
    assert len(blocks) == TEXT.count("```text\n"), "output stands right behind the commands that it is of"
    return [
        (line, commands(f"```sh\n{block}```"))
        for block, text in blocks
        for line in text.splitlines()
        if line.strip("… ") and not _is_one_of(NOT_SHOWN_HERE, line)
    ]


def _is_shown_as(line: str, shown: str) -> bool:
    """Whether a line came out as it is shown: digests, dates, times and ports are others each time, `…` is anything."""
    varies = r"\b[0-9a-f]{12}\b|\d{4}-\d\d-\d\d.*|\d\d:\d\d:\d\d|https?://[\w.]+:\d+|details/.*"
    pattern = ".*".join(map(re.escape, re.sub(varies, "…", shown).split("…")))
    return bool(re.fullmatch(pattern, line))


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("shown", "block"), _shown(), ids=lambda value: _label(value) if isinstance(value, str) else ""
)
def test_what_the_page_shows_is_what_comes_out(journey: dict[str, list[Done]], shown: str, block: list[str]) -> None:
    done = [done for command in block for done in journey.get(command, [])]
    came = [line for text in (part for item in done for part in (item.out, item.err)) for line in text.splitlines()]
    assert any(_is_shown_as(line, shown) for line in came), came


def test_the_list_of_lines_that_nothing_prints_here_names_none_that_is_gone() -> None:
    shown = re.findall(r"```text\n(.*?)```", TEXT, re.S)
    lines = [line for text in shown for line in text.splitlines()]
    assert [p for p in NOT_SHOWN_HERE if not any(_is_one_of([p], line) for line in lines)] == []


@pytest.mark.e2e
def test_the_curl_line_is_answered_by_the_model(journey: dict[str, list[Done]]) -> None:
    (done,) = _only(journey, "curl ")
    (prediction,) = json.loads(done.out)["predictions"]
    assert (prediction["width"], prediction["height"]) == (320, 240)


@pytest.mark.e2e
def test_runs_name_data_that_the_page_has_uploaded(guide: Guide, journey: dict[str, list[Done]]) -> None:
    one, two = (run["runtime_config"]["parameters"] for run in guide.pipelines.runs)
    assert one["target"] == two["target"] == "kserve:haechi-serving/safety"
    assert [len(run["imports"]) for run in (one, two)] == [1, 0]
    assert two["candidates"][0]["model"] == "champion"
    store = Store(guide.settings)
    assert store.exists(one["imports"][0]["uri"].removeprefix("s3://haechi/") + "/data.yaml")
    assert sum(1 for _ in store.list(two["sources"][0]["uri"].removeprefix("s3://haechi/"))) > 200


@pytest.mark.e2e
def test_the_patch_of_kserves_storage_keeps_its_image(guide: Guide, journey: dict[str, list[Done]]) -> None:
    found = guide.server.get("/apis/serving.kserve.io/v1alpha1/clusterstoragecontainers/default")
    container = found["spec"]["container"]
    assert container["image"].startswith("kserve/")
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.e2e
def test_the_submit_lines_are_taken_by_the_real_server_of_pipelines(
    guide: Guide, journey: dict[str, list[Done]], tmp_path: Path
) -> None:
    if absent := why_no_pipelines():
        pytest.skip(absent)
    with KfpServer(tmp_path, guide.server, guide.settings) as pipelines:
        for command in (done.command for done in _only(journey, ".venv/bin/haechi submit")):
            # Nothing runs the Workflow, so there is no end to wait for.
            done = guide.shell(f"KF_PIPELINES_ENDPOINT={pipelines.host} {command.replace(' --wait', '')}")
            assert done.code == 0, done.err
            assert "run       " in done.out


@pytest.mark.parametrize("command", [c for c in COMMANDS if "haechi " in c and ".venv/bin/haechi" in c], ids=_label)
def test_a_verb_of_the_page_is_one_of_the_command_line(command: str) -> None:
    words = shlex.split(command.replace("\\\n", " "))
    assert cli.build_parser().parse_args(words[1:]).verb == words[1]


def test_the_first_round_trains_as_the_demo_does(tmp_path: Path) -> None:
    (written,) = [command for command in COMMANDS if command.startswith("cat > .haechi/first.yaml")]
    preset = tmp_path / "first.yaml"
    preset.write_text("\n".join(written.splitlines()[1:-1]))
    ours, demo = run_parameters(str(preset)), Plan().first_round(tmp_path, "none")
    assert ours["candidates"] == demo["candidates"][:1]
    for name in ("classes", "ratios", "bands", "gate", "seed", "device"):
        assert ours[name] == demo[name], name


def test_the_images_are_those_that_the_pipeline_and_the_overlay_name() -> None:
    (loaded,) = [command for command in COMMANDS if command.startswith("kind load")]
    images = {word for word in loaded.split() if word.startswith("haechi/")}
    overlay = yaml.safe_load((ROOT / "manifests/overlays/local/kustomization.yaml").read_text())
    pinned = {f"{item['name']}:{item['newTag']}" for item in overlay["images"] if item["name"].startswith("haechi/")}
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version
    with (ROOT / "pipelines/compiled/training.yaml").open() as file:
        parameters = next(yaml.load_all(file, yaml.CSafeLoader))["root"]["inputDefinitions"]["parameters"]
    assert images == pinned | {parameters[name]["defaultValue"] for name in ("steps_image", "train_image")}
    assert {image.partition(":")[2] for image in images} == {version[1]}


def test_kserve_is_sent_to_the_store_that_the_steps_write_to() -> None:
    (noted,) = [shlex.split(command) for command in COMMANDS if command.startswith("kubectl annotate")]
    notes = dict(word.removeprefix("serving.kserve.io/").split("=") for word in noted if word.startswith("serving."))
    for name in ("pipeline", "serving"):
        patch = yaml.safe_load((ROOT / f"manifests/overlays/local/configmap-patch-{name}.yaml").read_text())
        assert patch["data"]["HAECHI_S3_ENDPOINT"] == f"http://{notes['s3-endpoint']}"
    assert notes["s3-usehttps"] == "0"


def test_the_page_is_short_and_its_links_lead_somewhere() -> None:
    assert len(TEXT.splitlines()) <= 265
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)", TEXT):
        path = (PAGE.parent / target).resolve() if target else PAGE
        assert path.is_file(), target
        heads = [head.lower() for head in re.findall(r"^#+ (.*)", path.read_text(), re.M)]
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", head).replace(" ", "-") for head in heads], anchor
    for path in re.findall(r"(?<![\w./])((?:manifests|tests|docs)/[\w./-]+\w)", TEXT):
        assert (ROOT / path).exists(), path

"""The container images: built from this checkout, and run as a cluster runs them: non-root, read-only, no capability.

No Kubernetes is at hand. What KFP's launcher does around a step is done here by `Launcher` (the facts are those of KFP
2.17: the executor's input in place of `{{$}}`, scratch volumes, output paths below the pipeline root), with one scratch
folder for all steps instead of uploads and downloads between them. The object store and MLflow are real servers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.pipelines.demo.world import CLASSES, RAW_PATTERN, draw_labelled, draw_raw
from haechi.pipelines.placement import _USER
from tests.git_servers import PASSWORD, git_over_http, git_over_ssh
from tests.tiny_models import cell_box, paint, shade, tiny_model_folder

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ("steps", "train", "serving")
TAG = "under-test"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# What images/README.md states, in MB (10^6 bytes) without the base: an image that grows beyond it is found here.
MAX_MB = {"steps": 850, "train": 6000, "serving": 500}
# As a pod under Pod Security "restricted" gets it. podman's own tmpfs mounts would hide a write outside of /tmp, and its own
# line in /etc/passwd that containerd writes none.
RESTRICTED = ["--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"]
RESTRICTED += ["--passwd=false"]
LIMITS = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000", "--network=host"]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]


@functools.cache
def podman() -> list[str]:
    """podman and its global options, with runc where crun refuses the cgroup hierarchy."""
    runc = shutil.which("runc", path=os.environ["PATH"] + ":/usr/sbin")
    hybrid = not Path("/sys/fs/cgroup/cgroup.controllers").exists()
    return ["podman", *(["--runtime", runc] if runc and hybrid else [])]


def call(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)


@pytest.fixture(scope="module")
def bases() -> dict[str, str]:
    """Image → the name of its base, which runs here, or a skip with the reason. Only the steps want git and ssh."""
    for program in ("podman", "mmdebstrap"):
        if not shutil.which(program):
            pytest.skip(f"images are built only where {program} is installed (see .ci/apt.txt)")
    if os.geteuid() != 0:
        pytest.skip("images are built as root only: mmdebstrap and podman need it here")
    lean, with_git = (call([".ci/base-image", *more]) for more in ((), ("git", "openssh-client")))
    for made in (lean, with_git):
        if made.returncode != 0:
            pytest.skip(f"no base image could be made: {made.stderr.strip()[-300:]}")
    ran = call([*podman(), "run", "--rm", *LIMITS, *RESTRICTED, lean.stdout.strip(), "true"])
    if ran.returncode != 0:
        pytest.skip(f"containers cannot run here: {ran.stderr.strip()[-300:]}")
    return {image: (with_git if image == "steps" else lean).stdout.strip() for image in IMAGES}


@pytest.fixture(scope="module")
def images(bases: dict[str, str]) -> dict[str, str]:
    """Image → its name, all three built by `make images` from this checkout; train as for CPUs."""
    given = {"TAG": TAG, "ENGINE": "podman", "EXCLUDES": "--no-emit-package triton"}
    for names in (("steps",), ("train", "serving")):
        which = {"IMAGES": " ".join(names), "BASE": bases[names[0]]}
        built = call(["make", "images"], env={**os.environ, **given, **which})
        assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-3000:]
    return {image: f"localhost/haechi/{image}:{TAG}" for image in IMAGES}


def run_in(image: str, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """One program in a restricted container whose /tmp alone is writable."""
    return call([*podman(), "run", "--rm", *LIMITS, *RESTRICTED, "--tmpfs=/tmp", *options, image, *command])


def inspect(image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call([*podman(), "image", "inspect", image]).stdout)[0]
    return found


# ---- what the images are


def test_dockerfiles_are_clean() -> None:
    hadolint = shutil.which("hadolint", path=f"{ROOT / '.venv/bin'}:{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("hadolint is not installed")
    found = call([hadolint, *(f"images/{image}/Dockerfile" for image in IMAGES)])
    assert (found.returncode, found.stdout) == (0, "")


def test_stages_of_one_name_are_the_same_text_so_that_an_engine_builds_them_once() -> None:
    files = [(ROOT / f"images/{image}/Dockerfile").read_text() for image in IMAGES]
    for begin, end in (("ARG BASE=", "# The packages with"), ("# What changes with", "FROM ${BASE}\n")):
        assert len({text[text.index(begin) : text.index(end, text.index(begin))] for text in files}) == 1, begin


def test_the_build_sees_no_secret_that_lies_in_the_checkout(bases: dict[str, str], tmp_path: Path) -> None:
    kept = ["pyproject.toml", "components/deploy/step.py", "pipelines/presets/safety.yaml", "images/serving/app.py"]
    planted = [".env", ".git/config", ".haechi/demo/key", ".venv/pip.conf", "kubeconfig", "tests/a.py", "images/a.txt"]
    planted += ["components/.env", "components/deploy/.netrc", "pipelines/tls.key", "images/serving/.ssh/id_ed25519"]
    for name in (*kept, *planted, ".dockerignore", "Dockerfile"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    (tmp_path / "Dockerfile").write_text(f"FROM {bases['serving']}\nCOPY . /context/\n")
    name = f"localhost/haechi/context:{TAG}"
    built = call([*podman(), "build", "--quiet", f"--tag={name}", f"--file={tmp_path}/Dockerfile", str(tmp_path)])
    try:
        assert built.returncode == 0, built.stderr
        seen = run_in(name, "find", "/context", "-type", "f", "-printf", "%P\n")
    finally:
        call([*podman(), "image", "rm", "--force", name])
    assert sorted(seen.stdout.split()) == sorted(kept)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_says_what_it_is_and_runs_as_a_numeric_user(
    image: str, images: dict[str, str], bases: dict[str, str]
) -> None:
    config = inspect(images[image])["Config"]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    revision = labels["revision"].removesuffix("-dirty")
    assert config["User"] == f"{_USER}:{_USER}"
    assert (labels["title"], labels["version"]) == (f"haechi/{image}", VERSION)
    assert call(["git", "merge-base", "--is-ancestor", revision, "HEAD"]).returncode == 0
    assert labels["licenses"] == ("MIT AND AGPL-3.0-only" if image == "train" else "MIT")
    assert labels["base.name"] == bases[image]
    assert labels["description"]


_LOOK = """
import importlib.metadata as metadata, json, os, pathlib, shutil, stat
places = ["/opt", "/src", "/out", "/tmp", "/root/.cache", "/root/.local", "/root/.config", "/run/secrets"]
places += ["/var/lib/apt/lists", "/var/cache/apt"]
files = [str(path) for place in places for path in pathlib.Path(place).rglob("*") if path.is_file()]
root, modes = os.stat("/").st_dev, {}
for folder, folders, names in os.walk("/"):
    folders[:] = [name for name in folders if os.lstat(os.path.join(folder, name)).st_dev == root]
    modes |= {path: os.lstat(path).st_mode for path in (os.path.join(folder, name) for name in (*folders, *names))}
modes = {path: mode for path, mode in modes.items() if stat.S_ISREG(mode) or stat.S_ISDIR(mode)}
print(json.dumps({
    "names": {item.metadata["Name"].lower().replace("_", "-"): item.version for item in metadata.distributions()},
    "left": [path for path in files if not path.startswith("/opt/haechi/") and not path.endswith("/lock")],
    "tools": [tool for tool in ("gcc", "cc", "c++", "make", "uv", "apt-get", "git", "ssh") if shutil.which(tool)],
    "becomes": [path for path, mode in modes.items() if stat.S_ISREG(mode) and mode & 0o6000],
    "anybody": [path for path, mode in modes.items() if mode & 0o002 and not mode & stat.S_ISVTX],
}))
"""


@pytest.mark.parametrize(
    ("image", "tools", "without", "holds"),
    [
        ("steps", ["git", "ssh"], {"torch", "ultralytics-opencv-headless", "triton"}, {"kfp", "minio", "onnxruntime"}),
        ("train", [], {"triton"}, {"kfp", "torch", "ultralytics-opencv-headless"}),
        (
            "serving",
            [],
            {"torch", "ultralytics-opencv-headless", "kfp", "kubernetes", "mlflow-skinny"},
            {"onnxruntime"},
        ),
    ],
)
def test_an_image_holds_what_it_needs_and_nothing_of_its_making(
    image: str, tools: list[str], without: set[str], holds: set[str], images: dict[str, str]
) -> None:
    looked = run_in(images[image], "-c", _LOOK, options=("--entrypoint=python3", "--user=0", "--cap-add=dac_override"))
    found = json.loads(looked.stdout)
    names = set(found["names"])
    assert not names & {*without, "pip", "uv", "pytest"}
    assert names >= {*holds, "haechi"}
    assert (found["left"], found["tools"]) == ([], tools)
    assert (found["becomes"], found["anybody"]) == ([], [])
    told = run_in(images[image], "/opt/haechi/requirements.txt", options=("--entrypoint=cat",)).stdout
    assert {f"{name}=={found['names'][name]}" for name in names - {"haechi"}} == set(told.split())
    story = json.dumps(inspect(images[image])["History"]) + json.dumps(inspect(images[image])["Config"])
    for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        assert not (value := os.environ.get(name)) or value not in story


def test_sizes_are_as_stated(images: dict[str, str], bases: dict[str, str]) -> None:
    share = inspect(bases["serving"])["Size"]
    sizes = {image: (inspect(name)["Size"] - share) / 1e6 for image, name in images.items()}
    print(f"base {share / 1e6:.0f} MB; without it {', '.join(f'{name} {size:.0f} MB' for name, size in sizes.items())}")
    assert {name: size for name, size in sizes.items() if not 0.5 * MAX_MB[name] < size <= MAX_MB[name]} == {}


# ---- steps as KFP's launcher calls them


@dataclass
class Launcher:
    """Runs the executors of the compiled pipeline.

    Attributes:
        images: image → name.
        env: environment of a step's pod.
        scratch: host folder that is /minio in every container.
        outputs: executor → URIs of its output artifacts by name.
    """

    images: dict[str, str]
    env: dict[str, str]
    scratch: Path
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)

    def start(
        self, name: str, parameters: dict[str, Any], artifacts: dict[str, str] | None = None, salt: str = "1"
    ) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
        """One executor; how it ended, and the executor's output."""
        container = pipeline()["deploymentSpec"]["executors"][f"exec-{name}"]["container"]
        spec = pipeline()["components"][f"comp-{name}"]
        task = f"minio://mlpipeline/v2/artifacts/training/run-1/{name}/{salt}"
        outputs = spec.get("outputDefinitions", {})
        made = {key: f"{task}/{key}" for key in outputs.get("artifacts", {})}
        output_file = _local(f"{task}/output_metadata.json")
        executor_input = {
            "inputs": {
                "parameterValues": parameters,
                "artifacts": {
                    key: _artifact(key, uri, spec["inputDefinitions"]["artifacts"])
                    for key, uri in (artifacts or {}).items()
                },
            },
            "outputs": {
                "artifacts": {key: _artifact(key, uri, outputs["artifacts"]) for key, uri in made.items()},
                "parameters": {key: {"outputFile": f"/tmp/kfp/outputs/{key}"} for key in outputs.get("parameters", {})},
                "outputFile": output_file,
            },
        }
        assert set(parameters) == set(spec.get("inputDefinitions", {}).get("parameters", {}))
        folder = self.scratch / Path(output_file).relative_to("/minio").parent
        _writable(folder)
        words = [*container["command"], *container["args"]]
        words = [word.replace("{{$}}", json.dumps(executor_input)) for word in words]
        image = self.images["train" if "train_image" in container["image"] else "steps"]
        with _volumes(folder.parent) as volumes:
            mounts = [f"--volume={self.scratch}:/minio", *volumes, *(f"--env={k}={v}" for k, v in self.env.items())]
            done = call([*podman(), "run", "--rm", *LIMITS, *RESTRICTED, *mounts, image, *words])
        self.outputs[name] = made
        written = folder / "output_metadata.json"
        return done, json.loads(written.read_text()) if written.is_file() else {}

    def path(self, name: str, output: str) -> Path:
        """An output artifact on the host."""
        return self.scratch / Path(_local(self.outputs[name][output])).relative_to("/minio")


@functools.cache
def pipeline() -> dict[str, Any]:
    """The committed IR, without the platform's part."""
    documents: dict[str, Any] = next(yaml.safe_load_all((ROOT / "pipelines/compiled/training.yaml").read_text()))
    return documents


def _local(uri: str) -> str:
    return uri.replace("minio://", "/minio/")


def _artifact(name: str, uri: str, definitions: dict[str, Any]) -> dict[str, Any]:
    kind = definitions[name]["artifactType"]
    return {"artifacts": [{"name": name, "uri": uri, "type": kind, "metadata": {}}]}


def _writable(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)  # as Kubernetes makes an emptyDir


@contextlib.contextmanager
def _volumes(folder: Path) -> Iterator[list[str]]:
    """The volumes that KFP and placement.py give a step's pod."""
    room = folder / "volumes"
    names = {"/tmp": "tmp", "/gcs": "gcs", "/s3": "s3", "/.local": "local", "/.cache": "cache", "/.config": "config"}
    for name in names.values():
        _writable(room / name)
    yield [f"--volume={room / name}:{target}" for target, name in names.items()]
    shutil.rmtree(room)


@pytest.fixture(scope="module")
def launcher(
    images: dict[str, str], s3_settings: Settings, mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory
) -> Launcher:
    """A launcher on real services, with a few labelled pictures and raw frames in the bucket."""
    folder = tmp_path_factory.mktemp("launcher")
    bucket = f"images-{uuid.uuid4().hex[:8]}"
    settings = replace(s3_settings, bucket=bucket, mlflow_tracking_uri=mlflow_uri, threads=2)
    store = Store(settings)
    store.ensure_bucket()
    labelled = draw_labelled(folder / "labelled", seed=3, count=24)
    for path in (path for path in labelled.rglob("*") if path.is_file()):
        store.put(f"incoming/labelled/{path.relative_to(labelled)}", path.read_bytes())
    for frame in draw_raw(seed=3, bursts=1, frames=2):
        store.put(frame.key, frame.data)
    _writable(folder / "minio")
    return Launcher(images, settings.to_env(), folder / "minio")


NAME = {"name": "safety"}
GATE = {"min_boxes": 1, "min_groups": 1, "floors": {"default": 0.0}, "draws": 100}
CANDIDATE = {"name": "tiny", "model": "yolo11n", "epochs": 1, "imgsz": 64, "batch": 8}


def _asked() -> dict[str, Any]:
    """What `resolve` is given where a run leaves all parameters as they are."""
    defaults = pipeline()["root"]["inputDefinitions"]["parameters"]
    wanted = pipeline()["components"]["comp-resolve"]["inputDefinitions"]["parameters"]
    return {name: defaults[name]["defaultValue"] for name in wanted}


def _journey(bucket: str) -> list[tuple[str, dict[str, Any], dict[str, tuple[str, str]]]]:
    """Executor, its parameters, and where its input artifacts come from, in the data's order."""
    none = NAME | {"champion": ""}
    model, dataset = ("export", "onnx_model"), ("build", "dataset")
    judged = {"onnx_model": model, "verdict": ("evaluate", "verdict")}
    return [
        ("resolve", _asked(), {}),
        (
            "ingest",
            {
                "sources": [{"uri": f"s3://{bucket}/raw/", "pattern": RAW_PATTERN}],
                "imports": [{"uri": f"s3://{bucket}/incoming/labelled/"}],
                "classes": list(CLASSES),
                "quality": {},
                "run_id": "run-1",
            },
            {},
        ),
        (
            "label",
            none
            | {
                "teacher": "",
                "classes": list(CLASSES),
                "class_map": {},
                "bands": {"default": [0.25, 0.6]},
                "review_limit": 5,
            },
            {"frames": ("ingest", "frames")},
        ),
        (
            "build",
            NAME
            | {"classes": list(CLASSES), "previous_dataset": "", "seed": 1, "grouping": {}}
            | {"ratios": {"val": 0.25, "test": 0.25}},
            {"labels": ("label", "labels")},
        ),
        (
            "train",
            none
            | {"candidate": CANDIDATE, "seed": 1, "device": "auto", "run_id": "run-1", "retrain": False}
            | {"train_cpu": "2", "train_memory": "4Gi", "gpu_type": "nvidia.com/gpu", "gpu_count": "0"},
            {"dataset": dataset},
        ),
        (
            "export",
            NAME | {"thresholds": {"default": 0.25}, "iou": 0.7, "golden_images": 2},
            {"checkpoints": ("train", "checkpoint"), "dataset": dataset},
        ),
        ("evaluate", none | {"gate": GATE}, {"onnx_model": model, "dataset": dataset}),
        (
            "deploy",
            none | {"target": "none", "run_id": "run-1", "rollout": {}},
            judged | {"report": ("evaluate", "report")},
        ),
        ("refuse", NAME | {"run_id": "run-1"}, judged),
    ]


@pytest.fixture(scope="module")
def journey(launcher: Launcher) -> dict[str, tuple[subprocess.CompletedProcess[str], dict[str, Any]]]:
    """Every executor of the pipeline, each on what those before it wrote: executor → how it ended and its output."""
    done = {}
    for name, parameters, sources in _journey(launcher.env["HAECHI_BUCKET"]):
        if name == "refuse":  # what it refuses must have been judged so
            artifacts = {key: launcher.outputs[task][output] for key, (task, output) in sources.items()}
            launcher.start(
                "evaluate",
                NAME | {"champion": "", "gate": {"min_boxes": 10_000}},
                {"onnx_model": artifacts["onnx_model"], "dataset": launcher.outputs["build"]["dataset"]},
                salt="2",
            )
        artifacts = {key: launcher.outputs[task][output] for key, (task, output) in sources.items()}
        done[name] = launcher.start(name, parameters, artifacts)
        if done[name][0].returncode != 0:
            break
    return done


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("name", "proof"),
    [
        ("resolve", lambda at, out: out["parameterValues"] == {"champion": "", "previous_dataset": ""}),
        ("ingest", lambda at, out: _read(at("ingest", "frames") / "ingest.json")["imported"] == 24),
        ("label", lambda at, out: (at("label", "labels") / "label.json").is_file()),
        ("build", lambda at, out: (at("build", "dataset") / "manifest.parquet").is_file()),
        ("train", lambda at, out: _read(at("train", "checkpoint") / "train.json")["status"] == "ok"),
        ("export", lambda at, out: (at("export", "onnx_model") / "model.onnx").is_file()),
        ("evaluate", lambda at, out: out["parameterValues"] == {"Output": "promote"}),
        ("deploy", lambda at, out: out["parameterValues"] == {"Output": "promote"}),
        ("refuse", lambda at, out: out["parameterValues"] == {"Output": "not_enough_data"}),
    ],
)
def test_a_step_does_its_work_in_its_image(
    name: str,
    proof: Callable[[Callable[[str, str], Path], dict[str, Any]], bool],
    journey: dict[str, tuple[subprocess.CompletedProcess[str], dict[str, Any]]],
    launcher: Launcher,
) -> None:
    if name not in journey:
        pytest.fail(f"not reached: {list(journey)[-1]} failed before it")
    process, output = journey[name]
    assert process.returncode == 0, process.stdout[-1000:] + process.stderr[-3000:]
    assert proof(launcher.path, output), json.dumps(output)


def test_every_executor_is_run() -> None:
    assert {f"exec-{name}" for name, _, _ in _journey("")} == set(pipeline()["deploymentSpec"]["executors"])


def test_a_step_without_settings_fails_with_our_error(launcher: Launcher) -> None:
    bare = replace(launcher, env={}, outputs={})
    process, output = bare.start("resolve", _asked(), salt="bare")
    assert process.returncode != 0
    assert output == {}
    assert "SettingsError: HAECHI_S3_ENDPOINT" in process.stderr


@pytest.mark.parametrize("image", ["steps", "train"])
def test_any_numeric_user_will_do(image: str, images: dict[str, str]) -> None:
    code = "import getpass, pathlib, cv2, kfp, mlflow; print(getpass.getuser(), pathlib.Path.home())"
    ran = run_in(images[image], "python3", "-c", code, options=("--user=1000730000:0",))
    assert ran.stdout == "haechi /tmp\n", ran.stderr[-2000:]


# ---- deploy's target git:

_COMMIT = """
import pathlib, sys
from haechi.components.deploy.git_target import commit
from haechi.components.shared.model_folder import ModelFolder
model = ModelFolder.load(pathlib.Path("/models"))
secret = pathlib.Path("/etc/haechi/git")
print(commit(sys.argv[1], "main", "safety.yaml", model, "s3://haechi/models/tiny", {"Verdict": "promote"}, secret))
"""


@contextlib.contextmanager
def _over_http(bare: Path, secret: Path) -> Iterator[str]:
    (secret / "username").write_text("bot")
    (secret / "password").write_text(PASSWORD)
    with git_over_http(bare.parent) as url:
        yield f"{url}/{bare.name}"


@contextlib.contextmanager
def _over_ssh(bare: Path, secret: Path) -> Iterator[str]:
    with git_over_ssh(secret) as url:
        yield f"{url}{bare}"


def _git(*arguments: str) -> str:
    done = call(["git", "-c", "user.name=a", "-c", "user.email=a@localhost", *arguments])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A bare repository with one commit on `main`."""
    repository = tmp_path / "bare.git"
    _git("init", "--quiet", "--bare", "--initial-branch=main", str(repository))
    inside = functools.partial(_git, "-C", str(repository))
    empty = inside("hash-object", "-t", "tree", "-w", "/dev/null")
    inside("update-ref", "refs/heads/main", inside("commit-tree", empty, "-mfirst"))
    return repository


@pytest.mark.parametrize("way", [_over_http, _over_ssh])
def test_the_steps_image_pushes_a_commit_with_the_credentials_that_a_pod_has(
    way: Callable[[Path, Path], contextlib.AbstractContextManager[str]],
    images: dict[str, str],
    bare: Path,
    tmp_path: Path,
) -> None:
    model, secret = tmp_path / "model", tmp_path / "secret"
    version = tiny_model_folder(model, ["person"], name="safety").version
    secret.mkdir()
    with way(bare, secret) as url:
        volumes = (f"--volume={model}:/models:ro", f"--volume={secret}:/etc/haechi/git:ro")
        done = run_in(images["steps"], "python3", "-c", _COMMIT, url, options=volumes)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip() == _git("-C", str(bare), "rev-parse", "main")
        assert _git("-C", str(bare), "log", "-1", "--format=%s", "main") == f"Serve safety {version}"
        # Nor does a host that nobody vouched for get anything.
        for name in ("password", "known_hosts"):
            (secret / name).unlink(missing_ok=True)
        refused = run_in(images["steps"], "python3", "-c", _COMMIT, url, options=volumes)
    assert refused.returncode != 0
    assert "DeployError: git could not fetch" in refused.stderr


def test_the_reconciler_as_its_deployment_starts_it_brings_the_champion_to_the_repository(
    journey: dict[str, tuple[subprocess.CompletedProcess[str], dict[str, Any]]],
    launcher: Launcher,
    bare: Path,
    tmp_path: Path,
) -> None:
    assert journey["deploy"][0].returncode == 0
    deployment = yaml.safe_load((ROOT / "manifests/components/reconciler/deployment.yaml").read_text())
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"].startswith("haechi/steps:")
    secret = tmp_path / "secret"
    secret.mkdir()
    with _over_http(bare, secret) as url:
        options = [f"--volume={secret}:/etc/haechi/git:ro", *(f"--env={k}={v}" for k, v in launcher.env.items())]
        words = [*container["command"], f"{NAME['name']}=git:{url}#main:safety.yaml", "--once"]
        done = run_in(launcher.images["steps"], *words, options=tuple(options))
    assert done.returncode == 0, done.stderr[-2000:]
    service = yaml.safe_load(_git("-C", str(bare), "show", "main:safety.yaml"))
    version = _read(launcher.path("export", "onnx_model") / "model.json")["version"]
    assert service["spec"]["predictor"]["model"]["storageUri"].endswith(f"/{version}")


# ---- the runtime


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _serving(image: str, folder: Path, *arguments: str) -> Iterator[str]:
    """A running container with the folder at /mnt/models; its name. It is gone afterwards."""
    name = f"haechi-test-{uuid.uuid4().hex[:8]}"
    command = [*podman(), "run", "--detach", f"--name={name}", *LIMITS, *RESTRICTED, "--tmpfs=/tmp"]
    started = call([*command, f"--volume={folder}:/mnt/models:ro", image, *arguments])
    try:
        assert started.returncode == 0, started.stderr
        yield name
    finally:
        call([*podman(), "rm", "--force", "--time=0", name])


def _wait_ready(url: str, name: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/v2/health/ready").status_code == 200:
                return
        if call([*podman(), "inspect", "--format={{.State.Running}}", name]).stdout.strip() != "true":
            break
        time.sleep(0.1)
    pytest.fail(f"never ready: {call([*podman(), 'logs', name]).stderr[-2000:]}")


def test_the_runtime_serves_what_kserve_mounts_and_drains(images: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "models"
    version = tiny_model_folder(folder, ["person", "dog"]).version
    http, rpc = _free_port(), _free_port()
    arguments = ["--model", "/mnt/models", "--host", "127.0.0.1", "--http-port", str(http), "--grpc-port", str(rpc)]
    with _serving(images["serving"], folder, *arguments) as name:
        url = f"http://127.0.0.1:{http}"
        _wait_ready(url, name)
        scene = paint({(2, 3): shade(0, 0.9)})
        answer = httpx.post(f"{url}/v1/models/tiny:predict", content=scene, headers={"Content-Type": "image/png"})
        [found] = answer.json()["predictions"][0]["detections"]
        assert (answer.json()["model_version"], found["class"]) == (version, "person")
        assert found["box"] == list(cell_box(2, 3))
        with grpc.insecure_channel(f"127.0.0.1:{rpc}") as channel:
            assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"
        begun = time.monotonic()
        call([*podman(), "stop", "--time=30", name])
        assert time.monotonic() - begun < 20
        assert call([*podman(), "wait", name]).stdout.strip() == "0"


def test_without_arguments_the_runtime_looks_where_kserve_mounts(images: dict[str, str], tmp_path: Path) -> None:
    with _serving(images["serving"], tmp_path) as name:
        assert call([*podman(), "wait", name]).stdout.strip() == "7"
        said = call([*podman(), "logs", name]).stderr
    assert "/mnt/models" in said and "Traceback" not in said

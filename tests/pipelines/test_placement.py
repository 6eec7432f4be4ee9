"""Where pods run, what they ask for and what is reused, proven on the compiled pipeline by what reaches the pod."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from haechi.components.resolve.component import resolve
from haechi.pipelines.compiling import COMPILED

Documents = list[dict[str, Any]]


@pytest.fixture(scope="module")
def documents() -> Documents:
    return list(yaml.safe_load_all((COMPILED / "training.yaml").read_text()))


def tasks(documents: Documents) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every step's name and task, with the component whose DAG it is in ("" for the root)."""
    for owner, component in [("", documents[0]["root"]), *documents[0]["components"].items()]:
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            yield name, task, owner


def find(documents: Documents, step: str) -> tuple[dict[str, Any], str]:
    return next((task, owner) for name, task, owner in tasks(documents) if name == step)


def root_parameter(documents: Documents, owner: str, name: str) -> str:
    """The pipeline's parameter that arrives in the DAG `owner` under `name`."""
    while owner:
        [(task, above)] = [
            (task, above) for _, task, above in tasks(documents) if task["componentRef"]["name"] == owner
        ]
        entry = task["inputs"]["parameters"][name]
        name, owner = entry["componentInputParameter"], above
    assert name in documents[0]["root"]["inputDefinitions"]["parameters"]
    return name


def of_executor(documents: Documents, step: str, text: str) -> str:
    """The pipeline's parameter behind a placeholder in a step's container."""
    task, owner = find(documents, step)
    [name] = re.findall(r"inputs\.parameters\['([^']+)'\]", text)
    return root_parameter(documents, owner, task["inputs"]["parameters"][name]["componentInputParameter"])


def of_platform(documents: Documents, step: str, entry: dict[str, Any]) -> str:
    """The pipeline's parameter behind an entry of a step's Kubernetes settings."""
    return root_parameter(documents, find(documents, step)[1], entry["componentInputParameter"])


def platform(documents: Documents, step: str) -> dict[str, Any]:
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    entry: dict[str, Any] = executors[f"exec-{step}"]
    return entry


def container(documents: Documents, step: str) -> dict[str, Any]:
    entry: dict[str, Any] = documents[0]["deploymentSpec"]["executors"][f"exec-{step}"]["container"]
    return entry


def test_a_submit_sets_the_accelerator_of_a_training(documents: Documents) -> None:
    accelerator = container(documents, "train")["resources"]["accelerator"]
    assert of_executor(documents, "train", accelerator["resourceType"]) == "gpu_type"
    assert of_executor(documents, "train", accelerator["resourceCount"]) == "gpu_count"


def test_a_submit_sets_the_node_pool_of_a_training(documents: Documents) -> None:
    settings = platform(documents, "train")
    assert of_platform(documents, "train", settings["nodeSelector"]["nodeSelectorJson"]) == "node_selector"
    [toleration] = settings["tolerations"]
    assert of_platform(documents, "train", toleration["tolerationJson"]) == "tolerations"


@pytest.mark.parametrize(
    "step", ["resolve", "ingest", "label", "build", "train", "export", "evaluate", "deploy", "refuse"]
)
def test_a_submit_sets_image_settings_and_secrets_of_every_step(step: str, documents: Documents) -> None:
    image = "train_image" if step in ("train", "export") else "steps_image"
    assert of_executor(documents, step, container(documents, step)["image"]) == image
    settings = platform(documents, step)
    names = [of_platform(documents, step, entry["secretNameParameter"]) for entry in settings["secretAsEnv"]]
    assert names[:2] == ["s3_secret", "mlflow_secret"]
    [config] = settings["configMapAsEnv"]
    assert of_platform(documents, step, config["configMapNameParameter"]) == "settings_config_map"


def test_only_trainings_take_accelerators_and_their_pool(documents: Documents) -> None:
    for name, _, _ in tasks(documents):
        if f"exec-{name}" in documents[0]["deploymentSpec"]["executors"] and name != "train":
            assert "accelerator" not in container(documents, name).get("resources", {}), name
            assert not {"nodeSelector", "tolerations"} & set(platform(documents, name)), name


def test_a_training_has_shared_memory_beyond_64_mebibytes(documents: Documents) -> None:
    mounts = {entry["mountPath"]: entry for entry in platform(documents, "train")["emptyDirMounts"]}
    assert mounts["/dev/shm"]["medium"] == "Memory"
    assert "sizeLimit" not in mounts["/dev/shm"]


def test_a_training_that_loses_its_node_is_retried_for_days(documents: Documents) -> None:
    task, _ = find(documents, "train")
    policy = task["retryPolicy"]
    # Argo ends a retried attempt when this time since the *first* start is over, so one hour would kill long trainings.
    assert int(policy["backoffMaxDuration"].rstrip("s")) >= 7 * 24 * 3600
    assert policy["maxRetryCount"] >= 5
    longest = int(policy["backoffDuration"].rstrip("s")) * policy["backoffFactor"] ** (policy["maxRetryCount"] - 1)
    assert longest <= 600, "the wait before the last attempt"


def test_steps_with_effects_are_not_retried_blindly(documents: Documents) -> None:
    assert [name for name, task, _ in tasks(documents) if "retryPolicy" in task] == ["train"]


def test_pipelines_serves_no_step_from_its_cache(documents: Documents) -> None:
    # Its key knows artifacts by number and code by the image's tag: what it would call the same need not be so.
    for name, task, _ in tasks(documents):
        if f"exec-{name}" in documents[0]["deploymentSpec"]["executors"]:
            assert not task.get("cachingOptions", {}).get("enableCache"), name


def through_loop(documents: Documents, step: str, name: str) -> dict[str, Any]:
    """What a task in a loop gets for a parameter, as it comes from outside of the loop."""
    task, owner = find(documents, step)
    entry: dict[str, Any] = task["inputs"]["parameters"][name]
    if owner and "componentInputParameter" in entry:
        [loop] = [task for _, task, _ in tasks(documents) if task["componentRef"]["name"] == owner]
        entry = loop["inputs"]["parameters"][entry["componentInputParameter"]]
    return entry


@pytest.mark.parametrize("step", ["train", "evaluate"])
def test_a_champion_comes_as_the_digest_that_resolve_gives(step: str, documents: Documents) -> None:
    entry = through_loop(documents, step, "champion")
    assert entry["taskOutputParameter"] == {"outputParameterKey": "champion", "producerTask": "resolve"}


def test_the_first_step_sees_what_later_steps_parse(documents: Documents) -> None:
    task, owner = find(documents, "resolve")
    names = resolve.component_spec.inputs
    assert {"sources", "bands", "ratios", "candidates", "thresholds", "gate", "target"} < set(names)
    for name in names:
        assert root_parameter(documents, owner, task["inputs"]["parameters"][name]["componentInputParameter"]) == name
    assert "dependentTasks" not in task


def test_a_training_that_is_to_be_made_anew_is_bound_to_its_run(documents: Documents) -> None:
    assert through_loop(documents, "train", "run_id")["runtimeValue"]["constant"] == "{{$.pipeline_job_uuid}}"
    assert through_loop(documents, "train", "retrain") == {"componentInputParameter": "retrain"}


@pytest.mark.parametrize(
    ("step", "kind"), [("train", "train"), ("label", "infer"), ("export", "infer"), ("evaluate", "infer")]
)
def test_a_submit_sets_what_the_steps_with_a_model_ask_for(step: str, kind: str, documents: Documents) -> None:
    resources = container(documents, step)["resources"]
    assert of_executor(documents, step, resources["resourceCpuRequest"]) == f"{kind}_cpu"
    assert of_executor(documents, step, resources["resourceMemoryRequest"]) == f"{kind}_memory"
    assert not {"resourceCpuLimit", "resourceMemoryLimit"} & set(resources)


@pytest.mark.parametrize("step", ["resolve", "ingest", "build", "deploy", "refuse"])
def test_every_other_step_asks_for_little_but_something(step: str, documents: Documents) -> None:
    resources = container(documents, step)["resources"]
    assert (resources["resourceCpuRequest"], resources["resourceMemoryRequest"]) == ("250m", "512Mi")

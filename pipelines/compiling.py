"""Compile the pipeline to its IR and to Kubernetes objects, and find references in the IR that dangle."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from haechi.components.shared.errors import IntegrityError
from haechi.components.shared.files import write_bytes

from .cache_claim import check_claim, write_with_claim

__all__ = ["COMPILED", "compile_all", "dangling_references", "differences", "normalised"]

COMPILED = Path(__file__).parent / "compiled"
_VERSION = metadata.version("haechi")
_HEAD = "# Written by `haechi compile` from pipelines/training.py; change that, not this.\n"
_PLACEHOLDER = re.compile(r"""inputs\.(parameters|artifacts)\[['"]([^'"]+)['"]\]""")


def compile_all(out: Path, cache_claim: str = "") -> list[Path]:
    """Write `training.yaml` (IR), `pipeline.yaml` and `pipelineversion.yaml` (custom resources) into `out`.

    Args:
        out: folder, made where it is missing.
        cache_claim: PersistentVolumeClaim that trainings and evaluations keep frames in; empty for none.

    Raises:
        InputError: the claim's name cannot be; nothing is written then.
        IntegrityError: the IR refers to an input that does not exist; nothing is written then.
    """
    from kfp import compiler

    from .training import training

    if cache_claim:
        check_claim(cache_claim)
    out.mkdir(parents=True, exist_ok=True)
    draft = out / ".training.draft.yaml"
    try:
        compiler.Compiler().compile(training, str(draft))
        if cache_claim:
            write_with_claim(draft, cache_claim, draft)
        text = draft.read_text(encoding="utf-8")
    finally:
        draft.unlink(missing_ok=True)
    documents = list(yaml.safe_load_all(text))
    problems = dangling_references(documents)
    if problems:
        raise IntegrityError(
            f"the compiled pipeline has dangling references: {'; '.join(problems)}", "Pass them as inputs."
        )
    # kfp's own head tells the defaults in an order that changes from call to call.
    text = re.sub(r"\A(#.*\n)*", "", text)
    written = {"training.yaml": text, **_custom_resources(documents, cache_claim)}
    for name, content in written.items():
        write_bytes(out / name, (_HEAD + content).encode())
    return [out / name for name in written]


def _custom_resources(documents: list[dict[str, Any]], suffix: str) -> dict[str, str]:
    """Pipeline and PipelineVersion, for clusters whose API server stores pipelines in Kubernetes.

    A version's spec cannot be changed, so one that differs has another name.
    """
    name = documents[0]["pipelineInfo"]["name"]
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "haechi"}
    pipeline = {
        "apiVersion": "pipelines.kubeflow.org/v2beta1",
        "kind": "Pipeline",
        # Pipelines refuses a version whose pipeline is not there yet, and Argo CD applies objects of one wave in any order.
        "metadata": {"name": name, "labels": labels, "annotations": {"argocd.argoproj.io/sync-wave": "-1"}},
        "spec": {"displayName": name, "description": documents[0]["pipelineInfo"]["description"]},
    }
    shown = " ".join(filter(None, (name, _VERSION, suffix)))
    spec = {"pipelineName": name, "displayName": shown, "pipelineSpec": documents[0]}
    if len(documents) > 1:
        spec["platformSpec"] = documents[1]
    version = {
        "apiVersion": "pipelines.kubeflow.org/v2beta1",
        "kind": "PipelineVersion",
        "metadata": {"name": re.sub(r"[. ]", "-", shown), "labels": labels},
        "spec": spec,
    }
    return {
        f"{kind}.yaml": yaml.safe_dump(entry, sort_keys=False, width=120)
        for kind, entry in (("pipeline", pipeline), ("pipelineversion", version))
    }


def normalised(text: str) -> list[Any]:
    """The documents of an IR file without what differs between patch releases of the SDK."""
    documents = list(yaml.safe_load_all(text))
    for entry in list(_mappings(documents)):
        entry.pop("sdkVersion", None)
    return documents


def differences(committed: Path, fresh: Path) -> list[str]:
    """Names of compiled files that are missing from `committed` or say something else there."""
    return [
        path.name
        for path in sorted(fresh.glob("*.yaml"))
        if not (committed / path.name).is_file()
        or normalised((committed / path.name).read_text(encoding="utf-8"))
        != normalised(path.read_text(encoding="utf-8"))
    ]


def dangling_references(documents: list[dict[str, Any]]) -> list[str]:
    """References in a compiled pipeline that nothing provides, which fail only in the cluster.

    Four kinds: a task's `componentInputParameter` that its DAG does not define; a loop over an input that is not passed to
    the loop; a placeholder in an executor that its task does not pass; and a `componentInputParameter` in the
    platform spec that the parent DAG lacks.
    """
    spec = documents[0]
    platform = documents[1] if len(documents) > 1 else {}
    executors = spec.get("deploymentSpec", {}).get("executors", {})
    kubernetes = platform.get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
    problems: list[str] = []
    for dag_name, dag_component in [("root", spec["root"]), *spec["components"].items()]:
        known = _inputs(dag_component)
        for task_name, task in dag_component.get("dag", {}).get("tasks", {}).items():
            component = spec["components"][task["componentRef"]["name"]]
            where = f"{dag_name}/{task_name}"
            provided = known | _loop_items(task)
            problems += [
                f"{where}: {name}" for name in _component_inputs(task.get("inputs", {})) if name not in provided
            ]
            own = set(task.get("inputs", {}).get("parameters", {}))
            problems += [f"{where} (loop): {name}" for name in _component_inputs(_iterator(task)) if name not in own]
            label = component.get("executorLabel", "")
            passed = set(task.get("inputs", {}).get("parameters", {})) | set(
                task.get("inputs", {}).get("artifacts", {})
            )
            passed |= _defaults(component)
            problems += [
                f"{where} (executor): {name}" for name in _placeholders(executors.get(label)) if name not in passed
            ]
            problems += [
                f"{where} (platform): {n}" for n in _component_inputs(kubernetes.get(label, {})) if n not in known
            ]
    return problems


def _inputs(component: dict[str, Any]) -> set[str]:
    defined = component.get("inputDefinitions", {})
    return set(defined.get("parameters", {})) | set(defined.get("artifacts", {})) | _item_inputs(component)


def _item_inputs(component: dict[str, Any]) -> set[str]:
    return {name for task in component.get("dag", {}).get("tasks", {}).values() for name in _loop_items(task)}


def _defaults(component: dict[str, Any]) -> set[str]:
    parameters = component.get("inputDefinitions", {}).get("parameters", {})
    return {name for name, entry in parameters.items() if entry.get("isOptional") or "defaultValue" in entry}


def _iterator(task: dict[str, Any]) -> dict[str, Any]:
    entry = task.get("parameterIterator", {}).get("items", {}).get("inputParameter")
    return {"componentInputParameter": entry} if entry and "." not in entry else {}


def _loop_items(task: dict[str, Any]) -> set[str]:
    item = task.get("parameterIterator", {}).get("itemInput") or task.get("artifactIterator", {}).get("itemInput")
    return {item} if item else set()


def _component_inputs(tree: Any) -> Iterator[str]:
    for entry in _mappings(tree):
        for key in ("componentInputParameter", "componentInputArtifact"):
            if isinstance(entry.get(key), str):
                yield entry[key]


def _placeholders(tree: Any) -> Iterator[str]:
    for text in _strings(tree):
        for _, name in _PLACEHOLDER.findall(text):
            yield name


def _mappings(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _mappings(child)


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _strings(child)

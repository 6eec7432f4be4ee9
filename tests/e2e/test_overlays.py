"""Living with the manifests on a real API server: nothing differs after an apply, and an option can be taken away again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from api_server import ApiServer

from tests.rendered import BASES, Object, identity, render

pytestmark = pytest.mark.e2e

LARGEST = "overlays/production-gitops"  # production, and the pipeline as objects
APPLY = ("apply", "--server-side", "--filename=-", "--output=json")


@pytest.fixture
def place(cluster: ApiServer) -> Iterator[ApiServer]:
    """The cluster with the namespaces that Pipelines and KServe make; everything of ours goes at the end."""
    for name in ("kubeflow", "kserve"):
        cluster.make_namespace(name)
    yield cluster
    kinds = {item["kind"] for target in ("components/*", LARGEST) for item in render(target)} - {"Namespace"}
    selector = "--selector=app.kubernetes.io/part-of=haechi"
    done = cluster.kubectl("delete", ",".join(sorted(kinds)), "--all-namespaces", "--wait=false", selector)
    assert done.returncode == 0, done.stderr


def _apply(place: ApiServer, objects: list[Object]) -> dict[str, Object]:
    """The objects as the server has them then, without what differs from one life of an object to the next."""
    objects = sorted(objects, key=lambda item: item["kind"] != "Namespace")  # as `kubectl apply -k` orders them
    done = place.kubectl(*APPLY, given=yaml.safe_dump_all(objects))
    assert done.returncode == 0, done.stderr
    return {identity(item): _lasting(item) for item in json.loads(done.stdout)["items"]}


def _lasting(item: Object) -> Object:
    kept = ("name", "namespace", "labels", "annotations")
    meta = {key: value for key, value in item["metadata"].items() if key in kept}
    spec = {key: value for key, value in item.get("spec", {}).items() if key not in ("clusterIP", "clusterIPs")}
    return {**{key: value for key, value in item.items() if key != "status"}, "metadata": meta, "spec": spec}


@pytest.mark.parametrize("overlay", ["overlays/local", LARGEST])
def test_nothing_differs_after_an_apply(place: ApiServer, overlay: str) -> None:
    objects = render(overlay)
    _apply(place, objects)
    done = place.kubectl("diff", "--server-side", "--filename=-", given=yaml.safe_dump_all(objects))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_change_by_hand_differs(place: ApiServer) -> None:
    objects = render("overlays/local")
    _apply(place, objects)
    path = "/api/v1/namespaces/kubeflow/configmaps/haechi-settings?fieldManager=hand"
    change: dict[str, Any] = {"data": {"HAECHI_BUCKET": "other"}}
    assert place.request("PATCH", path, change, kind="application/merge-patch+json").status == 200
    done = place.kubectl(
        "diff", "--server-side", "--force-conflicts", "--filename=-", given=yaml.safe_dump_all(objects)
    )
    assert done.returncode == 1, done.stderr
    assert "HAECHI_BUCKET: other" in done.stdout


def test_options_are_taken_away_without_a_trace(place: ApiServer) -> None:
    plain, with_options = [item for base in BASES for item in render(f"base/{base}")], render("components/*")
    before = _apply(place, plain)
    given = _apply(place, with_options)
    assert len(given) > len(before)
    # As docs/manifests.md says, for all of them at once.
    words = ("delete", "--wait=false", "--selector=haechi.io/option", "--filename=-", "--output=name")
    done = place.kubectl(*words, given=yaml.safe_dump_all(with_options))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(given.keys() - before.keys())
    assert _apply(place, plain) == before

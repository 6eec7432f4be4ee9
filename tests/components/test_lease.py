"""A lease that is kept while its holder works, and let go when that hangs; against a stand-in API server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_stand_in import ClusterStandIn

from haechi.components.deploy import lease as lease_module
from haechi.components.deploy.kubernetes_api import InferenceServiceApi
from haechi.components.deploy.lease import Busy, Lease, LeaseLost, holder_of


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InferenceServiceApi]:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with ClusterStandIn(["models"]) as cluster:
        path = str(cluster.write_kubeconfig(tmp_path / "kubeconfig"))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", path)
        yield InferenceServiceApi("models", "entrance")


def holder(api: InferenceServiceApi) -> str:
    return holder_of(api.lease("haechi-entrance"))


def until(is_so: Callable[[], object], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_work_that_takes_longer_than_the_term_keeps_the_lease(api: InferenceServiceApi) -> None:
    with Lease(api, "run 1", 1):
        time.sleep(1.8)
        with pytest.raises(Busy, match=r"run 1 is deploying.*`haechi promote` or `haechi rollback` with --take-over"):
            Lease(api, "run 2", 1).__enter__()
        writes = int((api.lease("haechi-entrance") or {})["metadata"]["resourceVersion"])
        assert writes >= 4, "whoever watches does so for 0.4 of a term"
    assert holder(api) == ""


def test_a_sign_of_life_between_two_renewals_counts(api: InferenceServiceApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_SILENT", 0.25)
    with Lease(api, "run 1", 2) as lease:
        begun = api.lease("haechi-entrance")
        time.sleep(0.55)
        lease.renew()
        until(lambda: api.lease("haechi-entrance") != begun)


def test_a_holder_that_hangs_loses_the_lease_and_learns_it(
    api: InferenceServiceApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "_SILENT", 0.2)
    with Lease(api, "run 1", 1) as hanging:
        until(lambda: holder(api) == "")
        with Lease(api, "run 2", 1):
            with pytest.raises(LeaseLost, match="run 2 took models/entrance over"):
                hanging.renew()
            assert holder(api) == "run 2"


def test_a_holder_that_hung_and_goes_on_has_its_lease_again(
    api: InferenceServiceApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "_SILENT", 0.2)
    with Lease(api, "run 1", 1) as hanging:
        until(lambda: holder(api) == "")
        hanging.renew()
        assert holder(api) == "run 1"
        monkeypatch.setattr(lease_module, "_SILENT", 10.0)
        time.sleep(1.3)
        assert holder(api) == "run 1"


def test_who_is_taken_over_while_it_works_learns_it_with_the_next_sign_of_life(api: InferenceServiceApi) -> None:
    with Lease(api, "run 1", 1) as first:
        with Lease(api, "run 2", 60, take_over=True):
            time.sleep(0.5)
            with pytest.raises(LeaseLost, match="run 2 took"):
                first.renew()
            with pytest.raises(LeaseLost, match="run 2 took"):
                first.renew()
        assert holder(api) == ""


def test_nothing_renews_a_lease_that_was_given_back(api: InferenceServiceApi) -> None:
    before = threading.active_count()
    with Lease(api, "run 1", 0.1):
        assert threading.active_count() > before
        time.sleep(0.15)
    given_back = api.lease("haechi-entrance")
    time.sleep(0.15)
    assert api.lease("haechi-entrance") == given_back


def test_an_api_server_that_is_away_for_a_while_costs_no_lease(
    api: InferenceServiceApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease(api, "run 1", 1) as lease:
        with monkeypatch.context() as patch:
            patch.setattr(api._caller._client.configuration, "host", "http://127.0.0.1:9")
            time.sleep(0.8)
            lease.renew()
        until(lambda: holder(api) == "run 1")
        time.sleep(1.2)
        assert holder(api) == "run 1"

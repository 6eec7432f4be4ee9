"""`haechi doctor` on one machine: settings, the store, MLflow, Kubeflow Pipelines' API, Label Studio, and the report.

SeaweedFS and MLflow are real. Kubeflow Pipelines and Label Studio are stand-ins, small HTTP servers that answer what the
test says, because neither runs here; the TLS server is real, with a certificate that nobody signed.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import re
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from http_stand_in import Answers, HttpStandIn

from haechi.components.shared.errors import TrackingError
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.components.shared.tracking import Tracker
from haechi.pipelines.cli import main
from haechi.pipelines.doctor import local
from haechi.pipelines.doctor.checks import CHECKS, Check
from haechi.pipelines.doctor.cluster import RIGHTS
from haechi.pipelines.doctor.examine import Diagnosis, examine
from haechi.pipelines.doctor.findings import CannotLook, Finding, NotAsked
from haechi.pipelines.doctor.kubeflow import EFFECTS, steps_of_ours
from haechi.pipelines.doctor.kubernetes_api import BOUND, connect
from haechi.pipelines.doctor.report import as_json, as_lines
from haechi.pipelines.doctor.web import fetch, resolves
from haechi.pipelines.doctor.world import Aim, World

ROOT = Path(__file__).resolve().parents[2]
DAY = 86_400


def diagnose(
    check: str, env: Mapping[str, str] | None = None, now: Callable[[], float] = time.time, **aim: Any
) -> Diagnosis:
    """One check of a world without a cluster."""
    world = World(Aim(**{"local": True, "workdir": Path("/nonexistent"), **aim}), env or {}, now)
    return examine(world, checks={check: CHECKS[check]})


def found(check: str, env: Mapping[str, str] | None = None, **more: Any) -> Finding:
    """The one finding of a check."""
    diagnosis = diagnose(check, env, **more)
    [result] = diagnosis.results
    assert len(result.findings) == 1, result
    assert diagnosis.exit_code == 1
    return result.findings[0]


def well(check: str, env: Mapping[str, str] | None = None, **more: Any) -> bool:
    """Whether a check looked and found nothing."""
    [result] = diagnose(check, env, **more).results
    return not (result.findings or result.unseen or result.skipped)


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """serve({path: (status, body)}) starts a stand-in and gives its URL."""
    with contextlib.ExitStack() as stack:
        yield lambda answers, context=None: stack.enter_context(HttpStandIn(answers, context))


@pytest.fixture(scope="module")
def self_signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    """A TLS context for 127.0.0.1 with a certificate of its own, and that certificate."""
    import ipaddress

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "me")])
    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=9))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    path, private = folder / "certificate.pem", folder / "key.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, private)
    return context, path


# the machine ------------------------------------------------------------------------------------------------------


def test_a_machine_without_a_cluster_is_healthy_and_the_report_says_that_none_was_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--local", "--workdir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert out.endswith("no cluster was looked at\n")
    assert "--local was given" in out


def test_looking_makes_no_work_folder(tmp_path: Path) -> None:
    main(["doctor", "--local", "--workdir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HAECHI_S3_ACCESS_KEY", "alone"),
        ("HAECHI_S3_ENDPOINT", "minio:9000"),
        ("HAECHI_S3_ENDPOINT", "http://a:b@minio:9000"),
        ("HAECHI_WORKERS", "many"),
    ],
)
def test_settings_that_no_step_would_take_are_found(name: str, value: str) -> None:
    finding = found("settings", {name: value})
    assert name in finding.symptom
    assert "a:b" not in finding.symptom
    [result] = diagnose("store", {name: value}).results
    assert "see check `settings`" in result.unseen


def test_a_package_that_is_missing_or_of_another_version_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"minio": "7.1.0"}

    def version(name: str) -> str:
        if name == "torch":
            raise local.metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    real = local.metadata.version
    monkeypatch.setattr(local.metadata, "version", version)
    [result] = diagnose("packages").results
    symptoms = {finding.symptom: finding for finding in result.findings}
    assert set(symptoms) == {"package torch is not installed", "package minio is 7.1.0"}
    assert all("haechi[demo]" in finding.fix for finding in result.findings)


def test_a_full_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 2**30, "total": 2**40})
    monkeypatch.setattr(local.shutil, "disk_usage", lambda _: usage)
    assert "1.0 GiB are free" in found("disk", workdir=tmp_path / "run").symptom


def test_a_work_folder_that_cannot_be_made_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} cannot be written" in found("disk", workdir=tmp_path / "file" / "run").symptom


def test_small_shared_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 2**20, "total": 64 * 2**20})
    monkeypatch.setattr(local.shutil, "disk_usage", lambda _: usage)
    assert "--shm-size" in found("shared-memory").fix


def test_a_machine_without_free_ports_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("haechi.pipelines.servers._is_free", lambda port: False)
    assert "no free loopback port" in found("ports").symptom


def test_services_that_died_are_found_by_their_record(tmp_path: Path) -> None:
    gone = {"pid": 2**22 + 1, "started": "0"}
    entry = {"port": 9, "guard": gone, "child": gone}
    (tmp_path / "services.json").write_text(json.dumps({"seaweedfs": entry, "mlflow": entry}))
    assert f"haechi up --workdir {tmp_path}" in found("services", workdir=tmp_path).fix


def test_a_damaged_record_of_services_is_found(tmp_path: Path) -> None:
    (tmp_path / "services.json").write_text("{")
    assert "cannot be read" in found("services", workdir=tmp_path).symptom


# the store --------------------------------------------------------------------------------------------------------


def test_a_store_that_takes_our_keys_is_well(store: Store) -> None:
    assert well("store", store.settings.to_env())


@pytest.mark.parametrize(
    ("change", "symptom", "cause", "fix"),
    [
        ({"s3_secret_key": "not-this-one-at-all"}, "SignatureDoesNotMatch", "secret key", "HAECHI_S3_SECRET_KEY"),
        ({"s3_access_key": "NOBODYKNOWSTHIS"}, "InvalidAccessKeyId", "no such access key", "HAECHI_S3_ACCESS_KEY"),
        ({"s3_access_key": "", "s3_secret_key": ""}, "AccessDenied", "no keys are set", "HAECHI_S3_ACCESS_KEY"),
        ({"bucket": "nobody-made-this"}, "'nobody-made-this' does not exist", "nobody made it", "mc mb"),
        ({"s3_endpoint": "http://127.0.0.1:9"}, "cannot be reached", "nothing listens at 127.0.0.1:9", "host and port"),
        ({"s3_endpoint": "http://no-such-host.invalid"}, "cannot be reached", "has no address here", "cluster only"),
    ],
)
def test_a_store_that_does_not_serve_us_is_told_with_its_cause(
    store: Store, change: dict[str, str], symptom: str, cause: str, fix: str
) -> None:
    finding = found("store", replace(store.settings, **change).to_env())
    assert symptom in finding.symptom
    assert cause in finding.cause
    assert fix in finding.fix


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("AccessDenied", "may not list bucket 'haechi'"),
        ("RequestTimeTooSkewed", "more than 15 minutes"),
        ("SlowDownPlease", "otherwise than S3"),
    ],
)
def test_a_stores_refusal_is_told_by_its_code(serve: Callable[..., str], code: str, cause: str) -> None:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>no</Message></Error>'
    env = {"HAECHI_S3_ENDPOINT": serve({"/": (200, ""), "/haechi": (403, body)})}
    keys = {"HAECHI_S3_ACCESS_KEY": "KEYOFTHETEST", "HAECHI_S3_SECRET_KEY": "secret-of-the-test"}
    assert cause in found("store", env | keys).cause


def test_https_to_a_store_without_tls_is_found(store: Store) -> None:
    endpoint = store.settings.s3_endpoint.replace("http", "https")
    assert "does not speak TLS" in found("store", {**store.settings.to_env(), "HAECHI_S3_ENDPOINT": endpoint}).cause


def test_a_certificate_that_nobody_trusts_is_found(
    serve: Callable[..., str], self_signed: tuple[ssl.SSLContext, Path]
) -> None:
    finding = found("store", {"HAECHI_S3_ENDPOINT": serve({}, self_signed[0])})
    assert "certificate is not trusted" in finding.cause
    assert "SSL_CERT_FILE" in finding.fix


def test_http_to_a_store_with_tls_is_found(serve: Callable[..., str], self_signed: tuple[ssl.SSLContext, Path]) -> None:
    plain = serve({}, self_signed[0]).replace("https", "http")
    finding = found("store", {"HAECHI_S3_ENDPOINT": plain})
    assert "speaks TLS" in finding.cause
    assert plain.replace("http", "https") in finding.fix


def test_http_to_a_store_that_answers_it_and_wants_tls_is_found(self_signed: tuple[ssl.SSLContext, Path]) -> None:
    # MinIO, and all that is written in Go, answers plain HTTP on a TLS port with a 400.
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for _ in range(2):
                connection, _address = listener.accept()
                with connection, contextlib.suppress(OSError):
                    if connection.recv(1, socket.MSG_PEEK) == b"\x16":  # a TLS handshake
                        self_signed[0].wrap_socket(connection, server_side=True).close()
                    else:
                        connection.recv(4096)
                        connection.sendall(
                            b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"
                        )

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        assert "speaks TLS" in found("store", {"HAECHI_S3_ENDPOINT": f"http://127.0.0.1:{port}"}).cause
        thread.join(10)


@pytest.mark.parametrize(("seconds", "how"), [(1200, "1200 s ahead of"), (-1200, "1200 s behind")])
def test_a_clock_that_is_off_is_found_before_the_keys_are_blamed(store: Store, seconds: int, how: str) -> None:
    finding = found("store", store.settings.to_env(), now=lambda: time.time() + seconds)
    assert how in re.sub(r"1(199|200|201) s", "1200 s", finding.symptom)
    assert "RequestTimeTooSkewed" in finding.cause


# tracking and review ----------------------------------------------------------------------------------------------


def test_an_mlflow_that_answers_is_well(mlflow_uri: str) -> None:
    assert well("mlflow", {"MLFLOW_TRACKING_URI": mlflow_uri})


def test_an_mlflow_that_is_away_is_found() -> None:
    assert "nothing listens" in found("mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}).cause


def test_an_mlflow_that_refuses_us_is_found(serve: Callable[..., str]) -> None:
    path = "/api/2.0/mlflow/registered-models/get"
    url = serve({"/health": (200, "OK"), path: (401, "You are not authenticated")})
    finding = found("mlflow", {"MLFLOW_TRACKING_URI": url})
    assert "refuses our credentials" in finding.symptom
    assert "MLFLOW_TRACKING_TOKEN" in finding.fix


def test_another_server_in_mlflows_place_is_found(serve: Callable[..., str]) -> None:
    assert "does not answer like MLflow" in found("mlflow", {"MLFLOW_TRACKING_URI": serve({})}).symptom


def test_an_mlflow_that_does_not_know_its_host_name_is_found(mlflow_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A name that leads to this machine, and that the server was not started with.
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **more: real("127.0.0.1" if host == "mlflow.test" else host, *rest, **more),
    )
    uri = mlflow_uri.replace("127.0.0.1", "mlflow.test")
    assert "--allowed-hosts" in found("mlflow", {"MLFLOW_TRACKING_URI": uri}).fix


LEGACY, PERSONAL = "0123456789abcdef0123456789abcdef01234567", "eyJh.eyJz.c2ln"


def label_studio(headers: Mapping[str, str]) -> tuple[int, Any]:
    """Label Studio's answer to `whoami`."""
    right = headers["Authorization"] in (f"Token {LEGACY}", "Bearer access-of-the-test")
    return (200, {"email": "a@example.com"}) if right else (401, {"detail": "Invalid token."})


@pytest.fixture
def studio(serve: Callable[..., str]) -> str:
    """A stand-in for Label Studio."""
    return serve(
        {
            "/health": (200, {"status": "UP"}),
            "/api/current-user/whoami": (200, label_studio),
            "/api/token/refresh": (200, {"access": "access-of-the-test"}),
        }
    )


@pytest.mark.parametrize("token", [LEGACY, PERSONAL])
def test_a_label_studio_that_takes_either_kind_of_token_is_well(studio: str, token: str) -> None:
    assert well("label-studio", label_studio=studio, label_studio_token=token)


def test_a_wrong_label_studio_token_is_found(studio: str) -> None:
    finding = found("label-studio", label_studio=studio, label_studio_token="of somebody else")
    assert "refuses the token (401)" in finding.symptom
    assert "somebody else" not in str(finding)


def test_a_revoked_personal_token_is_found(serve: Callable[..., str]) -> None:
    url = serve({"/health": (200, {}), "/api/token/refresh": (401, {"detail": "Token is blacklisted"})})
    assert "revoked" in found("label-studio", label_studio=url, label_studio_token=PERSONAL).cause


def test_a_label_studio_that_is_away_or_another_server_is_found(serve: Callable[..., str]) -> None:
    assert "nothing listens" in found("label-studio", label_studio="http://127.0.0.1:9").cause
    assert "not like Label Studio" in found("label-studio", label_studio=serve({})).symptom


def test_a_token_that_was_not_given_is_told_as_not_tried(studio: str) -> None:
    diagnosis = diagnose("label-studio", label_studio=studio)
    assert diagnosis.exit_code == 2
    assert "none was given" in diagnosis.results[0].unseen


# Kubeflow Pipelines -----------------------------------------------------------------------------------------------

API = "/apis/v2beta1"


def jwt(**claims: Any) -> str:
    """A JSON Web Token that nobody signed."""

    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'none'})}.{part(claims)}.c2lnbmF0dXJl"


GOOD = jwt(aud=["pipelines.kubeflow.org"], exp=time.time() + DAY)


def pipelines(runs: list[dict[str, Any]] | None = None, refuse: tuple[int, Any] = (401, "no")) -> Answers:
    """A stand-in for the API: it takes the token GOOD."""

    def guarded(value: Any) -> Callable[[Mapping[str, str]], tuple[int, Any]]:
        return lambda headers: (200, value) if headers["Authorization"] == f"Bearer {GOOD}" else refuse

    answers: dict[str, tuple[int, Any]] = {
        f"{API}/healthz": (200, guarded({"multi_user": True})),
        f"{API}/runs": (200, guarded({"runs": runs or []})),
    }
    for run in runs or []:
        answers[f"{API}/runs/{run['run_id']}"] = (200, guarded(run))
    return answers


@pytest.fixture
def token_file(tmp_path: Path) -> Callable[[str], str]:
    def write(token: str) -> str:
        path = tmp_path / "token"
        path.write_text(token)
        return str(path)

    return write


def test_an_api_that_takes_our_token_is_well(serve: Callable[..., str], token_file: Callable[[str], str]) -> None:
    assert well("pipelines-api", host=serve(pipelines()), token_file=token_file(GOOD))


@pytest.mark.parametrize("refuse", [(401, "no"), (500, {"error": "Internal error: Unauthenticated: …"}), (302, "")])
@pytest.mark.parametrize(
    ("token", "cause"),
    [
        (jwt(aud=["https://kubernetes.default.svc"], exp=time.time() + DAY), "audience https://kubernetes.default.svc"),
        (jwt(aud="pipelines.kubeflow.org", exp=time.time() - DAY), "expired"),
        (jwt(aud="pipelines.kubeflow.org", exp=time.time() + DAY), "not trusted"),
        ("a-password", "no JSON Web Token"),
    ],
)
def test_a_refused_token_is_told_with_its_fault(
    serve: Callable[..., str], token_file: Callable[[str], str], token: str, cause: str, refuse: tuple[int, Any]
) -> None:
    finding = found("pipelines-api", host=serve(pipelines(refuse=refuse)), token_file=token_file(token))
    assert cause in finding.cause
    assert "--audience=pipelines.kubeflow.org" in finding.fix
    assert token not in str(finding)


@pytest.mark.parametrize(
    ("answers", "cause"),
    [
        ({}, "leads to a page"),
        ({f"{API}/healthz": (200, "<html>the dashboard</html>")}, "leads to a page"),
        ({f"{API}/healthz": (302, "")}, "no token was given"),
        ({f"{API}/healthz": (503, {"error": "no database"})}, "database"),
        (
            {f"{API}/healthz": (200, {}), f"{API}/runs": (403, {"error": "PermissionDenied: Permission denied"})},
            "no contributor",
        ),
    ],
)
def test_an_api_that_does_not_serve_us_is_told_with_its_cause(
    serve: Callable[..., str], answers: Answers, cause: str
) -> None:
    assert cause in found("pipelines-api", host=serve(answers)).cause


def test_an_api_that_is_away_is_found() -> None:
    finding = found("pipelines-api", {"KF_PIPELINES_ENDPOINT": "http://127.0.0.1:9"})
    assert "port-forward service/ml-pipeline" in finding.fix


def _run(name: str, **states: str) -> dict[str, Any]:
    """A run as the API tells it: a task a step, and in it the executor, skipped where the cache answered."""
    tasks: list[dict[str, Any]] = []
    for step, state in states.items():
        tasks.append({"task_id": step, "display_name": step, "state": "SUCCEEDED"})
        tasks.append({"task_id": f"{step}-x", "parent_task_id": step, "display_name": "executor", "state": state})
    entry = {"run_id": name, "display_name": name, "state": "SUCCEEDED"}
    return {**entry, "run_details": {"task_details": tasks}}


OLD = {"resolve": "SUCCEEDED", "train": "SKIPPED", "evaluate": "SKIPPED", "deploy": "SUCCEEDED"}


@pytest.mark.parametrize(
    ("states", "symptom"),
    [
        (OLD, ""),  # an older pipeline, whose training and measuring could come from the cache
        (dict.fromkeys(OLD, "SUCCEEDED"), ""),
        ({"preprocess": "SKIPPED", "deploy": "SKIPPED"}, ""),  # other people's, who may cache what they like
        ({**OLD, "deploy": "SKIPPED"}, "run test succeeded, and deploy never ran"),
        ({"train": "SKIPPED", "evaluate": "SKIPPED"}, "run test succeeded, and none of its 2 steps ran"),
    ],
)
def test_runs_of_ours_are_judged_by_what_came_from_the_cache(
    serve: Callable[..., str], token_file: Callable[[str], str], states: dict[str, str], symptom: str
) -> None:
    host = serve(pipelines([_run("test", **states)]))
    where = {"host": host, "token_file": token_file(GOOD)}
    if symptom:
        assert found("cached-steps", **where).symptom == symptom
    else:
        assert well("cached-steps", **where)


def test_a_list_of_runs_that_repeats_its_pipelines_is_read_whole(
    serve: Callable[..., str], token_file: Callable[[str], str]
) -> None:
    stale = _run("stale", **{**OLD, "deploy": "SKIPPED"}) | {"pipeline_spec": {"padding": "x" * 2**20}}
    where = {"host": serve(pipelines([stale])), "token_file": token_file(GOOD)}
    assert well("pipelines-api", **where)
    assert "deploy never ran" in found("cached-steps", **where).symptom


def test_runs_that_cannot_be_read_are_not_taken_for_healthy(serve: Callable[..., str]) -> None:
    answers = {f"{API}/healthz": (200, {}), f"{API}/runs": (200, {"runs": [{"run_id": "r", "state": "SUCCEEDED"}]})}
    for body in ("<html>", "[]"):
        [result] = diagnose("cached-steps", host=serve({**answers, f"{API}/runs/r": (200, body)})).results
        assert "does not tell of run r" in result.unseen


def test_the_steps_with_an_effect_are_steps_of_the_pipeline() -> None:
    assert steps_of_ours() > EFFECTS
    assert {"train", "evaluate", "export"} <= steps_of_ours() - EFFECTS


def test_the_rights_that_are_looked_at_are_those_that_the_role_grants() -> None:
    role = yaml.safe_load((ROOT / "manifests" / "base" / "serving" / "role.yaml").read_text())
    granted = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert set(RIGHTS) == granted


# the report -------------------------------------------------------------------------------------------------------


def _checks(**looks: Callable[[World], list[Finding]]) -> dict[str, Check]:
    return {name: Check("machine", look) for name, look in looks.items()}


def _raises(error: Exception) -> Callable[[World], list[Finding]]:
    def look(world: World) -> list[Finding]:
        raise error

    return look


SICK = Finding("it hurts", "it is broken", "mend --it\nor leave it")


@pytest.mark.parametrize(
    ("looks", "code"),
    [
        ([lambda world: []], 0),
        ([lambda world: [], _raises(NotAsked("nobody asked"))], 0),
        ([lambda world: [], _raises(CannotLook("no right"))], 2),
        ([lambda world: [SICK], _raises(CannotLook("no right"))], 1),
        ([_raises(CannotLook("no right", found=[SICK]))], 1),
        ([_raises(KeyError("spec"))], 2),
    ],
)
def test_the_exit_code_tells_healthy_from_faults_from_blindness(looks: list[Any], code: int) -> None:
    checks = _checks(**{f"c{number}": look for number, look in enumerate(looks)})
    diagnosis = examine(World(Aim(local=True), {}), checks=checks)
    assert diagnosis.exit_code == code
    assert as_json(diagnosis, str)["healthy"] is (code == 0)


def test_a_check_that_hangs_costs_its_own_result_and_nothing_else() -> None:
    begun = time.monotonic()
    release = threading.Event()
    checks = _checks(slow=lambda world: [SICK] * release.wait(60), quick=lambda world: [SICK])
    slow, quick = examine(World(Aim(local=True), {}), seconds=0.5, checks=checks).results
    release.set()
    assert "no answer within" in slow.unseen
    assert quick.findings == (SICK,)
    assert time.monotonic() - begun < 10


def test_checks_run_side_by_side() -> None:
    together = threading.Barrier(3, timeout=10)
    checks = _checks(**{name: lambda world: [SICK][: together.wait() * 0] for name in "abc"})
    assert examine(World(Aim(local=True), {}), checks=checks).exit_code == 0


def test_the_table_shows_symptom_cause_and_fix_and_what_was_not_seen() -> None:
    checks = _checks(
        sick=lambda world: [SICK],
        blind=_raises(CannotLook("no right to list pods", "ask for it")),
        blind2=_raises(CannotLook("no right to list pods", "ask for it")),
        idle=_raises(NotAsked("no host")),
        fine=lambda world: [],
    )
    lines = as_lines(examine(World(Aim(local=True), {}), checks=checks), str)
    assert lines == [
        "sick       it hurts",
        "           cause  it is broken",
        "           fix    mend --it",
        "                  or leave it",
        "",
        "NOT SEEN   no right to list pods",
        "           checks blind, blind2",
        "           fix    ask for it",
        "",
        "not asked  idle: no host",
        "well       fine",
        "",
        "1 found, 2 checks could not look, 1 well; no cluster was looked at",
    ]


def test_a_secret_is_never_shown_even_where_a_server_repeats_it(s3_settings: Settings) -> None:
    world = World(Aim(local=True, label_studio_token="token-of-the-test"), s3_settings.to_env())
    assert world.settings.s3_secret_key
    told = Finding(f"refused {s3_settings.s3_secret_key}", "token-of-the-test", "mend")
    diagnosis = examine(world, checks=_checks(sick=lambda _: [told]))
    shown = "\n".join(as_lines(diagnosis, world.redact)) + json.dumps(as_json(diagnosis, world.redact))
    assert s3_settings.s3_secret_key not in shown
    assert "token-of-the-test" not in shown
    assert "refused ***" in shown


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("http://admin:pass-word@mlflow:5000/x failed", "http://mlflow:5000/x failed"),
        ("'https://token@host' and 'https://a:b@c@host'", "'https://host' and 'https://host'"),
        ("http://admin:it's/a#pass?word@mlflow:5000/x", "http://mlflow:5000/x"),
        ("http://mlflow:5000/a@b http://mlflow:5000 a@b", "http://mlflow:5000/a@b http://mlflow:5000 a@b"),
        (
            "https://host/path@v1 s3://haechi/a@b ssh://git@host/repo",
            "https://host/path@v1 s3://haechi/a@b ssh://git@host/repo",
        ),
    ],
)
def test_an_error_tells_no_credentials_of_a_url(text: str, told: str) -> None:
    error = TrackingError(text, text)
    assert (error.problem, error.remedy, str(error)) == (told, told, f"{told}. {told}")


def test_a_password_in_mlflows_uri_is_told_by_nobody(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    uri = "http://admin:of-the-test@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert main(["doctor", "--local", "--workdir", "/nonexistent"]) == 1
    out = capsys.readouterr().out
    assert "MLflow at http://127.0.0.1:9/health cannot be reached" in out
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"cannot reach MLflow at http://127\.0\.0\.1:9") as caught:
        Tracker(Settings(mlflow_tracking_uri=uri)).alias("entrance", "champion")
    assert "of-the-test" not in out + "".join(traceback.format_exception(caught.value))


def test_what_steers_a_terminal_is_told_and_not_done() -> None:
    told = Finding("pod waits: \x1b[2J\x9b31m\u202e", "a\tb", "mend")
    diagnosis = examine(World(Aim(local=True), {}), checks=_checks(sick=lambda _: [told]))
    shown = "\n".join(as_lines(diagnosis, str)) + json.dumps(as_json(diagnosis, str), ensure_ascii=False)
    assert shown.isprintable() or set(filter(lambda char: not char.isprintable(), shown)) <= {"\n", "\t"}
    assert "\\x1b[2J\\x9b31m\\u202e" in shown


def test_a_secret_of_several_lines_is_hidden_where_its_text_is_quoted() -> None:
    world = World(Aim(local=True, label_studio_token="first-line-1\nsecond-line-2"), {})
    assert world.redact("Invalid header value b'Token first-line-1\\nsecond-line-2'") == (
        "Invalid header value b'Token ***\\n***'"
    )


def test_a_token_that_no_header_takes_is_refused_and_never_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "token"
    for token in ("eyJSECRETOFTHETEST\nX-Other: header", "tökensecret"):
        path.write_text(token)
        words = ["--label-studio-token-file", str(path)]
        assert main(["doctor", "--local", *words]) == 2
        shown = capsys.readouterr()
        assert "holds more than one line, or other than ASCII" in shown.err
        assert token[:5] not in shown.out + shown.err


def test_what_the_http_client_says_of_a_header_is_not_repeated(studio: str) -> None:
    finding = found("label-studio", label_studio=studio, label_studio_token="eyJSECRET\nX-Other: header")
    assert "holds what HTTP does not take" in finding.cause
    assert "SECRET" not in str(finding)


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://127.0.0.1:99999", "http://store..example", f"http://{'a' * 64}.b"]
)
def test_what_cannot_be_an_address_is_told_and_ends_no_check(url: str) -> None:
    assert found("label-studio", label_studio=url, label_studio_token="x").symptom.endswith("cannot be reached")


def test_what_cannot_be_a_name_has_no_address() -> None:
    assert [resolves(url) for url in ("http://[::1", "http://store..example", f"http://{'a' * 64}.b")] == [False] * 3


def test_an_answer_without_end_is_read_up_to_a_limit(serve: Callable[..., str]) -> None:
    assert len(fetch(serve({"/": (200, "x" * 9 * 2**20)}) + "/").body) == 8 * 2**20


def test_the_json_report_holds_what_was_found_and_what_was_not_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--local", "--host", "http://127.0.0.1:9", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"healthy", "cluster", "findings", "unseen", "skipped", "well"}
    [finding] = report["findings"]
    assert finding["check"] == "pipelines-api"
    assert set(finding) == {"check", "symptom", "cause", "fix"}
    assert report["skipped"]["pending"] == "--local was given"


def test_a_token_file_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none")
    assert main(["doctor", "--local", "--label-studio-token-file", missing]) == 2
    assert missing in capsys.readouterr().err
    assert main(["doctor", "--local", "--host", "http://127.0.0.1:9", "--token-file", missing]) == 2
    assert missing in capsys.readouterr().out


def _kubeconfig(path: Path, server: str, **user: Any) -> str:
    """A kubeconfig that names a server and how to log in there."""
    entries = {
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": user}],
    }
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "x", **entries}))
    return str(path)


def test_a_login_plugin_that_hangs_costs_no_more_than_the_timeout(tmp_path: Path) -> None:
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": "sleep", "args": ["20"]}
    path = _kubeconfig(tmp_path / "config", "http://127.0.0.1:9", exec={**plugin, "interactiveMode": "Never"})
    begun = time.monotonic()
    world = World(Aim(kubeconfig=path, workdir=tmp_path), {})
    diagnosis = examine(world, seconds=3, checks={"cluster": CHECKS["cluster"]})
    assert "no answer within 3 s" in diagnosis.results[0].unseen
    assert diagnosis.cluster == ""
    assert time.monotonic() - begun < 12


@pytest.mark.parametrize("status", [200, 404])
def test_a_page_in_the_api_servers_place_is_told_once(
    serve: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    host = serve({"/version": (status, "<html>log in</html>")})
    path = _kubeconfig(tmp_path / "config", host, token="of-the-test-itself")
    assert main(["doctor", "--kubeconfig", path, "--workdir", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert out.count(f"{host} does not answer like a Kubernetes API server") == 1
    assert "the check itself failed" not in out


def test_a_kubeconfig_that_is_broken_is_told_and_not_taken_for_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config"
    path.write_text("clusters: [")
    assert main(["doctor", "--kubeconfig", str(path)]) == 2
    assert "cannot be used" in capsys.readouterr().out


def test_a_named_kubeconfig_that_is_missing_is_no_health(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = str(tmp_path / "none")
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", missing)
    assert main(["doctor", "--workdir", str(tmp_path)]) == 2
    assert f"KUBECONFIG is {missing}, and there is no such file" in capsys.readouterr().out
    assert main(["doctor", "--local", "--workdir", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 0),
        (["--namespace", "team-a"], 2),
        (["--serving", "haechi-serving"], 2),
        (["--service-account", "default-editor"], 2),
        (["--namespace", "team-a", "--local"], 0),
        (["--namespace", "team-a", "--host", "{host}"], 0),
    ],
)
def test_an_option_that_wants_a_cluster_is_not_answered_by_health_without_one(
    serve: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", "")
    monkeypatch.setenv("KF_PIPELINES_TOKEN", GOOD)
    host = serve(pipelines()) if "{host}" in words else ""
    words = [word.format(host=host) for word in words]
    assert main(["doctor", "--workdir", str(tmp_path), *words]) == code
    assert (f"{words[0] if words else ''} wants a cluster" in capsys.readouterr().out) is (code == 2)


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("/api/v1/nodes", "join its group haechi-viewers"),
        ("/api/v1/namespaces/kubeflow/pods?limit=500", "join its group haechi-viewers"),
        ("/api/v1/namespaces/kubeflow/secrets/haechi-s3", "join its group haechi-operators"),
        ("/api/v1/namespaces/team-a", "kubectl -n team-a create rolebinding haechi-view --clusterrole=haechi-view --"),
        ("/api/v1/namespaces/minio/services/minio", "-n minio create rolebinding haechi-view-parts --"),
        ("/api/v1/namespaces/team-a/secrets/haechi-s3", "--clusterrole=haechi-view-keys --user"),
    ],
)
def test_a_refusal_names_the_role_of_option_operators_that_lets_us_look(
    serve: Callable[..., str], tmp_path: Path, path: str, remedy: str
) -> None:
    bare = path.partition("?")[0]
    host = serve({"/version": (200, {"gitVersion": "v1.34.0"}), bare: (403, {"message": "no"})})
    cluster = connect(_kubeconfig(tmp_path / "config", host, token="of-the-test"))
    assert cluster is not None
    with pytest.raises(CannotLook) as caught:
        cluster.collection(bare) if "?" in path else cluster.get(path)
    assert remedy in caught.value.remedy
    assert "../../components/operators" in caught.value.remedy or "option operators" in caught.value.remedy


def test_the_namespaces_that_the_refusal_takes_for_bound_are_those_of_option_operators() -> None:
    files = (ROOT / "manifests" / "components" / "operators").glob("rolebinding-*.yaml")
    assert {yaml.safe_load(path.read_text())["metadata"]["namespace"] for path in files} == set(BOUND)


# the documentation ------------------------------------------------------------------------------------------------


def test_the_documentation_lists_every_check_with_its_area_and_no_other() -> None:
    text = (ROOT / "docs" / "doctor.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (\w+) \| .+ \| .+ \|$", text, re.M)
    assert rows == [(name, check.area) for name, check in CHECKS.items()]


def test_every_check_says_what_it_looks_at() -> None:
    assert all((check.look.__doc__ or "").strip() for check in CHECKS.values())

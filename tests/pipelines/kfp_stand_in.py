"""A stand-in for the API server of Kubeflow Pipelines, for `haechi submit` without a cluster.

It speaks REST v2beta1 to the real client, keeps pipelines, versions, experiments, runs and recurring runs, checks tokens
(audience, expiry, namespace), and refuses bodies that are not what kfp-server-api's models say. What it answers, and with
which status, was read in the source of 2.17.0; that server itself is used by tests/e2e.

    with KfpStandIn(multi_user=True) as api:
        api.allow("team", "alice")
        token = make_token("alice")
"""

from __future__ import annotations

import base64
import contextlib
import email
import functools
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as models
import yaml

AUDIENCE = "pipelines.kubeflow.org"
Json = dict[str, Any]
CODES = {400: 3, 401: 16, 403: 7, 404: 5, 409: 6, 500: 13, 503: 14}
ENUMS = {"RecurringRunMode", "V2beta1RuntimeState"}


def make_token(user: str, audience: str = AUDIENCE, lives: float = 3600) -> str:
    """A token as a TokenRequest gives it, but for its signature."""
    claims = {"sub": user, "aud": [audience], "exp": int(time.time() + lives)}
    parts = [{"alg": "RS256"}, claims]
    head = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
    return f"{head}.c2lnbmF0dXJl"


class Refused(Exception):
    """An answer with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Fault:
    """Answers that go wrong: `times` requests whose method and path match `what`.

    A body that is a function gives the parts that are sent one by one, without a length; `location` is where a
    redirection leads, and the request's path is appended to it.
    """

    what: str
    status: int
    body: str | Callable[[], Iterator[bytes]] = ""
    times: int = 1
    content_type: str = "application/json"
    location: str = ""


@dataclass
class KfpStandIn:
    """The server, on a free port of loopback.

    Attributes:
        multi_user: whether it asks for tokens and keeps things by namespace.
        version: what /healthz says.
        cookie: a session that counts like the token of `cookie_user`.
        faults: requests to fail.
        progress: states that runs take, one a look; the last one stays.
        requests: "METHOD path" of all requests.
    """

    multi_user: bool = False
    version: str = "2.17.0"
    cookie: str = ""
    cookie_user: str = "alice"
    page: int = 100
    faults: list[Fault] = field(default_factory=list)
    progress: list[Json] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    pipelines: list[Json] = field(default_factory=list)
    versions: list[Json] = field(default_factory=list)
    experiments: list[Json] = field(default_factory=list)
    runs: list[Json] = field(default_factory=list)
    recurring: list[Json] = field(default_factory=list)
    most_enabled: int = 0
    _users: set[tuple[str, str]] = field(default_factory=set)

    def __enter__(self) -> KfpStandIn:
        self._count, self._lock = itertools.count(1), threading.Lock()
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def allow(self, namespace: str, user: str) -> None:
        """Let a user work in a namespace."""
        self._users.add((namespace, user))

    def answer(self, method: str, path: str, query: dict[str, str], headers: Any, body: bytes) -> Json:
        for pattern, verbs in ROUTES.items():
            match = re.fullmatch(f"/apis/v2beta1/{pattern}", path)
            if match and method in verbs:
                with self._lock:
                    user = self._user(headers) if pattern != "healthz" else ""
                    return verbs[method](self, _Call(user, query, headers, body, *match.groups()))
        raise Refused(404, "Not Found")

    def _user(self, headers: Any) -> str:
        if not self.multi_user:
            return ""
        if self.cookie and headers.get("Cookie") == self.cookie:
            return self.cookie_user
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or token.count(".") != 2:
            raise Refused(401, "Request header error: there is no user identity header")
        part = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        if claims["exp"] < time.time():
            raise Refused(401, "Review.Status.Authenticated is false. Error token has expired")
        if AUDIENCE not in claims["aud"]:
            raise Refused(401, f"Failed to find all of '[{AUDIENCE}]' in audience: {claims['aud']}")
        return str(claims["sub"])

    def _namespace(self, call: _Call, namespace: str | None) -> str:
        """The namespace that counts, if the user may."""
        if not self.multi_user:
            return ""
        if not namespace:
            raise Refused(400, "An experiment cannot have an empty namespace in multi-user mode")
        if (namespace, call.user) not in self._users:
            raise Refused(403, f"User '{call.user}' is not authorized with reason: (namespace {namespace!r})")
        return namespace

    def _id(self, kind: str) -> str:
        return f"{kind}-{next(self._count)}"

    def _page(self, call: _Call, key: str, rows: list[Json]) -> Json:
        start = int(call.query.get("page_token") or 0)
        size = min(int(call.query.get("page_size") or 10), self.page)
        more = {"next_page_token": str(start + size)} if len(rows) > start + size else {}
        return {key: rows[start : start + size], "total_size": len(rows), **more}

    def healthz(self, call: _Call) -> Json:
        return {
            "commit_sha": "c",
            "tag_name": self.version,
            "multi_user": self.multi_user,
            "pipeline_store": "database",
        }

    def list_experiments(self, call: _Call) -> Json:
        namespace = self._namespace(call, call.query.get("namespace"))
        [wanted] = json.loads(call.query["filter"])["predicates"]
        assert (wanted["operation"], wanted["key"]) == ("EQUALS", "display_name")
        rows = [row for row in self.experiments if row.get("namespace", "") == namespace]
        return self._page(call, "experiments", [row for row in rows if row["display_name"] == wanted["string_value"]])

    def create_experiment(self, call: _Call) -> Json:
        wanted = call.model("V2beta1Experiment")
        made = wanted | {"namespace": self._namespace(call, wanted.get("namespace")), "experiment_id": self._id("e")}
        self.experiments.append(made)
        return made

    def pipeline_by_name(self, call: _Call) -> Json:
        namespace = self._namespace(call, call.query.get("namespace"))
        for row in self.pipelines:
            if (row["name"], row["namespace"]) == (call.ids[0], namespace):
                return row
        raise Refused(404, f"Pipeline {call.ids[0]} not found")

    def create_pipeline(self, call: _Call) -> Json:
        wanted = call.model("V2beta1Pipeline")
        namespace = self._namespace(call, wanted.get("namespace"))
        if any((row["name"], row["namespace"]) == (wanted["name"], namespace) for row in self.pipelines):
            raise Refused(409, f"The name {wanted['name']} already exist. Please specify a new name.")
        made = wanted | {"namespace": namespace, "pipeline_id": self._id("p")}
        self.pipelines.append(made)
        return made

    def list_versions(self, call: _Call) -> Json:
        assert call.query["sort_by"] == "created_at desc"
        rows = [row for row in self.versions if row["pipeline_id"] == call.ids[0]]
        return self._page(call, "pipeline_versions", rows[::-1])

    def upload_version(self, call: _Call) -> Json:
        [pipeline] = [row for row in self.pipelines if row["pipeline_id"] == call.query["pipelineid"]]
        try:
            self._namespace(call, pipeline["namespace"])
        except Refused as error:
            raise Refused(400, "Failed to create a pipeline version") from error
        if any(row["name"] == call.query["name"] for row in self.versions):
            raise Refused(409, "Failed to create a pipeline version")
        made = {
            "pipeline_id": pipeline["pipeline_id"],
            "pipeline_version_id": self._id("v"),
            "name": call.query["name"],
            "display_name": call.query["name"],
            "spec": call.uploaded(),
        }
        self.versions.append(made)
        return {key: value for key, value in made.items() if key != "spec"}

    def _spec(self, reference: Json) -> list[Json]:
        rows = [row for row in self.versions if row["pipeline_id"] == reference["pipeline_id"]]
        wanted = reference.get("pipeline_version_id")
        rows = [row for row in rows if not wanted or row["pipeline_version_id"] == wanted]
        if not rows:
            raise Refused(404, "PipelineVersion not found")
        spec: list[Json] = rows[-1]["spec"]
        return spec

    def _checked(self, call: _Call, model: str) -> Json:
        wanted = call.model(model)
        [experiment] = [row for row in self.experiments if row["experiment_id"] == wanted["experiment_id"]]
        self._namespace(call, experiment["namespace"])
        known = self._spec(wanted["pipeline_version_reference"])[0]["root"]["inputDefinitions"]["parameters"]
        for name, value in wanted.get("runtime_config", {}).get("parameters", {}).items():
            if name not in known:
                raise Refused(400, f"parameter(s) provided are not required by pipeline: {name}")
            kinds: dict[str, Any] = {"STRING": str, "LIST": list, "STRUCT": dict, "BOOLEAN": bool}
            kinds |= {"NUMBER_INTEGER": int, "NUMBER_DOUBLE": (int, float)}
            if not isinstance(value, kinds[known[name]["parameterType"]]):
                raise Refused(400, f"input parameter {name} requires type {known[name]['parameterType']}")
        return wanted | {"namespace": experiment["namespace"]}

    def create_run(self, call: _Call) -> Json:
        made = self._checked(call, "V2beta1Run") | {"run_id": self._id("r"), "state": "PENDING"}
        self.runs.append(made)
        return made

    def list_runs(self, call: _Call) -> Json:
        namespace = self._namespace(call, call.query.get("namespace"))
        return self._page(call, "runs", [run for run in self.runs[::-1] if run["namespace"] == namespace])

    def get_run(self, call: _Call) -> Json:
        [run] = [row for row in self.runs if row["run_id"] == call.ids[0]]
        if self.progress:
            run.update(self.progress.pop(0) if len(self.progress) > 1 else self.progress[0])
        return run

    def create_recurring(self, call: _Call) -> Json:
        wanted = self._checked(call, "V2beta1RecurringRun")
        if not 1 <= int(wanted["max_concurrency"]) <= 10:
            raise Refused(400, "Max concurrency of a recurring run must be at least 1 and at most 10")
        # Numbers are doubles on the wire, and the pods' service account is filled in.
        made = (
            {"service_account": "pipeline-runner"} | wanted | {"recurring_run_id": self._id("s"), "status": "ENABLED"}
        )
        made["runtime_config"] = json.loads(json.dumps(made["runtime_config"]), parse_int=float)
        made["created_at"] = f"2026-01-01T00:00:{len(self.recurring) % 60:02}Z"
        self.recurring.append(made)
        self._count_enabled()
        return made

    def _count_enabled(self) -> None:
        self.most_enabled = max(self.most_enabled, sum(row["mode"] == "ENABLE" for row in self.recurring))

    def list_recurring(self, call: _Call) -> Json:
        namespace = self._namespace(call, call.query.get("namespace"))
        return self._page(call, "recurringRuns", [row for row in self.recurring[::-1] if row["namespace"] == namespace])

    def switch_recurring(self, call: _Call) -> Json:
        [row] = [row for row in self.recurring if row["recurring_run_id"] == call.ids[0]]
        row["mode"] = call.ids[1].upper()
        row["status"] = f"{row['mode']}D"
        self._count_enabled()
        return {}

    def delete_recurring(self, call: _Call) -> Json:
        self.recurring = [row for row in self.recurring if row["recurring_run_id"] != call.ids[0]]
        return {}


class _Call:
    """One request."""

    def __init__(self, user: str, query: dict[str, str], headers: Any, body: bytes, *ids: str) -> None:
        self.user, self.query, self.headers, self.body, self.ids = user, query, headers, body, ids

    def model(self, name: str) -> Json:
        """The body, if it is what the model of that name says."""
        value: Json = json.loads(self.body)
        check(name, value)
        return value

    def uploaded(self) -> list[Json]:
        """The documents of the uploaded package."""
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        [part] = email.message_from_bytes(head + self.body).get_payload()
        content = part.get_payload(decode=True)  # type: ignore[union-attr]
        assert part.get_param("name", header="content-disposition") == "uploadfile"  # type: ignore[union-attr]
        return _documents(content)


@functools.cache
def _documents(content: bytes) -> list[Json]:
    return list(yaml.safe_load_all(content))


def check(kind: str, value: Any) -> None:
    """Refuse what a model of kfp-server-api does not describe: unknown fields and other types."""
    plain = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object, "datetime": str}
    if kind in plain:
        fits = isinstance(value, plain[kind])
    elif kind.startswith("dict("):
        fits = isinstance(value, dict)
    elif kind in ENUMS:
        fits = value in getattr(models, kind).allowable_values
    else:
        model = getattr(models, kind)
        unknown = set(value) - set(model.attribute_map.values())
        if unknown:
            raise Refused(400, f"proto: (line 1:1): unknown field {sorted(unknown)[0]!r} in {kind}")
        for name, inner in value.items():
            check(model.openapi_types[next(key for key, wire in model.attribute_map.items() if wire == name)], inner)
        return
    if not fits:
        raise Refused(400, f"proto: invalid value for {kind}: {value!r}")


class _Handler(BaseHTTPRequestHandler):
    stand_in: KfpStandIn

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.stand_in.requests.append(f"{self.command} {url.path}")
        for fault in self.stand_in.faults:
            if fault.times and re.search(fault.what, f"{self.command} {url.path}"):
                fault.times -= 1
                location = fault.location and fault.location + self.path
                return self._send(fault.status, fault.body, fault.content_type, location)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        try:
            value, status = self.stand_in.answer(self.command, url.path, query, self.headers, body), 200
        except Refused as error:
            status = error.status
            value = {"error": str(error), "code": CODES[status], "message": str(error), "details": []}
            if "upload" in url.path:
                value = {"error_message": str(error), "error_details": str(error)}
        return self._send(status, json.dumps(value), "application/json")

    def _send(
        self, status: int, body: str | Callable[[], Iterator[bytes]], content_type: str, location: str = ""
    ) -> None:
        parts = [body.encode()] if isinstance(body, str) else body()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        if isinstance(body, str):
            self.send_header("Content-Length", str(len(body.encode())))
        if location:
            self.send_header("Location", location)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # whoever asked has heard enough
            for part in parts:
                self.wfile.write(part)

    do_GET = do_POST = do_DELETE = _serve

    def log_message(self, *arguments: object) -> None:
        """Stay quiet."""


ROUTES: dict[str, dict[str, Callable[[KfpStandIn, _Call], Json]]] = {
    "healthz": {"GET": KfpStandIn.healthz},
    "experiments": {"GET": KfpStandIn.list_experiments, "POST": KfpStandIn.create_experiment},
    "pipelines/names/([^/]+)": {"GET": KfpStandIn.pipeline_by_name},
    "pipelines": {"POST": KfpStandIn.create_pipeline},
    "pipelines/upload_version": {"POST": KfpStandIn.upload_version},
    "pipelines/([^/]+)/versions": {"GET": KfpStandIn.list_versions},
    "runs": {"GET": KfpStandIn.list_runs, "POST": KfpStandIn.create_run},
    "runs/([^/:]+)": {"GET": KfpStandIn.get_run},
    "recurringruns": {"GET": KfpStandIn.list_recurring, "POST": KfpStandIn.create_recurring},
    "recurringruns/([^/:]+):(enable|disable)": {"POST": KfpStandIn.switch_recurring},
    "recurringruns/([^/:]+)": {"DELETE": KfpStandIn.delete_recurring},
}

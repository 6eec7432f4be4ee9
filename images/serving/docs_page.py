"""`/docs` and `/openapi.json`: the API's description as a page that needs no other host, with a form to try it.

Both are open where predictions want a key: they tell what every copy of this program tells, and the served name, which
any 404 tells as well. A key that is typed into the form stays in the page.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from html import escape
from typing import Any
from urllib.parse import quote

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .openapi import openapi

__all__ = ["docs_routes", "page"]

_HERE = "http://127.0.0.1:8080"  # the script puts the page's own address in its place


def docs_routes(model: str, guarded: bool = False) -> tuple[Route, ...]:
    """`/openapi.json` and `/docs`, made once.

    Args:
        model: the name that is served.
        guarded: predictions want a key or token here.
    """
    document = openapi(model, guarded)
    described, shown = orjson.dumps(document), page(document, model, guarded).encode()

    async def description(request: Request) -> Response:
        return Response(described, media_type="application/json")

    async def documentation(request: Request) -> Response:
        return Response(shown, media_type="text/html", headers=_HEADERS)

    return (Route("/openapi.json", description), Route("/docs", documentation))


def page(document: dict[str, Any], model: str, guarded: bool) -> str:
    """The page of a document."""
    about = "".join(f"<p>{_prose(text)}</p>" for text in document["info"]["description"].split("\n\n"))
    tags = "".join(_tag(document, tag) for tag in document["tags"])
    return _PAGE.format(
        title=escape(f"{model}: Haechi serving"),
        style=_STYLE,
        script=_SCRIPT,
        model=escape(model),
        guarded="" if guarded else " hidden",
        version=escape(document["info"]["version"]),
        about=about,
        curl="".join(f"<h3>{escape(what)}</h3><pre>{escape(command)}</pre>" for what, command in _curl(model, guarded)),
        tags=tags,
        refusals="".join(map(_refusal_row, document["components"]["responses"].items())),
    )


def _curl(model: str, guarded: bool) -> list[tuple[str, str]]:
    """What it does, and the command."""
    key = " -H 'X-Api-Key: KEY'" if guarded else ""
    name = quote(model, safe="")

    def command(rest: str, path: str) -> str:
        return f"curl{key}{rest} {shlex.quote(_HERE + path)}"

    image = " -H 'Content-Type: image/jpeg' --data-binary @frame.jpg"
    b64 = """ -H 'Content-Type: application/json' --data-binary @-"""
    v1 = """printf '{"instances": [{"image": {"b64": "%s"}}]}' "$(base64 -w0 frame.jpg)" | """
    v2 = (
        """printf '{"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": ["%s"]}]}' """
        """"$(base64 -w0 frame.jpg)" | """
    )
    return [
        ("Boxes of an image", command(image, f"/v1/models/{name}:predict")),
        ("The ten surest, above 0.4", command(image, f"/v1/models/{name}:predict?conf=0.4&max_det=10")),
        ("V1 JSON, up to 64 images", v1 + command(b64, f"/v1/models/{name}:predict")),
        ("V2 (Open Inference Protocol)", v2 + command(b64, f"/v2/models/{name}/infer")),
        ("V2, an image as it is", command(image, f"/v2/models/{name}/infer")),
        ("Classes and thresholds", command("", f"/v2/models/{name}")),
    ]


def _tag(document: dict[str, Any], tag: dict[str, str]) -> str:
    operations = [
        _operation(document, path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if tag["name"] in operation["tags"]
    ]
    return f"<h3>{_prose(tag['description'])}</h3>{''.join(operations)}"


def _operation(document: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [_parameters(document, operation), _examples(operation), _answers(operation)]
    locked = " <small>(key)</small>" if operation["security"] else ""
    return (
        f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code>{locked} {escape(operation['summary'])}"
        f"</summary><p>{_prose(operation.get('description', ''))}</p>{''.join(parts)}</details>"
    )


def _parameters(document: dict[str, Any], operation: dict[str, Any]) -> str:
    rows = []
    for entry in operation.get("parameters", []):
        if "$ref" in entry:
            entry = document["components"]["parameters"][entry["$ref"].rpartition("/")[2]]
        text = entry.get("description") or entry["schema"].get("description", "")
        limits = {name: value for name, value in entry["schema"].items() if name not in ("description", "type")}
        told = f"{_prose(text)} <small>{escape(_limits(limits))}</small>"
        rows.append(f"<tr><td><code>{escape(entry['name'])}</code><td>{escape(entry['in'])}<td>{told}")
    return f"<table><tr><th>parameter<th>in<th>{''.join(rows)}</table>" if rows else ""


def _limits(schema: dict[str, Any]) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "maxLength": "characters to"}
    return ", ".join(f"{words[name]} {value}" for name, value in schema.items() if name in words)


def _examples(operation: dict[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {})
    kinds = f"<p>Body: {', '.join(f'<code>{escape(kind)}</code>' for kind in content)}</p>" if content else ""
    examples = content.get("application/json", {}).get("examples", {}).values()
    return kinds + "".join(f"<pre>{_json(example['value'])}</pre>" for example in examples)


def _answers(operation: dict[str, Any]) -> str:
    good = operation["responses"].get("200", {}).get("content", {}).get("application/json", {})
    shown = f"<pre>{_json(good['example'])}</pre>" if "example" in good else ""
    return f"<p>Answers: {', '.join(operation['responses'])}</p>{shown}"


def _refusal_row(entry: tuple[str, dict[str, Any]]) -> str:
    status, response = entry
    return f"<tr><td>{escape(status)}<td>{_prose(response['description'])}"


def _json(value: Any) -> str:
    return escape(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def _prose(text: str) -> str:
    """Text with `code` in it."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))


_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 small { font-weight: normal; font-size: 1rem; }
pre { overflow-x: auto; padding: .7rem; border: 1px solid var(--line); border-radius: 6px; font-size: .85rem; }
code { font-size: .9em; }
details { border-bottom: 1px solid var(--line); padding: .4rem 0; }
summary { cursor: pointer; }
table { border-collapse: collapse; font-size: .9rem; }
td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; }
form { display: grid; gap: .6rem; border: 1px solid var(--line); border-radius: 6px; padding: 1rem; }
canvas { max-width: 100%; }
#said { white-space: pre-wrap; }
"""

_SCRIPT = """
'use strict';
const found = id => document.getElementById(id);
const model = document.body.dataset.model;
// The page may lie behind a gateway's prefix.
const base = new URL('.', location.href).href.replace(/\\/$/, '');
for (const block of document.querySelectorAll('#curl pre')) {
  block.textContent = block.textContent.replaceAll('http://127.0.0.1:8080', base);
}
fetch(base + '/v2/health/ready').then(
  answer => { found('state').textContent = answer.ok ? 'ready' : 'not ready'; },
  () => { found('state').textContent = 'not reachable'; });

function draw(picture, detections) {
  const canvas = found('drawn'), pen = canvas.getContext('2d');
  canvas.width = picture.width;
  canvas.height = picture.height;
  canvas.hidden = false;
  pen.drawImage(picture, 0, 0);
  const size = Math.max(12, picture.width / 50);
  pen.lineWidth = size / 6;
  pen.font = size + 'px sans-serif';
  pen.textBaseline = 'top';
  for (const item of detections) {
    const [x1, y1, x2, y2] = item.box;
    const text = item.class + ' ' + item.score.toFixed(2);
    const colour = 'hsl(' + item.class_id * 67 % 360 + ' 90% 50%)';
    pen.strokeStyle = pen.fillStyle = colour;
    pen.strokeRect(x1, y1, x2 - x1, y2 - y1);
    pen.fillRect(x1, Math.max(0, y1 - size), pen.measureText(text).width, size);
    pen.fillStyle = 'black';
    pen.fillText(text, x1, Math.max(0, y1 - size));
  }
}

found('try').addEventListener('submit', async event => {
  event.preventDefault();
  const file = found('image').files[0];
  const query = new URLSearchParams();
  if (found('conf').value) query.set('conf', found('conf').value);
  const headers = found('key').value ? {'X-Api-Key': found('key').value} : {};
  const asked = performance.now();
  try {
    const answer = await fetch(base + '/v1/models/' + encodeURIComponent(model) + ':predict?' + query,
      {method: 'POST', body: file, headers: {'Content-Type': file.type || 'application/octet-stream', ...headers}});
    const told = await answer.json();
    found('said').textContent = answer.status + ' in ' + Math.round(performance.now() - asked) + ' ms\\n'
      + JSON.stringify(told, null, 1);
    found('drawn').hidden = true;
    if (answer.ok) draw(await createImageBitmap(file), told.predictions[0].detections);
  } catch (problem) {
    found('said').textContent = String(problem);
  }
});
"""

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<title>{title}</title><style>{style}</style></head>
<body data-model="{model}">
<h1>{model} <small>Haechi serving {version}, <span id="state">state unknown</span></small></h1>
<h2>Try it</h2>
<form id="try">
<label>Image <input type="file" id="image" accept="image/*" required></label>
<label>Confidence limit <input type="number" id="conf" min="0.001" max="1" step="any" placeholder="the model's"></label>
<label{guarded}>Key <input type="password" id="key" autocomplete="off"></label>
<button>Detect</button>
</form>
<canvas id="drawn" hidden></canvas>
<pre id="said">Nothing was asked yet.</pre>
<h2>With curl</h2>
<div id="curl">{curl}</div>
<h2>Paths</h2>
{about}
{tags}
<h2>Refusals</h2>
<table>{refusals}</table>
<p>The same for machines: <a href="openapi.json">openapi.json</a>. gRPC
(<code>inference.GRPCInferenceService</code>) describes itself by reflection, on its own port.</p>
<script>{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# Nothing but this very style and script, and nothing to anywhere else.
_HEADERS = {
    "content-security-policy": f"default-src 'none'; style-src {_hash(_STYLE)}; script-src {_hash(_SCRIPT)}; "
    "connect-src 'self'; img-src data: blob:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

"""A model's own address inside the cluster: ask it for boxes and for its metrics, over the V2 protocol."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import requests

from haechi.components.shared.detections import Detections
from haechi.components.shared.errors import DeployError
from haechi.components.shared.images import decode
from haechi.components.shared.model_folder import GOLDEN_CONF, GoldenImage, read_golden
from haechi.components.shared.parity import Agreement, Tolerance, agree, compare
from haechi.components.shared.progress import say

from .bounded import Answer, ask
from .credential import REMEDY, Credential

__all__ = ["Denied", "Endpoint", "Unanswered", "check_golden_at", "disagreement"]

_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}
# Our own pictures are no samples of production.
_HEADERS = {"x-haechi-sample": "never", "x-haechi-camera": "haechi-deploy"}
_TOLD = 200  # characters of an odd answer
_IOU = 0.7  # as the golden boxes were made


class Unanswered(DeployError):
    """The model's address gave no answer, or one that is none of ours."""


class Denied(DeployError):
    """The model's address does not know us, or does not let us ask: nothing is said of the model."""


class Endpoint:
    """One predictor's Service.

    Args:
        url: of the Service, such as http://safety-predictor.models.svc.
        model: what it serves its model as: the name of the InferenceService.
        settle: seconds for which a connection that fails or a 503 is tried again (a new Service takes some).
        credential: what it knows us by, where it asks.

    Raises:
        Denied: from the methods, it refuses us.
    """

    def __init__(self, url: str, model: str, settle: float = 30.0, credential: Credential | None = None) -> None:
        self.url, self._model, self._settle = url, model, settle
        self._credential = credential or Credential()

    def check_known(self) -> None:
        """Let it refuse us now, if it will; whatever else it answers is no matter here."""
        try:
            self._ask("GET", f"/v2/models/{self._model}", patient=False)
        except Unanswered:
            return

    def detect(self, image: GoldenImage) -> tuple[Detections, str]:
        """The boxes that it finds in a golden image, at the golden limits, and the version that answered.

        Raises:
            Unanswered: it cannot be reached, answers with an error, or with another form.
        """
        path = f"/v2/models/{self._model}/infer?conf={GOLDEN_CONF}&iou={_IOU}"
        kind = _TYPES.get(Path(image.name).suffix.lower(), "application/octet-stream")
        answer = self._ask("POST", path, image.data, kind)
        try:
            entry = json.loads(answer.body)
            found = {item["name"]: item["data"] for item in entry["outputs"]}
            boxes = Detections(
                np.asarray(found["boxes"], dtype=np.float32).reshape(-1, 4),
                np.asarray(found["scores"], dtype=np.float32),
                np.asarray(found["class_ids"], dtype=np.int64),
            )
            return boxes, str(entry["model_version"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            told = str(error)[:_TOLD]
            raise Unanswered(f"{self.url} answered in another form than Haechi's V2 ({told})") from error

    def metrics(self) -> str:
        """Its `/metrics`, of whichever pod the Service chooses.

        Raises:
            Unanswered: it cannot be reached or answers with an error.
        """
        return self._ask("GET", "/metrics").text

    def _ask(self, verb: str, path: str, body: bytes | None = None, kind: str = "", patient: bool = True) -> Answer:
        end, headers = time.monotonic() + self._settle, _HEADERS | ({"content-type": kind} if kind else {})
        while True:
            try:
                answer = ask(verb, self.url + path, data=body, headers=headers, auth=self._credential)
                if answer.status == 200:
                    return answer
                if answer.status in (401, 403):
                    raise self._denied(answer)
                problem = f"answered {answer.status}: {_reason(answer)}"
                passing = answer.status == 503
            except requests.RequestException as error:
                problem, passing = f"cannot be reached ({error})", True
            if not passing or not patient or time.monotonic() > end:
                raise Unanswered(
                    f"{self.url} {problem}",
                    "Look at the predictor pod's log, and whether a network policy lets this pod reach it.",
                )
            time.sleep(min(1.0, self._settle / 10))

    def _denied(self, answer: Answer) -> Denied:
        names = " and ".join(self._credential.headers()) or "no key or token"
        return Denied(
            f"{self.url} answered {answer.status} ({_reason(answer)}); {names} was sent",
            REMEDY.format(folder=self._credential.folder),
        )


def check_golden_at(
    endpoint: Endpoint, folder: Path, version: str, tick: Callable[[], None] = lambda: None
) -> Agreement:
    """Ask an address for the golden images of a model folder, and compare with the golden boxes.

    Args:
        endpoint: where the model should be.
        folder: its model folder.
        version: that must answer.
        tick: called before each image.

    Returns:
        The agreement, which is ok.

    Raises:
        Unanswered: no answer.
        DeployError: another version answers, the boxes differ, or the folder has no golden image.
    """
    results = []
    for image in read_golden(folder):
        tick()
        found, answered = endpoint.detect(image)
        if answered != version:
            raise DeployError(
                f"{endpoint.url} serves model {answered}, not {version}", "Look at the storageUri and the pods' log."
            )
        longest = max(decode(image.data).shape[:2])
        results.append(compare(image.expected, found, GOLDEN_CONF, Tolerance(), longest))
    if not results:
        raise DeployError(
            f"model {version} has no golden images, so nothing can be asked of {endpoint.url}",
            "Export it again with golden_images of at least 1, or set rollout.strategy to 'rolling'.",
        )
    total = agree(results)
    if not total.ok:
        raise DeployError(
            f"{endpoint.url} gives other boxes than the golden ones: {total.unmatched} without a partner, corners up to "
            f"{total.max_box_px:.2f} px and scores up to {total.max_score:.3f} apart, on {total.images} images",
            "Compare the runtime's image and its engine with the ones that the model was exported for.",
        )
    if not total.boxes:
        say(
            f"NOTHING PROVEN: no golden image of {version} has a box, so {endpoint.url} only found nothing where nothing is"
        )
    return total


def disagreement(pairs: list[tuple[Detections, Detections]]) -> float:
    """The share of boxes that only one side has, at IoU 0.5 and the same class; 0 where neither has any."""
    tolerance = Tolerance(edge=0.0)
    results = [compare(one, other, GOLDEN_CONF, tolerance, 640) for one, other in pairs]
    lone, matched = sum(item.unmatched for item in results), sum(item.boxes for item in results)
    return lone / (lone + 2 * matched) if lone + matched else 0.0


def _reason(answer: Answer) -> str:
    try:
        return str(json.loads(answer.body)["error"])[:_TOLD]
    except (ValueError, KeyError, TypeError, RecursionError):
        return answer.text[:_TOLD] or answer.reason

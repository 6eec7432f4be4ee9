"""The parameters of a run, read by the steps' own parsers before anything starts.

`haechi run` and `haechi submit` ask here before they send anything; the step `resolve` asks again for the runs that
were started in the dashboard or by another client. Needs neither numpy nor torch nor kfp, as a submit may have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..build.config import BuildConfig, Grouping
from ..deploy.rollout import Rollout
from ..deploy.target import Target
from ..evaluate.parameters import Gate
from ..export.parameters import check_golden_images, check_iou, spread_thresholds
from ..ingest.parameters import Import, Quality, Source
from ..label.parameters import check_class_map, check_review_limit, parse_bands
from ..shared.errors import InputError
from ..shared.files import check_classes
from ..shared.model_address import check_address
from ..train.candidate import Candidate
from ..train.parameters import check_device, check_seed

__all__ = ["check_parameters"]


def check_parameters(values: Mapping[str, Any]) -> None:
    """Refuse what a step would refuse at its turn, hours later; in the data's order.

    What only the data can tell (whether a source holds frames, a teacher is there) is left to the steps.

    Args:
        values: name → value as JSON has it, of the pipeline's parameters that a step parses: the inputs of `resolve`.

    Raises:
        InputError: one that cannot be used, in the words of its step.
    """
    classes, seed = check_classes(values["classes"]), values["seed"]
    Quality.parse(values["quality"])
    for position, item in enumerate(values["sources"]):
        Source.parse(item, position)
    for position, item in enumerate(values["imports"]):
        Import.parse(item, position, classes)
    if values["teacher"]:
        check_address(values["teacher"])
    check_class_map(values["class_map"], classes)
    parse_bands(values["bands"], classes)
    check_review_limit(values["review_limit"])
    grouping = Grouping.of(values["grouping"])
    BuildConfig(values["name"], classes, ratios=values["ratios"], seed=seed, grouping=grouping)
    check_seed(seed)
    check_device(values["device"])
    _check_candidates(values["candidates"])
    spread_thresholds(values["thresholds"], classes)  # a model has its dataset's classes
    check_iou(values["iou"])
    check_golden_images(values["golden_images"])
    Gate.from_dict(values["gate"]).check_classes(classes)
    Target.parse(values["target"])
    Rollout.parse(values["rollout"])


def _check_candidates(candidates: Sequence[Any]) -> None:
    if not candidates:
        raise InputError("candidates is empty", "Name at least one training.")
    for entry in candidates:
        if not isinstance(entry, Mapping):
            raise InputError(f"candidates holds {entry!r}", "Give each one as a mapping, with name and model.")
        Candidate.parse(entry)

"""What evaluate decided, read back and checked: is it about this model, and does it allow what is asked?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from haechi.components.shared.errors import DeployRefused, InputError
from haechi.components.shared.files import read_json
from haechi.components.shared.model_folder import ModelFolder

__all__ = ["DECISIONS", "Verdict", "check_about", "check_allows", "check_proven"]

DECISIONS = ("promote", "refuse", "not_enough_data")


@dataclass(frozen=True)
class Verdict:
    """`verdict.json` and the challenger's side of `scorecard.json`.

    Attributes:
        decision: one of DECISIONS.
        reasons: sentences.
        challenger, champion: model versions; the champion's is empty where there was none.
        scores: the challenger's `{map50_95, map50, precision, recall, per_class}`, as evaluate wrote it.
    """

    decision: str
    reasons: tuple[str, ...]
    challenger: str
    champion: str
    scores: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.decision not in DECISIONS:
            raise InputError(
                f"verdict.json has decision {self.decision!r}", f"It is one of {', '.join(DECISIONS)}; evaluate again."
            )

    @classmethod
    def load(cls, folder: Path) -> Verdict:
        """Read the artifact `verdict`.

        Raises:
            InputError: a file is missing or is not what evaluate writes.
        """
        try:
            entry, card = read_json(folder / "verdict.json"), read_json(folder / "scorecard.json")
            reasons = tuple(str(reason) for reason in entry["reasons"])
            return cls(
                entry["decision"], reasons, entry["challenger"], entry.get("champion") or "", card["challenger"] or {}
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{folder} is not a verdict: {type(error).__name__}: {error}", "Run evaluate again."
            ) from error

    def metrics(self) -> dict[str, float | None]:
        """The challenger's test scores under their names in MLflow; null APs stay None."""
        names = {"map50_95": "mAP50-95", "map50": "mAP50", "precision": "precision", "recall": "recall"}
        overall = {f"test/{shown}": self.scores.get(key) for key, shown in names.items()}
        classes = self.scores.get("per_class") or {}
        return overall | {f"test/mAP50-95/{name}": score.get("map50_95") for name, score in classes.items()}


def check_about(verdict: Verdict, model: ModelFolder, name: str) -> None:
    """Raise unless the verdict and the name belong to this very model.

    Raises:
        InputError: the model was exported under another name.
        DeployRefused: the verdict is about another model.
    """
    if model.name != name:
        raise InputError(
            f"the model folder is of {model.name!r}, not of {name!r}", "Give the name that export was given."
        )
    if verdict.challenger != model.version:
        raise DeployRefused(
            f"the verdict is about model {verdict.challenger!r}, not about {model.version}",
            "Evaluate this model, and deploy with that verdict.",
        )


def check_allows(verdict: Verdict, champion: str, folder: Path) -> None:
    """Raise unless the verdict says promote, against this champion, and the folder's parity check is good.

    Raises:
        DeployRefused: it does not; the message holds the verdict's reasons.
    """
    if verdict.decision != "promote":
        reasons = "; ".join(verdict.reasons) or "no reason given"
        raise DeployRefused(
            f"the verdict is {verdict.decision}: {reasons}", "Only a challenger with verdict 'promote' is deployed."
        )
    if verdict.champion != champion:
        raise DeployRefused(
            f"the verdict compares with {verdict.champion or 'no champion'}, not with {champion or 'none'}",
            "Evaluate against the champion that resolve pinned.",
        )
    check_proven(folder)


def check_proven(folder: Path) -> None:
    """Raise unless the folder's parity check is good.

    Raises:
        DeployRefused: it is not, or there is none.
    """
    try:
        proven = read_json(folder / "parity.json")["ok"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DeployRefused(
            f"{folder}/parity.json cannot be read ({type(error).__name__}), so nothing proves the export",
            "Export the checkpoint again.",
        ) from error
    if proven is None:
        raise DeployRefused(
            f"{folder}/parity.json compares no image, so nothing proves the export",
            "Export again with golden_images of at least 1 and frames in val.",
        )
    if proven is not True:
        raise DeployRefused(
            f"{folder}/parity.json says that checkpoint and ONNX model give different boxes",
            "Look at its figures, and export the checkpoint again.",
        )

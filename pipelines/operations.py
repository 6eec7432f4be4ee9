"""`haechi promote`, `rollback`, `status` and `reconcile`: a person's hand on what serves, through deploy's own checks."""

from __future__ import annotations

import getpass
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from haechi.components.deploy.bring import Bringer, find_version
from haechi.components.deploy.inference_service import Patience
from haechi.components.deploy.observe import observe
from haechi.components.deploy.reconciler import SITUATION, Pair, Reconciler
from haechi.components.deploy.registry import FORMER, crown
from haechi.components.deploy.rollout import Rollout
from haechi.components.deploy.target import Target
from haechi.components.shared.errors import InputError, SettingsError
from haechi.components.shared.files import check_name
from haechi.components.shared.settings import Settings
from haechi.components.shared.storage import Store
from haechi.components.shared.tracking import RegisteredVersion, Tracker

from .services import services

__all__ = ["parse_pairs", "promote", "reconcile", "rollback", "settings_of", "status", "status_lines"]


@contextmanager
def settings_of(workdir: Path, *targets: Target) -> Iterator[Settings]:
    """The settings that the environment names; where it names neither store nor MLflow, those of a workdir's services.

    Args:
        workdir: the services' folder.
        targets: what is to be looked at or changed; a cluster cannot read from a workdir's store.

    Raises:
        SettingsError: the environment names only one of the two, or none and a target is `kserve:`.
        ServiceError: the workdir's services did not come up.
    """
    settings = Settings.from_env()
    named = {"HAECHI_S3_ENDPOINT": settings.s3_endpoint, "MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri}
    missing = [name for name, value in named.items() if not value]
    if not missing:
        yield settings
        return
    clusters = [str(target) for target in targets if target.kind == "kserve"]
    if len(missing) < len(named) or clusters:
        needs = f", and {clusters[0]} needs the cluster's store and MLflow" if clusters else ", and the other one is"
        raise SettingsError(
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set{needs}",
            "Set both as the cluster's steps have them, by way of `kubectl port-forward` from outside the cluster"
            + ("." if clusters else "; or neither, for the services of --workdir."),
        )
    with services(workdir) as started:
        yield replace(
            started.settings(),
            git_credentials=settings.git_credentials,
            endpoint_credentials=settings.endpoint_credentials,
        )


def promote(
    settings: Settings,
    name: str,
    version: str,
    target: Target | None = None,
    rollout: Rollout | None = None,
    take_over: bool = False,
    patience: Patience | None = None,
) -> dict[str, Any]:
    """Make a registered version the champion, and let the target serve it first, where one is given.

    Args:
        settings: the object store and MLflow.
        name: registered model's name.
        version: Haechi's version or the beginning of it.
        target: where it is to serve; none to set the alias only, which a reconciler follows.
        rollout: the settings for `kserve`.
        take_over: take the target from whoever is deploying to it.
        patience: how long to wait for an InferenceService.

    Returns:
        {"name", "version", "former", "target"}.

    Raises:
        InputError: no such version.
        HaechiError: as deploy; the champion is then as it was.
    """
    bringer = _bringer(settings, target, rollout, patience)
    tracker, former = _look(settings, name)
    wanted = find_version(tracker, name, version)
    _bring(bringer, tracker, name, wanted, former, take_over)
    return {"name": name, "version": wanted.version, "former": former, "target": str(bringer.target)}


def rollback(
    settings: Settings,
    name: str,
    target: Target | None = None,
    rollout: Rollout | None = None,
    take_over: bool = False,
    patience: Patience | None = None,
) -> dict[str, Any]:
    """Withdraw a canary that is under way, or else go back to the champion before this one, without baking.

    Args:
        settings, name, target, rollout, take_over, patience: as `promote`.

    Returns:
        As `promote`.

    Raises:
        InputError: nobody knows a champion before this one.
        HaechiError: as deploy.
    """
    bringer = _bringer(settings, target, replace(rollout or Rollout(), steps=(), bake=0.0), patience)
    tracker, champion = _look(settings, name)
    served = observe(bringer.target, Path(settings.git_credentials))
    if champion and (served.canary or served.state.under_way) and served.version in (champion, ""):
        goal = champion
    else:
        known = find_version(tracker, name, champion).tags.get(FORMER, "") if champion else ""
        goal = known or (served.former if served.former != champion else "")
    if not goal:
        raise InputError(
            f"no champion of {name!r} before {champion or 'this one'} is known",
            f"Name the version: haechi promote {name} VERSION.",
        )
    # Whom we flee from is nobody to come back to.
    _bring(bringer, tracker, name, find_version(tracker, name, goal), "", take_over)
    return {"name": name, "version": goal, "former": champion, "target": str(bringer.target)}


def status(settings: Settings, name: str, target: Target | None = None) -> dict[str, Any]:
    """Who is the champion, what the target serves, and how its last rollout went.

    Args:
        settings, name, target: as `promote`.

    Returns:
        {"name", "champion", "challenger", "former", "situation", "target", "served", "in_sync"}; `served` is None
        without a target, and `in_sync` too.
    """
    where = target or Target()
    tracker = Tracker(settings)
    champion, challenger = (tracker.alias(name, alias) for alias in ("champion", "challenger"))
    served = observe(where, Path(settings.git_credentials)) if where.kind != "none" else None
    return {
        "name": name,
        "champion": champion.version if champion else "",
        "challenger": challenger.version if challenger else "",
        "former": champion.tags.get(FORMER, "") if champion else "",
        "situation": champion.tags.get(SITUATION, "") if champion else "",
        "target": str(where),
        "served": asdict(served) if served else None,
        "in_sync": None
        if served is None
        else bool(champion) and served.version == (champion.version if champion else "") and not served.canary,
    }


def status_lines(found: Mapping[str, Any]) -> list[str]:
    """A status for people."""
    served = found["served"]
    lines = [
        f"champion    {found['champion'] or 'none'}" + (f" (before: {found['former']})" if found["former"] else ""),
        f"challenger  {found['challenger'] or 'none'}",
    ]
    if found["situation"]:
        lines.append(f"reconciler  {found['situation']}")
    if served is None:
        return [*lines, "target      none given"]
    ready = "ready" if served["ready"] else f"not ready: {served['waits']}"
    lines.append(f"{found['target']} names {served['version'] or 'nothing'}, {ready}")
    if served["canary"]:
        lines.append(f"canary      {served['canary']} with {served['traffic']} % of the traffic")
    state = served["state"]
    if state["phase"]:
        reason = f": {state['reason']}" if state["reason"] else ""
        lines.append(
            f"rollout     {state['version']} by {state['strategy']}: {state['phase']} since {state['since']}{reason}"
        )
    if served["holder"]:
        lines.append(f"deploying   {served['holder']}")
    return lines if found["in_sync"] else [*lines, "The target does not serve the champion."]


def parse_pairs(texts: Sequence[str]) -> list[tuple[str, Target]]:
    """Read `<name>=<target>` words.

    Raises:
        InputError: a word of another form, or a target that cannot be read.
    """
    pairs = []
    for text in texts:
        name, equals, rest = text.partition("=")
        target = Target.parse(rest)
        if not equals or target.kind == "none":
            raise InputError(f"{text!r} is not NAME=TARGET", "Write it as safety=kserve:haechi-serving/safety.")
        check_name(name)
        pairs.append((name, target))
    return pairs


def reconcile(
    settings: Settings,
    pairs: Sequence[tuple[str, Target]],
    every: float,
    rollout: Rollout | None = None,
    patience: Patience | None = None,
) -> dict[str, str]:
    """Follow the champions: one round where `every` is 0, else for ever.

    Args:
        settings: the object store and MLflow.
        pairs: registered models and where their champions are to serve.
        every: seconds between two rounds.
        rollout, patience: as `promote`.

    Returns:
        Of one round, what is so with each model.
    """
    owner = f"reconciler {socket.gethostname()}"
    bringers = [(name, _bringer(settings, target, rollout, patience)) for name, target in pairs]
    reconciler = Reconciler([Pair(name, replace(bringer, owner=owner)) for name, bringer in bringers])
    if not every:
        return reconciler.once()
    # A pod that is deleted gives its lease back, so that the next one goes on at once.
    signal.signal(signal.SIGTERM, _leave)
    reconciler.run(every)
    return {}


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(0)


def _bringer(settings: Settings, target: Target | None, rollout: Rollout | None, patience: Patience | None) -> Bringer:
    # With the process: another one of the same person is another one.
    owner = f"{getpass.getuser()}@{socket.gethostname()} ({os.getpid()})"
    return Bringer(settings, target or Target(), owner, rollout or Rollout(), patience or Patience())


def _look(settings: Settings, name: str) -> tuple[Tracker, str]:
    """MLflow, and the champion's version; empty where there is none."""
    tracker = Tracker(settings)
    champion = tracker.alias(name, "champion")
    return tracker, champion.version if champion else ""


def _bring(
    bringer: Bringer, tracker: Tracker, name: str, wanted: RegisteredVersion, former: str, take_over: bool
) -> None:
    Store(bringer.settings).check()
    evidence = {"Ordered-by": bringer.owner}
    bringer.bring(
        name, wanted, then=lambda: crown(tracker, name, wanted, former), evidence=evidence, take_over=take_over
    )

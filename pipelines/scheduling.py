"""Continuous training: one recurring run of the newest version, made once and replaced when it shall be another."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import kfp_server_api

from haechi.components.shared.errors import InputError

from .kubeflow import Kubeflow
from .kubeflow_errors import SubmitError

__all__ = ["Schedule", "recur"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_CRON_FIELDS = 6


@dataclass(frozen=True)
class Schedule:
    """When a recurring run starts a run: by the clock or every so many seconds.

    Attributes:
        cron: six fields, seconds first, as KFP's scheduler reads them (UTC unless it was told otherwise); or empty.
        seconds: between two starts; 0 where `cron` is given.
    """

    cron: str = ""
    seconds: int = 0

    def __post_init__(self) -> None:
        if bool(self.cron) == bool(self.seconds):
            raise InputError("a schedule needs one of --cron and --every", "Give the one or the other.")
        fields = self.cron.split()
        # Five fields would be taken as seconds to months: once a minute instead of once an hour.
        if self.cron and not self.cron.startswith("@") and len(fields) != _CRON_FIELDS:
            hint = f"Write it as '0 {self.cron}'." if len(fields) == _CRON_FIELDS - 1 else "Such as '0 0 3 * * *'."
            raise InputError(f"--cron {self.cron!r} has {len(fields)} fields; Kubeflow's has six, seconds first", hint)

    @classmethod
    def parse(cls, cron: str, every: str) -> Schedule:
        """From the words of `--cron` and `--every` (30m, 6h, 1d)."""
        if not every:
            return cls(cron=cron.strip())
        match = re.fullmatch(r"([1-9]\d*)([smhd])", every.strip())
        if not match:
            raise InputError(f"--every is {every!r}", "Write a number and s, m, h or d, such as 6h.")
        return cls(cron=cron.strip(), seconds=int(match[1]) * _UNITS[match[2]])

    def trigger(self) -> kfp_server_api.V2beta1Trigger:
        """As the API takes it."""
        if self.cron:
            return kfp_server_api.V2beta1Trigger(cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=self.cron))
        periodic = kfp_server_api.V2beta1PeriodicSchedule(interval_second=str(self.seconds))
        return kfp_server_api.V2beta1Trigger(periodic_schedule=periodic)

    def __str__(self) -> str:
        return self.cron or f"every {self.seconds} s"


def recur(api: Kubeflow, wanted: kfp_server_api.V2beta1RecurringRun) -> tuple[str, str]:
    """See to it that exactly one recurring run has `wanted`'s name, and that it is as wanted.

    The API cannot change one, so another takes its place. The old ones are stopped before the new one is made and deleted
    after, so that no two ever start runs; where the new one is refused, those that ran go on.

    Args:
        api: the server.
        wanted: with a display name, trigger, experiment, pipeline reference and parameters.

    Returns:
        Its id, and `unchanged`, `created`, `replaced` or `resumed` (it was there, but stopped).

    Raises:
        SubmitError: the server refuses; what ran before goes on.
    """
    known = api.recurring_runs(wanted.display_name)
    same = [row for row in known if _shape(row) == _shape(wanted)]
    if same:
        kept = next((row for row in same if _enabled(row)), same[0])
        for row in known:
            if row is not kept:
                api.delete_recurring(row.recurring_run_id)
        if _enabled(kept):
            return str(kept.recurring_run_id), "unchanged" if len(known) == 1 else "replaced"
        api.enable_recurring(kept.recurring_run_id, True)
        return str(kept.recurring_run_id), "resumed"
    running = [row for row in known if _enabled(row)]
    for row in running:
        api.enable_recurring(row.recurring_run_id, False)
    try:
        made = api.create_recurring(wanted)
    except SubmitError:
        for row in running:
            api.enable_recurring(row.recurring_run_id, True)
        raise
    # Somebody may have done the same at this moment: whoever looks last sees both, and the newest stays. Of those that
    # run: the ones that were stopped above may be of the same second.
    rows = api.recurring_runs(wanted.display_name)
    new = [row for row in rows if _enabled(row)] or rows
    kept = max(new, key=lambda row: (row.created_at, row.recurring_run_id)).recurring_run_id if new else made
    for row in rows:
        if row.recurring_run_id != kept:
            api.delete_recurring(row.recurring_run_id)
    return str(kept), "replaced" if known else "created"


def _enabled(row: kfp_server_api.V2beta1RecurringRun) -> bool:
    return bool(row.mode == kfp_server_api.RecurringRunMode.ENABLE)


def _shape(row: kfp_server_api.V2beta1RecurringRun) -> dict[str, Any]:
    """What makes two recurring runs the same, in one form for what we send and what the server gives back."""
    reference = row.pipeline_version_reference
    trigger = row.trigger
    cron = trigger.cron_schedule.cron if trigger and trigger.cron_schedule else ""
    periodic = trigger.periodic_schedule if trigger else None
    return {
        # Tells the service account that was asked for; in its own field the server tells its choice where none was.
        "description": row.description or "",
        "experiment": row.experiment_id,
        "pipeline": reference and reference.pipeline_id,
        "version": (reference and reference.pipeline_version_id) or "",
        "parameters": (row.runtime_config and row.runtime_config.parameters) or {},
        "cron": cron or "",
        "seconds": str(periodic.interval_second or 0) if periodic else "0",
        "max_concurrency": str(row.max_concurrency or 1),
        "no_catchup": bool(row.no_catchup),
    }

"""This machine: packages, disk, shared memory, ports, and the services that `haechi up` left running."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from haechi.components.shared.errors import HaechiError

from ..processes import ServiceError
from ..servers import free_ports
from ..services import running
from .findings import Finding, NotAsked
from .world import World

__all__ = ["disk", "packages", "ports", "services", "shared_memory"]

_ROOM = 5 * 2**30  # bytes: a demo's services and models take about one GiB, a training run a few
_SHM = Path("/dev/shm")  # noqa: S108
_SMALL = 64 * 2**20
_GRPC = 10_000  # SeaweedFS puts gRPC ports this far above the others


def packages(world: World) -> list[Finding]:
    """What is installed, against what this version asks for: all of [demo] without a cluster, else [steps]."""
    extra = "steps" if world.has_cluster else "demo"
    found = []
    for wanted in _requirements("haechi", extra):
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            symptom, cause = f"package {wanted.name} is not installed", f"extra [{extra}] asks for {wanted}"
        else:
            if wanted.specifier.contains(version, prereleases=True):
                continue
            symptom = f"package {wanted.name} is {version}"
            cause = f"extra [{extra}] asks for {wanted}; something else was installed over it"
        found.append(Finding(symptom, cause, f"pip install 'haechi[{extra}]'"))
    return found


def disk(world: World) -> list[Finding]:
    """Room for the work folder, and the right to write there."""
    folder = world.aim.workdir.resolve()
    while not folder.exists():
        folder = folder.parent
    found = []
    free = shutil.disk_usage(folder).free
    if free < _ROOM:
        cause = f"the disk of {folder} is nearly full; datasets, models and MLflow's database lie there"
        fix = "haechi … --workdir /another/disk   # or free some: du -sh .haechi/*"
        found.append(Finding(f"{free / 2**30:.1f} GiB are free for {world.aim.workdir}", cause, fix))
    if not _writable(folder):
        fix = f"chown -R $(id -un) {folder}   # or --workdir elsewhere"
        found.append(
            Finding(f"{folder} cannot be written", "it is no folder, belongs to another user, or is read-only", fix)
        )
    return found


def shared_memory(world: World) -> list[Finding]:
    """Shared memory for data loader processes; a container gets 64 MiB unless it is told otherwise."""
    if not _SHM.is_dir():
        raise NotAsked(f"this system has no {_SHM}")
    total = shutil.disk_usage(_SHM).total
    if total > _SMALL:
        return []
    cause = "this is a container with its runtime's default; training then loads data with fewer processes, slowly"
    fix = "docker run --shm-size=2g …   # podman the same"
    return [Finding(f"{_SHM} has {total / 2**20:.0f} MiB", cause, fix)]


def ports(world: World) -> list[Finding]:
    """Loopback ports for the embedded services."""
    try:
        free_ports(4, also=_GRPC)
    except ServiceError as error:
        return [
            Finding(error.problem, "other programs hold them, or loopback is shut off", "ss -ltnp   # then stop some")
        ]
    return []


def services(world: World) -> list[Finding]:
    """The services that `haechi up` started in the work folder: on record, alive, and answering."""
    workdir = world.aim.workdir
    if not (workdir / "services.json").is_file():
        raise NotAsked(f"no `haechi up` is on record in {workdir}")
    restart = f"haechi down --workdir {workdir} && haechi up --workdir {workdir}"
    try:
        if running(workdir) is not None:
            return []
    except HaechiError as error:
        return [Finding(error.problem, "the record is damaged", f"{error.remedy}\n{restart}")]
    cause = f"the machine restarted, or they were ended or crashed: the last lines of {workdir / 'logs'}/*.log tell"
    return [Finding(f"services are on record in {workdir}, and do not run or answer", cause, restart)]


def _requirements(name: str, extra: str, seen: frozenset[str] = frozenset()) -> Iterator[Requirement]:
    """What a distribution's extra asks for on this system, its own other extras included."""
    for text in metadata.requires(name) or []:
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        if wanted.name == name:
            for other in sorted(wanted.extras - seen):
                yield from _requirements(name, other, seen | {extra, other})
        else:
            yield wanted


def _writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)

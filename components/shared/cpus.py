"""How many CPUs this process may really use: the cgroup's limits and the affinity, not the host's count."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["Cpus", "granted_cpus"]


@dataclass(frozen=True)
class Cpus:
    """The CPUs that are granted.

    Attributes:
        share: CPUs' worth of time, such as 1.5.
        threads: as many compute threads as never get throttled by that, at least 1.
        limited_by: `cgroup` or `affinity`, whichever grants less.
    """

    share: float
    threads: int
    limited_by: str


def granted_cpus(root: Path = Path("/"), affinity: int | None = None) -> Cpus:
    """The smallest of the cgroup limits on the way up from this process (v1, v2 or both) and the affinity.

    Args:
        root: of the file system, for tests with planted files.
        affinity: CPUs that the scheduler may use; None asks the system.
    """
    count = affinity if affinity is not None else _affinity()
    quota = min(_quotas(root), default=float(count))
    # Rounded down: a thread more than the quota pays is stopped for the rest of each period.
    share = min(quota, float(count))
    return Cpus(share, max(1, int(share + 1e-6)), "cgroup" if quota < count else "affinity")


def _affinity() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no affinity
        return os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    """The limits in force, in CPUs; none where nothing limits or nothing can be read."""
    paths = _own_groups(root)
    for kind, mount, top in _mounts(root):
        if kind not in paths:
            continue
        for folder in _upwards(paths[kind], mount, top):
            limit = _read_v2(root / folder) if kind == "cgroup2" else _read_v1(root / folder)
            if limit is not None:
                yield limit


def _own_groups(root: Path) -> dict[str, PurePosixPath]:
    """The process's group by kind of hierarchy, from `/proc/self/cgroup`."""
    found = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            found["cgroup2"] = PurePosixPath(path)
        elif "cpu" in controllers.split(","):
            found["cgroup"] = PurePosixPath(path)
    return found


def _mounts(root: Path) -> Iterator[tuple[str, PurePosixPath, PurePosixPath]]:
    """(kind, mount point, group that is mounted there) of the CPU hierarchies, from `/proc/self/mountinfo`."""
    for line in _lines(root / "proc/self/mountinfo"):
        fields, _, rest = line.partition(" - ")
        kind, options = rest.partition(" ")[0], rest.rpartition(" ")[2]
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(",")):
            top, mount = fields.split()[3:5]
            yield kind, PurePosixPath(mount), PurePosixPath(top)


def _upwards(group: PurePosixPath, mount: PurePosixPath, top: PurePosixPath) -> Iterator[str]:
    """Folders from the process's group up to the mount, relative to the file system's root."""
    # A group outside of what is mounted here (another namespace) leaves the mount itself.
    inside = group.relative_to(top) if group.is_relative_to(top) and ".." not in group.parts else PurePosixPath()
    folder = mount / inside
    while True:
        yield str(folder).lstrip("/")
        if folder == mount:
            return
        folder = folder.parent


def _read_v2(folder: Path) -> float | None:
    text = " ".join(_lines(folder / "cpu.max")).split()
    return _ratio(text[0], text[1]) if len(text) == 2 else None


def _read_v1(folder: Path) -> float | None:
    quota, period = (" ".join(_lines(folder / f"cpu.cfs_{name}_us")).strip() for name in ("quota", "period"))
    return _ratio(quota, period)


def _ratio(quota: str, period: str) -> float | None:
    """CPUs, or None for `max`, -1 and nonsense."""
    if not (quota.isdigit() and period.isdigit()) or int(quota) == 0 or int(period) == 0:
        return None
    return int(quota) / int(period)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []

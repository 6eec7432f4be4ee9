"""CPUs that are granted: limits of cgroup v1 and v2, alone and together, nested, and the affinity."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from haechi.components.shared.cpus import granted_cpus

V2 = "30 24 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct"
V1_OTHER = "36 31 0:33 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset"


def plant(root: Path, mounts: list[str], groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/mountinfo": "\n".join(mounts), "proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("mounts", "groups", "files", "share", "threads"),
    [
        pytest.param([], "", {}, 8.0, 8, id="no cgroup at all"),
        pytest.param([V2.format(top="/")], "0::/", {}, 8.0, 8, id="v2 without the cpu controller"),
        pytest.param([V2.format(top="/")], "0::/", {"sys/fs/cgroup/cpu.max": "max 100000"}, 8.0, 8, id="v2 unlimited"),
        pytest.param(
            [V2.format(top="/")], "0::/", {"sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5, 1, id="v2 namespaced"
        ),
        pytest.param([V2.format(top="/")], "0::/", {"sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5, 1, id="half a CPU"),
        pytest.param(
            [V2.format(top="/")],
            "0::/pod/box",
            {"sys/fs/cgroup/pod/cpu.max": "200000 100000", "sys/fs/cgroup/pod/box/cpu.max": "400000 100000"},
            2.0,
            2,
            id="the parent limits more",
        ),
        pytest.param(
            [V2.format(top="/")],
            "0::/pod/box",
            {"sys/fs/cgroup/pod/cpu.max": "600000 100000", "sys/fs/cgroup/pod/box/cpu.max": "300000 100000"},
            3.0,
            3,
            id="the child limits more",
        ),
        pytest.param(
            [V2.format(top="/pod")],
            "0::/pod/box",
            {"sys/fs/cgroup/box/cpu.max": "300000 100000"},
            3.0,
            3,
            id="only a part of the tree is mounted",
        ),
        pytest.param(
            [V2.format(top="/")],
            "0::/../../elsewhere",
            {"sys/fs/cgroup/cpu.max": "400000 100000"},
            4.0,
            4,
            id="a group outside of the namespace leaves the mount",
        ),
        pytest.param(
            [V1.format(top="/docker/7f"), V1_OTHER],
            "4:cpu,cpuacct:/docker/7f\n3:cpuset:/docker/7f",
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            2.5,
            2,
            id="v1",
        ),
        pytest.param(
            [V1.format(top="/")],
            "4:cpu,cpuacct:/",
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            8.0,
            8,
            id="v1 unlimited",
        ),
        pytest.param(
            [V1.format(top="/"), V2.format(top="/").replace("cgroup rw", "cgroup/unified rw")],
            "4:cpu,cpuacct:/a\n0::/a",
            {
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/unified/a/cpu.max": "500000 100000",
            },
            3.0,
            3,
            id="hybrid",
        ),
        pytest.param([V2.format(top="/")], "0::/", {"sys/fs/cgroup/cpu.max": "lots of"}, 8.0, 8, id="nonsense"),
    ],
)
def test_the_smallest_limit_on_the_way_up_counts(
    tmp_path: Path, mounts: list[str], groups: str, files: dict[str, str], share: float, threads: int
) -> None:
    found = granted_cpus(plant(tmp_path, mounts, groups, files), affinity=8)

    assert (found.share, found.threads) == (share, threads)
    assert found.limited_by == ("cgroup" if share < 8 else "affinity")


def test_an_affinity_below_the_quota_counts(tmp_path: Path) -> None:
    root = plant(tmp_path, [V2.format(top="/")], "0::/", {"sys/fs/cgroup/cpu.max": "600000 100000"})

    found = granted_cpus(root, affinity=4)

    assert (found.share, found.threads, found.limited_by) == (4.0, 4, "affinity")


def test_on_this_machine_it_is_at_least_one_and_no_more_than_the_affinity() -> None:
    assert 1 <= granted_cpus().threads <= len(os.sched_getaffinity(0))


def test_a_system_without_affinity_counts_its_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert granted_cpus(tmp_path).threads == 3

"""The CPUs a process may use: what it is pinned to, cgroups of both versions, Slurm; and how OpenMP's threads wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vatt_engine import cpus
from vatt_engine.cpus import cgroup_quota, openmp_settings, usable_cpus

V2 = "30 24 0:26 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "33 24 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct"
OTHERS = [  # of version 1's other controllers, of other file systems, and with a field that is not always there
    "34 24 0:30 / /sys/fs/cgroup/cpuset rw,nosuid shared:10 - cgroup cgroup rw,cpuset",
    "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw",
]


def system(root, groups, mounts, limits):
    """A file system of fake files: the process's groups, the mounts, and what limits the folders hold."""
    files = {"proc/self/cgroup": "\n".join(groups), "proc/self/mountinfo": "\n".join([*OTHERS, *mounts])} | limits
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n" if text else "")
    return root


CG2 = "sys/fs/cgroup"
CG1 = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("groups", "mounts", "limits", "expected"),
    [
        (["0::/job"], [V2.format(top="/")], {f"{CG2}/job/cpu.max": "150000 100000"}, 1.5),
        (["0::/job"], [V2.format(top="/")], {f"{CG2}/job/cpu.max": "max 100000"}, None),
        # the least of all levels counts, wherever it stands
        (
            ["0::/slice/job/step"],
            [V2.format(top="/")],
            {f"{CG2}/slice/cpu.max": "50000 100000", f"{CG2}/slice/job/step/cpu.max": "400000 100000"},
            0.5,
        ),
        # a container sees its own group as the top
        (["0::/"], [V2.format(top="/")], {f"{CG2}/cpu.max": "200000 100000"}, 2.0),
        (["0::/docker/abc"], [V2.format(top="/docker/abc")], {f"{CG2}/cpu.max": "300000 100000"}, 3.0),
        (
            ["0::/../other"],
            [V2.format(top="/docker/abc")],
            {f"{CG2}/cpu.max": "300000 100000", f"{CG2}/../other/cpu.max": "100000 100000"},  # not of this group
            3.0,
        ),
        (
            ["4:cpu,cpuacct:/job", "3:cpuset:/elsewhere", "0::/job"],
            [V1.format(top="/")],
            {f"{CG1}/job/cpu.cfs_quota_us": "250000", f"{CG1}/job/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        (
            ["4:cpu,cpuacct:/job"],
            [V1.format(top="/")],
            {f"{CG1}/job/cpu.cfs_quota_us": "-1", f"{CG1}/job/cpu.cfs_period_us": "100000"},
            None,
        ),
        # a container of version 1 knows the host's path of its group, and mounts it elsewhere
        (
            ["4:cpu,cpuacct:/docker/abc"],
            [V1.format(top="/docker/abc")],
            {f"{CG1}/cpu.cfs_quota_us": "50000", f"{CG1}/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ([], [], {}, None),
        (["0::/job"], [V2.format(top="/")], {f"{CG2}/job/cpu.max": "nonsense"}, None),
    ],
)
def test_quotas_of_cgroups(tmp_path, groups, mounts, limits, expected):
    assert cgroup_quota(system(tmp_path, groups, mounts, limits)) == expected


def test_no_proc_is_no_limit(tmp_path):
    assert cgroup_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("pinned", "quota", "slurm", "expected"),
    [
        (8, None, None, 8),
        (8, 2.5, None, 3),  # rounded up: the half of a CPU is used too
        (8, 0.2, None, 1),
        (8, None, "4", 4),
        (2, 16.0, "4", 2),
        (8, None, "many", 8),
        (8, None, "0", 1),
    ],
)
def test_the_least_of_all_limits_counts(monkeypatch, pinned, quota, slurm, expected):
    monkeypatch.setattr(cpus, "_pinned_cpus", lambda: pinned)
    monkeypatch.setattr(cpus, "cgroup_quota", lambda: quota)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    if slurm is not None:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
    assert usable_cpus() == expected


def test_cpus_that_a_process_is_not_pinned_to_do_not_count():
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, [{one}]); from vatt_engine.cpus import usable_cpus; print(usable_cpus())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("1\n", "")


def test_everything_that_counts_cpus_counts_those_it_may_use():
    """A count of the machine's CPUs stands in one place, and in what a run says about its machine."""
    root = os.path.dirname(cpus.__file__)
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            if name.endswith(".py"):
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    if "cpu_count()" in file.read():
                        found.append(name)
    assert sorted(found) == ["cpus.py", "doctor.py", "logging.py"]


def test_openmp_spins_shortly_unless_the_user_has_chosen(monkeypatch):
    monkeypatch.setattr(cpus, "_pinned_cpus", lambda: 8)
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 8)
    assert openmp_settings({}) == cpus.WAITING
    for name in cpus.CHOICES_OF_WAITING:
        assert openmp_settings({name: "x"}) == {}
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 3)  # a quota, of which torch knows nothing
    assert openmp_settings({}) == {**cpus.WAITING, "OMP_NUM_THREADS": "3"}
    assert openmp_settings({"OMP_NUM_THREADS": "8"}) == cpus.WAITING


SEEN = """
import os, sys
from vatt_engine import cli
cli.VERBS["seen"] = ("seen", "")
class Verb:
    def main(argv):
        print("torch" in sys.modules, os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_NUM_THREADS"))
        return 0
sys.modules["seen"] = Verb
"""
AS_A_PROGRAM = "cli.main(['seen'])"
AS_A_LIBRARY = """
import vatt_engine
before = dict(os.environ)
vatt_engine.create_model
assert "torch" in sys.modules
cli.main(["seen"])
assert dict(os.environ) == before
"""


@pytest.mark.parametrize(
    ("code", "given", "expected"),
    [
        (AS_A_PROGRAM, {}, "False 1000 None"),
        (AS_A_PROGRAM, {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "7"}, "False None 7"),
        (AS_A_PROGRAM, {"SLURM_CPUS_PER_TASK": "1"}, f"False 1000 {1 if cpus._pinned_cpus() > 1 else None}"),
        (AS_A_LIBRARY, {}, "True None None"),  # too late for OpenMP, and not ours to change
    ],
)
def test_a_verb_chooses_how_openmp_waits_before_torch_loads_it(code, given, expected):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "SLURM_"))}
    result = subprocess.run([sys.executable, "-c", SEEN + code], env=plain | given, capture_output=True, text=True)
    assert result.stdout == f"{expected}\n", result.stderr

"""How many threads a rank gets: cores without hyperthreads, quotas, other ranks, and what the user says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.errors import ConfigError
from headrace.workers import rank_threads
from headrace.workers.rank_threads import cores, share_of, time_awake, use_threads

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine as the kernel shows it: logical CPUs, their siblings, and what this process may use."""

    def make(siblings, allowed=None):
        for number, text in enumerate(siblings):
            folder = tmp_path / f"cpu{number}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(text + "\n")
        usable = set(range(len(siblings))) if allowed is None else allowed
        monkeypatch.setattr(rank_threads, "_affinity", lambda: usable)
        return tmp_path

    return make


def test_hyperthreads_count_once(machine):
    cpu = machine(["0,4", "1,5", "2,6", "3,7"] * 2)
    assert cores(cpu=cpu, cgroup=cpu / "none") == 4


def test_only_the_cores_of_our_affinity_count(machine):
    cpu = machine(["0,4", "1,5", "2,6", "3,7"] * 2, allowed={1, 5, 6})
    assert cores(cpu=cpu, cgroup=cpu / "none") == 2


def test_a_kernel_that_shows_no_topology_counts_cpus(machine, tmp_path):
    machine([], allowed={0, 1, 2})
    assert cores(cpu=tmp_path / "nothing", cgroup=tmp_path / "none") == 3


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "garbage"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
)
def test_the_quota_of_a_container_counts(machine, files, expected):
    cpu = machine([str(number) for number in range(8)])
    cgroup = cpu / "cgroup"
    for name, text in files.items():
        (cgroup / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroup / name).write_text(text)
    assert cores(cpu=cpu, cgroup=cgroup) == expected


def test_this_machine_has_a_core():
    assert 1 <= cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(("processes", "available", "each"), [(1, 8, 8), (2, 8, 4), (3, 8, 2), (9, 8, 1), (1, 1, 1)])
def test_cores_are_divided(processes, available, each):
    assert share_of(processes, available) == each


def test_the_variable_decides(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert share_of(1, 64) == 3


@pytest.mark.parametrize("value", ["0", "-1", "many", "2,1"])
def test_a_variable_that_is_no_number_is_named(monkeypatch, value):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(ConfigError, match=r"\$OMP_NUM_THREADS"):
        share_of(1, 64)


@pytest.mark.parametrize(
    ("threads", "crowded", "env", "policy"),
    [
        (2, True, {}, "PASSIVE"),
        (2, False, {}, None),
        (1, True, {}, None),
        (2, True, {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        (2, True, {"GOMP_SPINCOUNT": "1000"}, None),
    ],
)
def test_threads_do_not_spin_where_others_need_the_core(monkeypatch, threads, crowded, env, policy):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "torch", None)
    use_threads(threads, crowded=crowded)
    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == str(threads)
    assert os.environ.get("OMP_WAIT_POLICY") == policy


@pytest.mark.parametrize("first", ["import torch", ""])
def test_torch_takes_the_number(first):
    """Whether it is imported later, as in a rank, or was before, by the program's main module."""
    code = f"""
{first}
from headrace.workers.rank_threads import use_threads
use_threads(1, crowded=True)
import torch
torch.ones(300, 300) @ torch.ones(300, 300)
print(torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    ("device", "devices", "available", "awake"),
    [
        ("auto", ["nvidia0", "nvidiactl"], 16, True),
        ("cuda:1", ["nvidia0", "nvidia1"], 8, True),
        ("auto", ["nvidia0"], 7, False),  # nobody's core is to spare
        ("cpu", ["nvidia0"], 16, False),
        ("auto", ["nvidiactl", "null"], 16, False),  # a driver without a GPU
    ],
)
def test_who_waits_for_a_gpu_stays_awake_if_there_are_cores_for_it(device, devices, available, awake, tmp_path):
    for name in devices:
        (tmp_path / name).touch()
    assert (time_awake(device, available=available, dev=tmp_path) > 0) is awake

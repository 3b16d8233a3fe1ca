"""How many CPU threads each rank computes with, how they wait for each other, and how others wait for them.

Two processes whose threads spin while they wait take turns at blocking each other: on two cores one model fell from 18
to 0.6 tokens/s. So the cores are divided among the ranks, and where none is left over for the broker, the gateway and
the clients, waiting threads soon go to sleep.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from headrace.errors import ConfigError

__all__ = ["cores", "share_of", "time_awake", "use_threads"]

_AWAKE = 0.02  # a program that asks one thing after the other comes back sooner
_MANY_CORES = 8
_DEV = Path("/dev")
_CPU = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def cores(*, cpu: Path = _CPU, cgroup: Path = _CGROUP) -> int:
    """Physical cores that this process may use: by its affinity, without hyperthreads, within its container's quota."""
    allowed = _affinity()
    siblings = {_siblings(cpu, number) for number in allowed}
    quota = _quota(cgroup)
    return max(1, len(siblings) if quota is None else min(len(siblings), quota))


def share_of(processes: int, available: int) -> int:
    """Threads for each of some processes; $OMP_NUM_THREADS, where set, decides instead.

    Raises:
        ConfigError: the variable is no number.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not wanted:
        return max(1, available // max(1, processes))
    if not wanted.isdigit() or int(wanted) < 1:
        raise ConfigError(f"$OMP_NUM_THREADS is {wanted!r}; give a whole number of at least 1, or unset it.")
    return int(wanted)


def use_threads(threads: int, *, crowded: bool) -> None:
    """Let this process compute with so many threads; to be called before torch is imported.

    Args:
        threads: of this process.
        crowded: whether others need the same cores.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    if crowded and threads > 1 and "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if (torch := sys.modules.get("torch")) is not None:  # the program that started us imports it
        torch.set_num_threads(threads)


def time_awake(device: str, *, available: int | None = None, dev: Path = _DEV) -> float:
    """Seconds that a process between a GPU and its clients looks for the next message before it sleeps: none where
    the cores have to compute, or are few.

    Args:
        device: the setting.
        available: cores.
        dev: folder of devices, where those of NVIDIA's driver are.
    """
    on_gpu = device != "cpu" and any(dev.glob("nvidia[0-9]*"))
    return _AWAKE if on_gpu and (cores() if available is None else available) >= _MANY_CORES else 0.0


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _siblings(cpu: Path, number: int) -> str:
    """The hyperthreads that share a core, as the kernel writes them."""
    try:
        return (cpu / f"cpu{number}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(number)


def _quota(cgroup: Path) -> int | None:
    """CPUs that a container allows, rounded up; None if it sets no limit."""
    try:
        allowed, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            allowed = (cgroup / "cpu/cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        number = int(allowed)
        return -(-number // int(period)) if number > 0 else None
    except (ValueError, ZeroDivisionError):
        return None

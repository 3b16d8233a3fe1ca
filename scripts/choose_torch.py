"""Which torch to install on a machine without a GPU: pip arguments for a build that brings no CUDA with it.

Run by scripts/environment.sh inside the new virtual environment, before anything of ours or torch is installed; so it
uses pip and the standard library only. pip is asked what it would take (`--dry-run --report`), and each candidate's own
list of requirements says whether gigabytes of CUDA libraries would follow.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# The release that the project is tested with on CPU; pip prefers a local build (2.13.0+cpu) where an index has one.
TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CANDIDATES = (
    [TORCH],
    [TORCH, "--index-url", CPU_INDEX],
)

REFUSAL = f"""
No CPU build of torch was found: the package index offers only {TORCH} with CUDA (several GB),
and {CPU_INDEX} could not be used.
  - behind a proxy?           set HTTPS_PROXY (or PIP_INDEX_URL to a mirror with CPU builds), run this again
  - a CPU wheel in a folder?  PIP_FIND_LINKS=/path/to/folder, run this again
  - take the CUDA build?      HEADRACE_ALLOW_CUDA=1, run this again"""


def resolve(arguments: list[str]) -> dict[str, Any] | None:
    """What pip would install for the arguments, without its dependencies; None if it finds nothing."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--no-deps", "--ignore-installed"]
        # An index that cannot be reached must not cost minutes of retries.
        command = [*pip, "--timeout", "20", "--retries", "1", "--report", str(report), *arguments]
        done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603  # our own arguments
        if done.returncode != 0 or not report.exists():
            return None
        installs: list[dict[str, Any]] = json.loads(report.read_text())["install"]
        return installs[0] if installs else None


def brings_cuda(install: dict[str, Any]) -> bool:
    """Whether a resolved torch requires CUDA packages on this machine."""
    from pip._vendor.packaging.requirements import Requirement

    for line in install["metadata"].get("requires_dist", []):
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name.lower().startswith(("nvidia-", "cuda-")):
            return True
    return False


def choose() -> list[str] | None:
    """The first candidate that needs no CUDA."""
    for arguments in CANDIDATES:
        found = resolve(arguments)
        if found is not None and not brings_cuda(found):
            return arguments
    return None


def main() -> int:
    """Print the pip arguments on one line, or say what a person can do."""
    arguments = choose()
    if arguments is None:
        print(REFUSAL, file=sys.stderr)
        return 1
    print(*arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())

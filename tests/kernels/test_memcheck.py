"""No kernel reads or writes outside of its tensors: compute-sanitizer watches the cases of memcheck.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.memcheck import CASES
from tests.kernels.test_pairs import paired_ops

FOUND = 86  # exit status for what the sanitizer finds
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")


def sanitized(*ops: str) -> subprocess.CompletedProcess[str]:
    """The cases of some ops under compute-sanitizer; skips where it is not, or does not know the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    path = os.pathsep.join((os.environ.get("PATH", ""), *PLACES))
    tool = shutil.which("compute-sanitizer", path=path)
    if tool is None:
        pytest.skip(f"NOT CHECKED: compute-sanitizer, which comes with the CUDA toolkit, is not in {path}")
    options = ["--tool", "memcheck", "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    command = [tool, *options, sys.executable, "-W", "ignore", "-m", "tests.kernels.memcheck", *ops]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=580, check=False, errors="replace"
    )
    print(done.stdout[-20_000:], done.stderr[-5_000:], sep="\n")  # pytest shows it if the test fails
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip(f"NOT CHECKED: compute-sanitizer does not support {torch.cuda.get_device_name()} on this machine")
    return done


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("op", CASES)
def test_no_kernel_leaves_its_tensors(op):
    done = sanitized(op)
    assert done.returncode == 0
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
    assert "cases ran" in done.stdout


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_an_overrun_of_one_value_is_seen():
    done = sanitized("overrun")
    assert done.returncode != 0
    assert "Invalid __global__ read" in done.stdout + done.stderr


def test_every_kernel_has_cases():
    assert set(CASES) == paired_ops()
    for op, cases in CASES.items():
        names = [name for name, _ in cases()]
        assert len(names) > 5, op
        assert len(set(names)) == len(names), op

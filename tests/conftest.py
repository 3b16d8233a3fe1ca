"""Settings every test shares: one compute thread, folders of its own, kernels interpreted when there is no GPU."""

import os
import signal
import tempfile
from pathlib import Path

import pytest

# Started in the background of a shell, a process ignores Ctrl-C, and so does all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Two busy processes with two OpenMP threads each on two cores run ten times slower than with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton looks at this when it is imported, which transformers does, too: it must be said before any test is read.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _private_folders():
    """A short runtime folder (Unix socket paths end at 107 bytes), never the user's own."""
    with tempfile.TemporaryDirectory(prefix="hr") as folder:
        patch = pytest.MonkeyPatch()
        # Models that the user has fetched stay visible: tests of the real model read them, none writes there.
        patch.setenv("HEADRACE_MODELS", os.environ.get("HEADRACE_MODELS", _default_models()))
        patch.setenv("HEADRACE_RUNTIME_DIR", f"{folder}/run")
        patch.setenv("HEADRACE_CACHE", f"{folder}/cache")
        yield
        patch.undo()


def _default_models() -> str:
    from headrace.addresses import cache_dir

    return str(Path(cache_dir()) / "models")


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a path short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="hr") as folder:
        yield Path(folder)

"""Models for the fake engine, and a broker in a thread for the commands that talk to one."""

import pytest

from tests.client.pool import Pool
from tests.scripts.commands import fake_model


@pytest.fixture
def model(tmp_path):
    """The folder of a model that the fake engine loads."""
    return fake_model(tmp_path / "mill")


@pytest.fixture
def pool(run_dir, monkeypatch):
    """A broker without groups, where the commands look for one."""
    pool = Pool(run_dir)
    pool.start_broker()
    monkeypatch.setenv("HEADRACE_ENDPOINT", pool.endpoint)
    monkeypatch.delenv("HEADRACE_DEBUG", raising=False)
    yield pool
    pool.close()

"""A pool for tests with real sockets, and the certainty that clients leave nothing behind."""

import threading

import pytest

from tests.client.pool import Pool


@pytest.fixture
def pool(run_dir):
    """A broker without groups."""
    pool = Pool(run_dir)
    pool.start_broker()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _no_thread_left():
    """Every client of the test ended with its thread."""
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "headrace-client"] == []

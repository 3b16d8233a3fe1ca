"""A pool of real processes for each test."""

import pytest

from tests.support.worker_pool import WorkerPool


@pytest.fixture
def pool(run_dir):
    """Without its broker and groups: a test starts what it needs."""
    pool = WorkerPool(run_dir)
    yield pool
    pool.close()

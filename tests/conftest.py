"""Fixtures for the whole suite."""

from collections.abc import Iterator

import pytest

from tests.support.workers import WorkerPool


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Up to eight ranks on this machine, started at their first use."""
    pool = WorkerPool(8)
    yield pool
    pool.close()

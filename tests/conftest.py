"""Fixtures for the whole suite."""

from collections.abc import Iterator

import pytest

from tests.support.workers import WorkerPool


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Four ranks on this machine, started at the first use."""
    pool = WorkerPool(4)
    yield pool
    pool.close()

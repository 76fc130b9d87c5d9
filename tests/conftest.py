"""What every test leaves as it was."""

from collections.abc import Iterator

import pytest

from .training import logging_as_before


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Trainings in this process redirect them, and tests run in any order."""
    with logging_as_before():
        yield

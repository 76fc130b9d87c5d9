"""What every test leaves as it was, and the data that several train on."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from .training import logging_as_before, registered_rectangles


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Trainings in this process redirect them, and tests run in any order."""
    with logging_as_before():
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    """Random numbers of a test do not depend on the tests before it (but for what fixtures of a
    module make)."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Name of a registered data set of twelve images."""
    with registered_rectangles(tmp_path_factory.mktemp("rectangles")) as name:
        yield name

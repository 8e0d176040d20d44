"""The tiny model, as fixtures."""

import pytest

from tests.experiments.llama import tiny


@pytest.fixture(scope="session")
def params():
    return tiny.make_params()


@pytest.fixture(scope="session")
def tokens():
    return tiny.make_tokens()


@pytest.fixture(scope="session")
def targets():
    return tiny.make_targets()

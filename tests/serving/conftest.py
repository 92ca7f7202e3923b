"""One server for most tests."""

from collections.abc import Iterator

import pytest

from tests.serving.models import serving


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of a server with two models, `infiller` and `left-to-right`."""
    with serving() as address:
        yield address

"""Whatever the API's own description allows, and much that it does not: never a fault of the server."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error

from diffusify.serving.app import Limits
from tests.serving.models import serving


@pytest.fixture(scope="module")
def api() -> Iterator[Any]:
    """With little room, so that no request takes long."""
    with serving(limits=Limits(tokens=300, seconds=20)) as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_no_request_is_too_much(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=[not_a_server_error], timeout=60)

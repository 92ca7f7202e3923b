"""No request causes an internal server error, whether or not it is valid by the OpenAPI schema."""

import pytest
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode, openapi
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok

from diffusify.serving.limits import Limits
from tests.serving.models import serving


@pytest.mark.slow
def test_no_request_causes_a_server_error() -> None:
    """With a small budget of tokens, so that no request takes long."""
    examples = settings(
        max_examples=20,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    with serving(limits=Limits(tokens=100, seconds=20.0)) as address:
        schema, tried = openapi.from_url(f"{address}/openapi.json"), set()
        for operation in [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]:
            for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:

                @examples
                @given(operation.as_strategy(generation_mode=mode))
                def check(case: Case) -> None:
                    tried.add(case.path)
                    case.call_and_validate(checks=[not_a_server_error], timeout=60)

                check()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/infill", "/v1/score", "/v1/models/{name}"} <= tried

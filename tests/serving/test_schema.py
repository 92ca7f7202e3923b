"""Whatever the API's own description allows, and much that it does not: never a fault of the server."""

from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode, openapi
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok

from diffusify.serving.api.app import Limits
from tests.serving.models import serving


def test_no_request_is_too_much() -> None:
    """With little room, so that no request takes long."""
    patient = settings(
        max_examples=20,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    with serving(limits=Limits(tokens=300, seconds=20.0)) as address:
        schema, tried = openapi.from_url(f"{address}/openapi.json"), set()
        for operation in [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]:
            for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:

                @patient
                @given(operation.as_strategy(generation_mode=mode))
                def ask(case: Case) -> None:
                    tried.add(case.path)
                    case.call_and_validate(checks=[not_a_server_error], timeout=60)

                ask()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/infill", "/v1/score", "/v1/models/{name}"} <= tried

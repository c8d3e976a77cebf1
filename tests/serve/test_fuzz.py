"""The server against requests made from its own description: no fault, and every answer as described."""

import pytest

pytest.importorskip("fastapi", reason='needs pip install "flexkern[serve]"')
pytest.importorskip("httpx", reason='needs pip install "flexkern[test]"')
schemathesis = pytest.importorskip("schemathesis", reason='needs pip install "flexkern[test]" and Python 3.11')

from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks
from serving import Limits, serving

from flexkern.serve.server import Door

load_all_checks()
WANTED = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
          "response_schema_conformance", "negative_data_rejection", "unsupported_method")  # fmt: skip
ENDLESS = "/v1/events"
FEW, MANY = 6, 100  # requests of each operation


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """The description of a server that answers, in which there are a few videos."""
    limits = Limits(queued=3)
    with serving(tmp_path_factory.mktemp("videos"), limits=limits, door=Door(port=0, open=True)) as server:
        for prompt in ("a", "it fails"):
            server.until(server.post(prompt).json()["id"], "completed", "failed")
        yield schemathesis.openapi.from_url(f"{server.address}openapi.json")


def examine(described, count):
    """Ask every operation so often, and return how often in all."""
    asked = [0]
    checks = [check for check in CHECKS.get_all() if check.__name__ in WANTED]
    assert len(checks) == len(WANTED)
    quick = settings(max_examples=count, deadline=None, database=None, derandomize=True,
                     suppress_health_check=list(HealthCheck))  # fmt: skip
    for operation in described.get_all_operations():
        operation = operation.ok()
        if operation.path == ENDLESS:
            continue

        @quick
        @schemathesis_given(operation)
        def ask(case):
            asked[0] += 1
            case.call_and_validate(checks=checks, timeout=20)

        ask()
    return asked[0]


def schemathesis_given(operation):
    from hypothesis import given
    from schemathesis import GenerationMode

    either = operation.as_strategy(generation_mode=GenerationMode.POSITIVE) | operation.as_strategy(
        generation_mode=GenerationMode.NEGATIVE
    )
    return given(case=either)


def test_requests_from_its_own_description_find_no_fault(described):
    assert examine(described, FEW) >= 5 * FEW


@pytest.mark.slow
def test_many_requests_from_its_own_description_find_no_fault(described):
    assert examine(described, MANY) >= 5 * MANY

"""The OpenAPI document against the server: schemathesis asks what the document allows, and much that it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from mpgpt_api.service import Limits
from tests.api.rig import Server, serving

EXAMPLES = 40
"""For each endpoint."""


@pytest.fixture(scope="module")
def asked(folder: Path) -> Iterator[Server]:
    """Short answers; the texts that come out are of no interest."""
    with serving(folder, max_new_tokens=2, context=64, max_sequences=4, limits=Limits(time_s=20)) as server:
        yield server


def test_no_undocumented_answer(asked: Server) -> None:
    """Every status, content type and body as the document has it, and no 5xx.

    One check is left out: that what the document allows is accepted. It cannot say how long a prompt may be in tokens,
    nor that text and messages are not given together.
    """
    document = schemathesis.openapi.from_url(asked.url + "/openapi.json")
    operations: list[Any] = [result.ok() for result in document.get_all_operations()]  # type: ignore[union-attr]
    assert len(operations) == 11
    for operation in operations:

        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy() | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
        def ask(case: schemathesis.Case[Any]) -> None:
            response = case.call(timeout=30)
            assert response.status_code < 500, response.text
            case.validate_response(response, excluded_checks=[positive_data_acceptance])

        ask()

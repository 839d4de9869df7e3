"""The OpenAPI document against the server: schemathesis asks what the document allows, and much that it does not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from mpgpt_api.service import Limits
from tests.api.rig import Server, serving

logging.getLogger("hypothesis").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def asked(folder: Path) -> Iterator[Server]:
    """Short answers; the texts that come out are of no interest."""
    with serving(folder, max_new_tokens=2, context=64, max_sequences=4, limits=Limits(time_s=20)) as server:
        yield server


@pytest.fixture(scope="module")
def document(asked: Server) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(asked.url + "/openapi.json")


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_undocumented_answer(case: schemathesis.Case) -> None:
    response = case.call(timeout=30)
    assert response.status_code < 500, response.text
    case.validate_response(response)

# SPDX-License-Identifier: Apache-2.0
"""Requests made up from the server's own description of itself: no error of its own, no hang."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.servers import Served

SECONDS = 20  # for an answer
EXAMPLES = 12  # of each operation and mode
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_answer_is_described_and_none_is_an_error_of_the_server(
    shared: Served, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_url(f"{shared.url}/openapi.json")
    tried = set()
    # Event streams do not end, and are read by tests of their own.
    for found in schema.exclude(path_regex="/events$").get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            answer = case.call(timeout=SECONDS)
            assert answer.status_code < 500 or case.path == "/ready", answer.text
            case.validate_response(answer, checks=CHECKS)

        with suppress(Unsatisfiable):  # nothing can be wrong where nothing is given
            ask()
            tried.add(operation.label)
    assert len(tried) >= (13 if mode is GenerationMode.POSITIVE else 4), tried
    assert shared.http.get("/health").status_code == 200

"""Every status becomes its exception, with every detail the server sent."""

from __future__ import annotations

import pytest

from glasshouse import client as sdk
from glasshouse.client import Client, GlasshouseError, Model, NotFoundError
from glasshouse.client.exceptions import BY_CODE
from glasshouse.client.testing import Failure, FakeServer

CODES = {
    "INVALID_ARGUMENT": sdk.InvalidArgumentError,
    "NOT_FOUND": sdk.NotFoundError,
    "ALREADY_EXISTS": sdk.AlreadyExistsError,
    "FAILED_PRECONDITION": sdk.FailedPreconditionError,
    "RESOURCE_EXHAUSTED": sdk.ResourceExhaustedError,
    "UNAUTHENTICATED": sdk.UnauthenticatedError,
    "PERMISSION_DENIED": sdk.PermissionDeniedError,
    "UNAVAILABLE": sdk.UnavailableError,
    "DEADLINE_EXCEEDED": sdk.DeadlineExceededError,
    "CANCELLED": sdk.CancelledError,
}


def test_the_tree_is_the_contract() -> None:
    assert CODES == BY_CODE
    assert all(issubclass(error, GlasshouseError) for error in CODES.values())
    assert issubclass(sdk.InvalidArgumentError, ValueError)


@pytest.mark.parametrize("code", [*CODES, "INTERNAL", "UNKNOWN", "UNIMPLEMENTED", "ABORTED", "DATA_LOSS"])
@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
def test_each_code_with_details(server: FakeServer, model: Model, code: str, streamed: bool) -> None:
    failure = Failure(
        code,
        "the thing is wrong",
        reason="SOME_REASON",
        field="interventions[2].hook_point",
        value="thing",
        remedy="Do another thing",
        closest=("ab", "cd"),
        retry_after_s=1.5,
    )
    server.fail("Generate" if streamed else "Score", failure, times=5)
    with pytest.raises(GlasshouseError) as caught:
        if streamed:
            model.generate("x", max_tokens=1, timeout=1).result()
        else:
            model.score("x", timeout=1)
    error = caught.value
    assert type(error) is CODES.get(code, GlasshouseError)
    assert (error.code, error.message, error.reason) == (code, "the thing is wrong", "SOME_REASON")
    assert (error.field, error.remedy) == ("interventions[2].hook_point", "Do another thing")
    assert error.retry_after_s == 1.5
    assert error.metadata["value"] == "thing"
    assert error.request_id == server.calls[-1].metadata["x-request-id"]
    if isinstance(error, NotFoundError):
        assert error.closest == ("ab", "cd")
    assert str(error) == (
        "interventions[2].hook_point: the thing is wrong. Do another thing. Retry after 1.5 s. "
        f"[SOME_REASON, request {error.request_id}]"
    )


@pytest.mark.parametrize("code", CODES)
def test_each_code_bare(server: FakeServer, model: Model, code: str) -> None:
    """As a proxy answers: no details, yet the exception has all its attributes."""
    server.fail("Score", Failure(code, "said a proxy"), times=5)
    with pytest.raises(CODES[code]) as caught:
        model.score("x", timeout=1)
    assert caught.value.request_id == server.calls[-1].metadata["x-request-id"]
    assert caught.value.field == "" and caught.value.metadata == {}
    assert str(caught.value)


def test_nobody_there_says_where_and_what_to_do() -> None:
    with Client("localhost:1", max_attempts=2) as client, pytest.raises(sdk.UnavailableError) as caught:
        client.models(timeout=5)
    assert "localhost:1" in str(caught.value)
    assert "glasshouse serve" in caught.value.remedy
    assert caught.value.reason == "UNREACHABLE"


def test_closest_names(model: Model, client: Client) -> None:
    with pytest.raises(NotFoundError) as caught:
        model.activations("x", hook_points="blocks.0.hook_resid_pst")
    assert caught.value.closest[0] == "blocks.0.hook_resid_post"
    assert caught.value.field == "hook_points[0]"
    with pytest.raises(NotFoundError) as caught:
        client.model("fak")
    assert caught.value.closest == ("fake",)


def test_an_error_with_nothing_said_still_reads() -> None:
    assert str(sdk.UnavailableError("")) == "UNAVAILABLE."
    assert sdk.NotFoundError("gone").closest == ()

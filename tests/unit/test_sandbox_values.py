"""Values of sandboxes: results, handles, JSON."""

from __future__ import annotations

import pickle

import pytest
from pydantic import ValidationError

from apothic import SandboxExecResult, SandboxHandle, SandboxStreamEvent
from apothic.errors import HandleError, SandboxExecError

RESULT = SandboxExecResult(
    command=("sh", "-c", "x"), returncode=1, stdout_bytes=b"\xff\0", stderr_bytes=b"bad\n"
)


def test_results_survive_json_and_pickling() -> None:
    for back in (
        SandboxExecResult.model_validate_json(RESULT.model_dump_json()),
        SandboxExecResult.model_validate(RESULT.model_dump()),
        pickle.loads(pickle.dumps(RESULT)),
    ):
        assert back == RESULT
        assert back.stdout_bytes == b"\xff\0"
        assert back.schema_version == 1
    event = SandboxStreamEvent(kind="exit", returncode=1, result=RESULT)
    assert SandboxStreamEvent.model_validate_json(event.model_dump_json()) == event


def test_results_are_frozen() -> None:
    with pytest.raises(ValidationError):
        RESULT.returncode = 0  # type: ignore[misc]


def test_checking() -> None:
    with pytest.raises(SandboxExecError, match="sh -c x ended with 1:\nbad") as caught:
        RESULT.check()
    back = pickle.loads(pickle.dumps(caught.value))
    assert back.result == RESULT
    assert str(back) == str(caught.value)


def test_out_of_memory_is_said() -> None:
    result = RESULT.model_copy(update={"signal": 9, "oom_killed": True, "memory_mb": 512})
    with pytest.raises(SandboxExecError, match=r"SIGKILL \(out of memory, memory_mb=512\)"):
        result.check()
    assert "signal 99" in RESULT.model_copy(update={"signal": 99}).ending


def test_long_output_is_shortened_in_messages() -> None:
    result = RESULT.model_copy(update={"stderr_bytes": b"a" * 100_000 + b"end"})
    with pytest.raises(SandboxExecError) as caught:
        result.check()
    assert len(str(caught.value)) < 3000
    assert str(caught.value).endswith("end")
    assert len(repr(RESULT.model_copy(update={"command": ("x" * 10_000,)}))) < 500


@pytest.mark.parametrize(
    "handle", ["", "{", "[]", "{}", '{"app": 1}', {"app": "x"}, 5, None, b"x", {"extra": 1}]
)
def test_malformed_handles(handle: object) -> None:
    with pytest.raises(HandleError, match="handle"):
        SandboxHandle.parse(handle)

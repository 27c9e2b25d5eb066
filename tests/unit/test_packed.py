"""Arguments and results of a session's verbs on their way through Ray."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from apothic.backend import ExecOutcome, ExecRequest
from ray_backend.sandbox.packed import (
    BESIDE_BYTES,
    pack_arguments,
    pack_result,
    unpack_arguments,
    unpack_result,
)


def travel(value: Any) -> Any:
    """Pickle and unpickle as Ray does: what is out of band is not copied."""
    beside: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, 5, buffer_callback=beside.append)
    return pickle.loads(data, buffers=[buffer.raw() for buffer in beside])


@pytest.mark.parametrize(
    "args",
    [
        (),
        (b"/etc",),
        (ExecRequest((b"true",), 1.0, 10), None),
        (b"/a", b"x" * BESIDE_BYTES, False, True),
        (ExecRequest((b"cat",), 1.0, 10), b"y" * BESIDE_BYTES),
        ("upload", 0, memoryview(b"z" * BESIDE_BYTES)),
        ("upload", BESIDE_BYTES, memoryview(b"the last part")),
    ],
)
def test_arguments_arrive_as_they_were_sent(args: tuple[Any, ...]) -> None:
    arrived = unpack_arguments(*(travel(part) for part in pack_arguments(args)))
    assert arrived == args
    assert [type(each) for each in arrived[:1]] == [type(each) for each in args[:1]]


def test_contents_of_files_travel_beside_the_others() -> None:
    content = b"x" * BESIDE_BYTES
    packed, beside = pack_arguments((b"/a", memoryview(content), True))
    assert len(packed) < 100
    assert isinstance(beside, pickle.PickleBuffer)


@pytest.mark.parametrize(
    "result", [None, True, b"", b"small", b"x" * BESIDE_BYTES, [b"a"], ExecOutcome(3, stdout=b"z")]
)
def test_results_arrive_as_they_were_given(result: object) -> None:
    arrived = unpack_result(travel(pack_result(result)))
    assert arrived == result
    assert type(arrived) is type(result)

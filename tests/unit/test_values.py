"""Handles, specs and reports: values that travel, and what is refused of them."""

from __future__ import annotations

import json
import pickle

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apothic import App, method
from apothic.errors import HandleError
from apothic.values import (
    AppManifest,
    ClassInstanceHandle,
    ClassSpec,
    CloseReport,
    HookResult,
    InstanceInfo,
    digest_of,
)

HANDLE = ClassInstanceHandle(
    cluster_id="c", app="a", cls="B", instance_id="i", spec_digest="d", named=True
)


@given(st.builds(ClassInstanceHandle))
def test_handles_survive_every_form(handle: ClassInstanceHandle) -> None:
    parse = ClassInstanceHandle.parse
    assert parse(handle) is handle
    assert parse(handle.model_dump()) == handle
    assert parse(handle.model_dump_json()) == handle
    assert parse(json.dumps(handle.model_dump(), indent=2)) == handle
    assert pickle.loads(pickle.dumps(handle)) == handle


def test_values_are_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        HANDLE.app = "other"  # type: ignore[misc]
    assert hash(HANDLE) == hash(HANDLE.model_copy())


TAMPERED = [
    {"app": None},
    {"named": "perhaps"},
    {"schema_version": 2},
    {"actor": "extra"},
    {"instance_id": 5},
    {"spec_digest": ["d"]},
]


@pytest.mark.parametrize("change", TAMPERED, ids=repr)
def test_altered_handles_say_where(change: dict[str, object]) -> None:
    altered = {**HANDLE.model_dump(), **change}
    for form in (altered, json.dumps(altered)):
        with pytest.raises(HandleError, match=rf"malformed: {next(iter(change))}: .*unaltered"):
            ClassInstanceHandle.parse(form)


@pytest.mark.parametrize(
    "left_out", [name for name in HANDLE.model_dump() if name != "schema_version"]
)
def test_incomplete_handles(left_out: str) -> None:
    incomplete = {k: v for k, v in HANDLE.model_dump().items() if k != left_out}
    with pytest.raises(HandleError, match=left_out):
        ClassInstanceHandle.parse(incomplete)


def test_long_nonsense_is_shortened() -> None:
    with pytest.raises(HandleError) as caught:
        ClassInstanceHandle.parse("x" * 10_000)
    assert len(str(caught.value)) < 600


def test_reports_and_infos_survive_json() -> None:
    report = CloseReport(
        closed=True,
        hooks=(HookResult(name="a", duration_s=0.5), HookResult(name="b", duration_s=1, error="x")),
    )
    assert CloseReport.model_validate_json(report.model_dump_json()) == report
    assert [hook.name for hook in report.failed_hooks] == ["b"]
    info = InstanceInfo(
        app="a", cls="b", instance_id="c", named=False, state="ready", spec_digest="d"
    )
    assert InstanceInfo.model_validate_json(info.model_dump_json()) == info


def test_digests_follow_content() -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})
    assert digest_of(b"x") != digest_of("x")


def test_manifests_survive_json() -> None:
    app = App("manifest")

    @app.cls(tags=["t"], metadata={"a": {"b": [1, None]}})
    class One:
        @method(tags=["m"])
        def m(self, a: int = 3) -> int:
            return a

    manifest = app.manifest()
    assert AppManifest.model_validate_json(manifest.model_dump_json()) == manifest
    spec = manifest.classes["One"]
    assert ClassSpec.model_validate_json(spec.model_dump_json()).digest == spec.digest
    assert app.manifest().deployment_id == manifest.deployment_id

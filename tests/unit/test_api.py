"""The front door: exports, light import, errors, bad input, reproducible pickles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import apothic
from apothic import Image, Retries, Secret
from apothic.errors import InvalidOptionError
from apothic.packing import _canonical


def test_every_export_loads() -> None:
    for name in apothic.__all__:
        assert getattr(apothic, name) is not None


def test_import_is_light() -> None:
    code = "import sys, apothic; print([m for m in ('ray','docker','numpy') if m in sys.modules])"
    for extra in ("", "; from apothic import App, Cls, Image, Secret"):
        line = code.replace("; print", extra + "; print")
        run = subprocess.run(
            [sys.executable, "-c", line], capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == "[]"


def test_secret_value_is_in_no_text() -> None:
    with pytest.raises(InvalidOptionError) as caught:
        Secret.create("NAME", {"A": 5, "hunter2 ": "x"})  # type: ignore[dict-item]
    assert "5" not in str(caught.value)
    assert repr(Secret("TOKEN")) == "Secret('TOKEN')"


def test_retry_delays() -> None:
    policy = Retries(5, initial_delay=1, backoff_coefficient=3, max_delay=10)
    assert [policy.delay_s(n) for n in (1, 2, 3, 4)] == [1, 3, 9, 10]
    assert Retries(1).delay_s(100000) == 60


def test_images_are_immutable() -> None:
    base = Image.debian_slim()
    assert base.pip_install("a").env(X=1) != base
    assert base.steps == ()
    assert base.apt_install("git").needs_container


def test_canonical_arguments() -> None:
    assert _canonical({"a": 1, "b": {2, 3}}) == _canonical({"b": {3, 2}, "a": 1})
    assert _canonical(["ab"]) != _canonical(["a", "b"])
    assert _canonical(1) != _canonical(True)
    assert _canonical((1,)) != _canonical([1])


def test_equal_code_has_equal_bytes_in_every_process(tmp_path: Path) -> None:
    script = tmp_path / "code.py"
    script.write_text(
        "from apothic import App, method\n"
        "app = App('same')\n"
        "class Base:\n    kind = 'b'\n"
        "@app.cls()\n"
        "class Box(Base):\n"
        "    @method()\n"
        "    def m(self, x):\n        return x in {'a', 'b', 'c', 'd', 'e'}\n"
        "print(app.manifest().deployment_id)\n"
    )
    ids = {
        subprocess.run(
            [sys.executable, str(script)],
            env={"PYTHONHASHSEED": str(seed), "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2, 3)
    }
    assert len(ids) == 1

"""Every verb that may wait has its twin under ``.aio``, on the class as well where the class has it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any, Final

import pytest

import apothic
from apothic import App, Cls, RemoteApp, Sandbox, Secret, Volume, method
from apothic.errors import AppNotFoundError, ConflictError, SecretNotFoundError, VolumeNotFoundError
from apothic.testing import FakeControlPlane, fake_engine
from apothic.twins import Twin

NEVER_WAIT: Final = {
    "App": {"cls", "sandbox", "local_entrypoint", "get_class", "get_sandbox"}
    | {"get_local_entrypoint"},
    "BoundCls": {"partial"},
    "Cls": {"partial", "has_method", "method_info", "blobs"},
    "RemoteApp": {"get_class", "get_sandbox", "manifest"},
    "Retries": {"delay_s"},
    "Sandbox": {"blobs", "same_as"},
    "SandboxExecStream": {"close", "aclose"},  # twins of one another
    "SandboxSession": {"has_method"},
    "Volume": {"cloud", "vast_local"},
}
SEAM: Final = {"ControlPlaneClient"}


def _is_value(cls: type[Any]) -> bool:
    return hasattr(cls, "model_fields") or issubclass(cls, BaseException)


def _verbs() -> list[tuple[type[Any], str]]:
    found = []
    for name in apothic.__all__:
        cls = getattr(apothic, name)
        if not inspect.isclass(cls) or _is_value(cls) or name in SEAM:
            continue
        for verb in dir(cls):
            static = inspect.getattr_static(cls, verb)
            if verb.startswith("_") or isinstance(static, type):
                continue
            if isinstance(static, (staticmethod, classmethod)) or inspect.isfunction(static):
                found.append((cls, verb))
    return [(cls, verb) for cls, verb in found if verb not in NEVER_WAIT.get(cls.__name__, ())]


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [
        (parameter.name, parameter.kind, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self"
    ]


def _faces(cls: type[Any]) -> type[Twin[Any]]:
    """Give the type of an instance's ``aio``, whose object need not be made for it."""
    made: Twin[Any] = inspect.getattr_static(cls, "aio").__get__(cls.__new__(cls), cls)
    return type(made)


@pytest.mark.parametrize(
    ("cls", "verb"), [pytest.param(c, v, id=f"{c.__name__}.{v}") for c, v in _verbs()]
)
def test_every_verb_has_a_twin(cls: type[Any], verb: str) -> None:
    twins: list[Any] = [_faces(cls)]
    if isinstance(inspect.getattr_static(cls, verb), (staticmethod, classmethod)):
        twins.append(cls.aio)
    for face in twins:
        twin = getattr(face, verb)
        assert (twin.__doc__ or "").strip()
        if (cls, verb) != (App, "run_local"):  # runs what the user wrote, on the caller's loop
            assert _parameters(twin) == _parameters(getattr(cls, verb))


def test_bound_twins_show_their_parameters() -> None:
    expected = list(inspect.signature(Secret.create).parameters)
    assert list(inspect.signature(Secret.aio.create).parameters) == expected
    assert list(inspect.signature(Secret("A").aio.create).parameters) == expected


app = App("twins")
app.sandbox(name="shell")


@app.cls(cpu=0, memory_mb=10)
class Box:
    @method()
    def ping(self) -> int:
        return 1


def test_look_ups() -> None:
    async def scenario(engine: FakeControlPlane) -> None:
        await app.aio.deploy()
        found = await Cls.aio.from_name("twins", "Box", client=engine)
        assert isinstance(found, Cls)
        assert (await Box.aio.from_name("twins", "Box")).name == "Box"
        async with await found.aio.new() as box:
            same = await Cls.aio.from_handle(box.handle_json, client=engine)
            assert await same.ping.aio.remote() == 1
            assert (await found.aio.from_handle(box.handle)).id == box.id
        for lookup in (App.aio.lookup, app.aio.lookup):
            assert isinstance(await lookup("twins", client=engine), RemoteApp)
        with pytest.raises(AppNotFoundError):
            await App.aio.lookup("nobody")
        assert (await Sandbox.aio.from_name("twins", "shell", client=engine)).name == "shell"
        assert (await app.get_sandbox("shell").aio.from_name("twins", "shell")).name == "shell"

    with fake_engine() as engine:
        asyncio.run(scenario(engine))


def test_secrets() -> None:
    async def scenario() -> None:
        secret = await Secret.aio.create("TOKEN", "hidden")
        with pytest.raises(ConflictError):
            await Secret.aio.create("TOKEN", "other")
        assert await Secret.aio.set("TOKEN", "other") == secret
        assert await Secret.aio.list() == [secret] == [await Secret.aio.from_name("TOKEN")]
        await secret.aio.delete()
        with pytest.raises(SecretNotFoundError):
            await secret.aio.delete()

    with fake_engine():
        asyncio.run(scenario())


def test_volumes() -> None:
    async def scenario(engine: FakeControlPlane) -> None:
        volume = await Volume.aio.create("data", size_gb=1)
        assert [found.name for found in await Volume.aio.list()] == ["data"]
        with pytest.raises(ConflictError):
            await Volume.aio.from_name("data", size_gb=2, client=engine)
        await volume.aio.delete()
        with pytest.raises(VolumeNotFoundError):
            await volume.aio.delete(client=engine)

    with fake_engine() as engine:
        asyncio.run(scenario(engine))


def test_values_are_as_they_were() -> None:
    assert Volume("a") == Volume("a")
    assert "aio" not in repr(Volume("a"))
    assert repr(Secret("A").aio) == "Secret('A').aio"
    assert isinstance(app.sandbox(name="box"), Sandbox)

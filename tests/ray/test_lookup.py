"""A deployed class is used by a process that has neither its code nor what its module imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apothic import Cls
from tests.support import driver_env

pytestmark = pytest.mark.ray

DEPENDENCY = """
class Amount:
    def __init__(self, value):
        self.value = value

def scale(amount, factor):
    return Amount(amount.value * factor)
"""

SERVICE = """
import lonely_dep
from apothic import App, Image, enter, exit, method

app = App("lookup")


@app.cls(
    cpu=0,
    memory_mb=10,
    image=Image.debian_slim().add_local_python_source("lonely_dep"),
    tags=["billing"],
    metadata={"owner": "us"},
)
class Service:
    '''Scales amounts.'''

    def __init__(self, factor: int = 2, *, unit: lonely_dep.Amount = lonely_dep.Amount(1)):
        self.factor = factor
        self.unit = unit

    @enter()
    def up(self):
        self.entered = True

    @exit()
    def down(self):
        pass

    @method(tags=["pure"])
    def times(self, value: int, *more: int) -> int:
        assert self.entered
        return sum(lonely_dep.scale(lonely_dep.Amount(v), self.factor).value for v in (value, *more))

    @method()
    def count(self, n: int):
        yield from range(n)


if __name__ == "__main__":
    print(app.deploy())
"""

LOOKER = """
import inspect
from apothic import Cls

try:
    import lonely_dep
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the looker must not have it")

cls = Cls.from_name("lookup", "Service")
assert cls.remote_only and cls.local_cls is None
assert cls.tags == ("billing",) and cls.metadata == {"owner": "us"}
assert cls.parameter_names == ("factor", "unit"), cls.parameter_names
assert str(cls.signature) == "(factor: int = 2, *, unit: lonely_dep.Amount = <Amount>)", cls.signature
parameters = cls.signature.parameters
assert parameters["unit"].kind is inspect.Parameter.KEYWORD_ONLY
assert [p.required for p in cls.parameters] == [False, False]
assert cls.method_names == ("times", "count")
assert cls.method_info("times").tags == ("pure",)
assert cls.enter_hook_names == ("up",) and cls.exit_hook_names == ("down",)
inst = cls.named("x")
assert inst.times.remote(3, 4) == 14
assert list(inst.count.remote_gen(3)) == [0, 1, 2]
assert cls.named("y", 5).times.remote(2) == 10
try:
    cls.named("z", 1, 2, 3)
except TypeError as error:
    print("REFUSED", error)
assert cls.inspect().instances == ("x", "y"), cls.inspect().instances
assert inst.close().hooks[0].name == "down"
cls.close_named("y")
print("SEEN")
"""


def run(script: Path, address: str, **extra: str) -> str:
    found = subprocess.run(
        [sys.executable, str(script)],
        env={**driver_env(address), **extra},
        cwd=script.parent,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_look_up_without_the_modules_dependencies(ray_cluster: str, tmp_path: Path) -> None:
    # Under "site-packages" it counts as installed, so that the class refers to it by name.
    dependency = tmp_path / "site-packages" / "lonely_dep"
    service, looker = tmp_path / "here" / "service.py", tmp_path / "there" / "looker.py"
    for path in (dependency, service.parent, looker.parent):
        path.mkdir(parents=True)
    (dependency / "__init__.py").write_text(DEPENDENCY)
    service.write_text(SERVICE)
    looker.write_text(LOOKER)
    with_dependency = {"PYTHONPATH": str(dependency.parent)}
    deployed = run(service, ray_cluster, **with_dependency)
    assert run(service, ray_cluster, **with_dependency) == deployed  # same content, same deployment
    said = run(looker, ray_cluster)
    assert "SEEN" in said
    assert "REFUSED Service: too many positional arguments" in said
    assert Cls.from_name("lookup", "Service").inspect().deployment_id == deployed.strip()
    assert "lonely_dep" not in os.listdir(looker.parent)

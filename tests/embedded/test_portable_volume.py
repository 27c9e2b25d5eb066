"""A portable volume lies under the root that the nodes share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import finish, running, start_driver

pytestmark = pytest.mark.ray

BODY = """
from apothic import Volume
os.environ["APOTHIC_SHARED_ROOT"] = LOG + "-root"
path = LOG + "-mount"
shared = App("shared")

@shared.cls(cpu=0, memory_mb=10, volumes={path: Volume.cloud("shared")})
class Writer:
    @method()
    def write(self, text):
        with open(path + "/file", "w") as file:
            file.write(text)

with Writer.new() as one:
    one.write.remote("portable")
print(open(os.environ["APOTHIC_SHARED_ROOT"] + "/volumes/shared/file").read())
Volume.from_name("shared").delete()
print(os.listdir(os.environ["APOTHIC_SHARED_ROOT"] + "/volumes"))
"""


def test_portable_volume_under_the_shared_root(tmp_path: Path) -> None:
    with running(start_driver(tmp_path, BODY, tmp_path / "log")) as driver:
        assert finish(driver).split() == ["portable", "[]"]

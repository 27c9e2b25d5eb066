"""What a session's actor reads of a definition without the models that checked it."""

from __future__ import annotations

import subprocess
import sys

from apothic import App, Image
from ray_backend.sandbox.plan import SandboxPlan, SessionOptions


def plan_of(**options: object) -> tuple[SandboxPlan, object]:
    spec = App("app").sandbox(name="s", **options).spec  # type: ignore[arg-type]
    plan = SandboxPlan("a:~s:1", "c", "1", False, spec.model_dump_json(), b"/", b"", "")
    return plan, spec


def test_a_plan_reads_what_the_definition_says() -> None:
    plan, spec = plan_of(
        cpu=2,
        memory_mb=300,
        network="internet",
        image=Image.from_registry("busybox"),
        metadata={"ratio": 0.1, "name": "ä"},
    )
    assert plan.spec == spec
    assert plan.spec_digest == plan.spec.digest
    assert (plan.app, plan.sandbox, plan.network) == ("app", "s", "internet")
    assert plan.options == SessionOptions(2, 300, None, 1, (), ())
    assert plan.image == "busybox"


def test_a_recipe_with_steps_is_a_recipe() -> None:
    recipe = Image.from_registry("busybox").run_commands("true")
    plan, _ = plan_of(image=recipe)
    assert plan.image == recipe


def test_a_sessions_actor_builds_no_models() -> None:
    code = "import sys, ray_backend.sandbox.actor; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"apothic.options", "apothic.image", "apothic.values"} & {*done.stdout.split()}

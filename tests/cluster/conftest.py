"""One cluster of five nodes with logical GPUs, in this process."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from apothic import App, Image, Sandbox, method
from apothic.backend import connect
from ray_backend.sandbox.engine.connection import Engine
from tests.cluster.recording import RecordingEngine
from tests.docker.support import left_of
from tests.support import eventually

IMAGE = Image.from_registry("apothic-test-busybox")
HERE = os.path.dirname(__file__)
MIB = 2**20

# A dead node is noticed within about a second, in place of Ray's half minute.
QUICK_DEATH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}

LABELS: dict[str, dict[str, str]] = {
    "t4": {
        "offer": "t4",
        "cost-per-hour-usd": "0.4",
        "cpu-ghz": "2.0",
        "country": "DE",
        "disk-gb": "50",
        "secure-cloud": "false",
    },
    "small": {"offer": "small", "cost-per-hour-usd": "1.5", "country": "FR", "vram-gb": "40"},
    "large": {
        "offer": "large",
        "cost-per-hour-usd": "8",
        "vram-gb": "80",
        "total-tflops": "39",
        "gpu-mem-bandwidth-gbps": "2039",
        "cpu-ghz": "3.5",
        "disk-bandwidth-mb-s": "3000",
        "internet-upload-mbps": "800",
        "internet-download-mbps": "900",
        "secure-cloud": "true",
        "verified": "true",
        "reliability": "0.995",
        "country": "US",
        "disk-gb": "2000",
    },
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run these before anything connects this process to the shared cluster."""
    items.sort(key=lambda item: not str(item.path).startswith(HERE))


class Nodes:
    """The cluster's nodes by a name of ours."""

    def __init__(self, cluster: Any, engine: RecordingEngine) -> None:
        self.cluster = cluster
        self.engine = engine
        self.by_name: dict[str, Any] = {}

    def add(self, name: str, environment: dict[str, str] | None = None, **options: Any) -> str:
        """Start a node, with more in its environment; give its id."""
        options = {"num_cpus": 4, "memory": 1024 * MIB, "object_store_memory": 80 * MIB, **options}
        with pytest.MonkeyPatch.context() as patch:
            for key, value in {"DOCKER_HOST": self.engine.url, **(environment or {})}.items():
                patch.setenv(key, value)
            self.by_name[name] = self.cluster.add_node(**options)
        return self.id(name)

    def add_offer(self, name: str, gpu: str | None = None, **options: Any) -> str:
        """Start a node that advertises offer ``name``, with the labels that it has in `LABELS`."""
        resources = {f"offer:{name}": 1.0}
        if gpu is not None:
            resources[f"accelerator_type:{gpu}"] = 1.0
        labels = {f"apothic.io/{key}": value for key, value in LABELS.get(name, {}).items()}
        labels.update(options.pop("labels", {}))
        key = options.pop("key", name)
        return self.add(key, resources=resources, labels=labels, **options)

    def id(self, name: str) -> str:
        """Give a node's id."""
        return str(self.by_name[name].node_id)

    def name(self, node_id: str | None) -> str:
        """Give a node's name."""
        return next((n for n, node in self.by_name.items() if node.node_id == node_id), "unknown")

    def are_free(self) -> bool:
        """Tell whether nothing holds CPUs, GPUs or memory on any node."""
        import ray

        from ray_backend.ray_api import free_resources

        free = free_resources()
        return all(
            free[node["NodeID"]].get(name) == amount
            for node in ray.nodes()
            if node["Alive"]
            for name, amount in node["Resources"].items()
            if name in ("CPU", "GPU", "memory")
        )

    def kill(self, name: str) -> None:
        """Kill a node's raylet as a lost machine would, and wait until the cluster knows."""
        import ray

        node = self.by_name[name]
        node_id = node.node_id
        (raylet,) = node.all_processes["raylet"]
        os.kill(raylet.process.pid, signal.SIGKILL)
        raylet.process.wait()
        eventually(
            lambda: not next(each["Alive"] for each in ray.nodes() if each["NodeID"] == node_id)
        )
        self.forget(name)

    def forget(self, name: str) -> None:
        """Clear up what is left of a node."""
        node = self.by_name.pop(name, None)
        if node is not None and node in self.cluster.worker_nodes:
            self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="package")
def nodes() -> Iterator[Nodes]:
    """Start five nodes and connect this process to them."""
    import ray
    from ray.cluster_utils import Cluster

    assert not ray.is_initialized(), "these tests run before the shared cluster, or by themselves"
    target = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    engine = RecordingEngine(target.removeprefix("unix://"))
    engine.start()
    found = Nodes(Cluster(shutdown_at_exit=True), engine)
    found.add("head", num_cpus=2, include_dashboard=False, _system_config=QUICK_DEATH)
    found.add_offer("t4", "T4", num_gpus=2)
    found.add_offer("small", "A100", num_gpus=1)
    found.add_offer(
        "large",
        "A100",
        num_gpus=2,
        num_cpus=16,
        memory=4096 * MIB,
        labels={"ray.io/availability-region": "us-east-1"},
    )
    found.add("bare", num_gpus=2, num_cpus=8, resources={"accelerator_type:L4": 1.0})
    ray.init(
        address=found.cluster.address,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield found
    ray.shutdown()
    found.cluster.shutdown()
    engine.stop()


_numbers = itertools.count()


@pytest.fixture
def define(nodes: Nodes) -> Iterator[Callable[..., Any]]:
    """Give a maker of small classes; afterwards no instance and no lease may be left."""

    def make(**options: Any) -> Any:
        app = App(f"cluster-{next(_numbers)}")

        class Probe:
            @method()
            def node(self) -> str:
                import ray

                return str(ray.get_runtime_context().get_node_id())

            @method()
            def pid(self) -> int:
                return os.getpid()

        return app.cls(**{"cpu": 0, "memory_mb": 10, **options})(Probe)

    yield make
    leave_nothing(nodes)


@pytest.fixture
def sandbox(nodes: Nodes, docker_engine: Engine) -> Iterator[Callable[..., Sandbox]]:
    """Give a maker of small sandboxes; afterwards no session and no container may be left."""
    app = App(f"boxes-{next(_numbers)}")

    def make(**options: Any) -> Sandbox:
        given = {"image": IMAGE, "cpu": 0, "memory_mb": 32, "name": f"s{next(_numbers)}"}
        return app.sandbox(**{**given, **options})

    yield make
    leave_nothing(nodes)
    eventually(lambda: not left_of(docker_engine, connect().cluster_id))


def leave_nothing(nodes: Nodes) -> None:
    """Wait until no actor is left and all nodes are free; remove what a failed test has left."""
    from ray_backend.manager import instance_names, stop_actor

    try:
        eventually(lambda: not instance_names())
        eventually(nodes.are_free)
    finally:
        for name in instance_names():
            stop_actor(name)

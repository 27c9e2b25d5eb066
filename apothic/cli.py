"""The `apothic` command: what is deployed, what lives, and closing it."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from apothic._version import __version__
from apothic.errors import ApothicError, InvalidOptionError, NotFoundError

if TYPE_CHECKING:
    from apothic.backend import ControlPlaneClient
    from apothic.sandbox_values import SandboxHandle, SandboxSessionInfo
    from apothic.values import ClassInstanceHandle, CloseReport, InstanceInfo

__all__ = ["main"]

EXIT_FAILED = 1
"""Exit status when the cluster refused or something failed; 2 is argparse's, for wrong usage."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status: 0, 1 when it failed, 2 when it was written wrongly."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(_Session(arguments), arguments)
        sys.stdout.flush()
    except ApothicError as error:
        print(f"apothic: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `apothic apps | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class _Session:
    """The connection, made when a command first needs it, and the way to print."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._base_url: str | None = getattr(arguments, "base_url", None)
        self._as_json: bool = getattr(arguments, "json", False)
        self._client: ControlPlaneClient | None = None

    @property
    def client(self) -> ControlPlaneClient:
        if self._client is None:
            from apothic.backend import connect

            # A look from the shell must not start a cluster of its own.
            default = None if os.environ.get("RAY_ADDRESS") else "auto"
            self._client = connect(None, self._base_url or default)
        return self._client

    def show(self, value: Any, text: Callable[[], str]) -> None:
        """Print a JSON value, or the text for people."""
        print(json.dumps(value, indent=2) if self._as_json else text())


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument(
        "--base-url",
        metavar="URL",
        help="the cluster: host:6379, ray://host:10001 or auto; without it RAY_ADDRESS, else auto",
    )
    common.add_argument("--json", action="store_true", help="print JSON")
    parser = argparse.ArgumentParser(
        prog="apothic", parents=[common], description="Look after the apps of a Ray cluster."
    )
    parser.add_argument("--version", action="version", version=f"apothic {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[_Session, argparse.Namespace], None], text: str, under: Any = None
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = (under or verbs).add_parser(
            name, parents=[common], help=text, description=text
        )
        made.set_defaults(run=run)
        return made

    add("apps", _apps, "list the deployed apps, their classes and sandboxes")

    instances = add("instances", _instances, "list live instances")
    instances.add_argument("of", nargs="?", metavar="APP[:CLASS]", help="only these")

    sandboxes = add("sandboxes", _sandboxes, "list live sessions of sandboxes")
    of_sandboxes = sandboxes.add_subparsers(dest="sandboxes_verb", metavar="COMMAND")
    listed = add("list", _sandboxes, "list live sessions of sandboxes", of_sandboxes)
    listed.add_argument("of", nargs="?", metavar="APP[:SANDBOX]", help="only these")
    text = "describe a sandbox or a live session, as JSON"
    described = add("inspect", _sandboxes_inspect, text, of_sandboxes)
    described.add_argument("what", metavar="APP:SANDBOX[:ID]")
    text = "close a session: end its programs and remove its container"
    ended = add("close", _sandboxes_close, text, of_sandboxes)
    ended.add_argument("session", metavar="APP:SANDBOX:ID")

    inspect = add("inspect", _inspect, "describe an app, a class or a live instance, as JSON")
    inspect.add_argument("what", metavar="APP[:CLASS[:ID]]")

    close = add("close", _close, "close an instance, with its exit hooks")
    close.add_argument("instance", metavar="APP:CLASS:ID")

    secrets = verbs.add_parser("secrets", help="list, create and delete secrets").add_subparsers(
        dest="secrets_verb", required=True, metavar="COMMAND"
    )
    add("list", _secrets_list, "list the names of the stored secrets", secrets)
    create = add(
        "create",
        _secrets_create,
        "store a secret; its value comes from standard input or the environment, never from here",
        secrets,
    )
    create.add_argument("name", metavar="NAME")
    create.add_argument(
        "--from-env",
        action="append",
        metavar="VARIABLE",
        help="take this variable, under its own name; may be repeated",
    )
    create.add_argument("--replace", action="store_true", help="replace one of the same name")
    delete = add("delete", _secrets_delete, "remove a secret", secrets)
    delete.add_argument("name", metavar="NAME")

    volumes = add("volumes", _volumes, "list the volumes")
    of_volumes = volumes.add_subparsers(dest="volumes_verb", metavar="COMMAND")
    add("list", _volumes, "list the volumes", of_volumes)
    doomed = add("delete", _volumes_delete, "remove a volume and its files", of_volumes)
    doomed.add_argument("name", metavar="NAME")

    text = "list the kinds of nodes, or which of them could run a class or a sandbox"
    offers = add("offers", _offers, text)
    offers.add_argument("--for", dest="of", metavar="APP:NAME", help="the class or sandbox")
    types = offers.add_subparsers(dest="offers_verb", metavar="COMMAND")
    register = add(
        "register",
        _offers_register,
        "make the node types of a cluster-launcher file known, so that they can be started",
        types,
    )
    register.add_argument("file", metavar="CLUSTER.YAML")
    unregister = add("unregister", _offers_unregister, "forget a node type", types)
    unregister.add_argument("name", metavar="NAME")
    return parser


# -- what is there -------------------------------------------------------------------------------


def _apps(session: _Session, arguments: argparse.Namespace) -> None:
    manifests = [session.client.find_app(name) for name in session.client.list_apps()]
    value = [
        {
            "app": manifest.name,
            "deployment_id": manifest.deployment_id,
            "classes": {name: list(spec.tags) for name, spec in manifest.classes.items()},
            "sandboxes": {name: list(spec.tags) for name, spec in manifest.sandboxes.items()},
        }
        for manifest in manifests
    ]
    rows = [
        (f"{manifest.name}:{name}", kind, _names(tags), manifest.deployment_id)
        for manifest in manifests
        for kind, tags_of in (
            ("class", {name: spec.tags for name, spec in manifest.classes.items()}),
            ("sandbox", {name: spec.tags for name, spec in manifest.sandboxes.items()}),
        )
        for name, tags in tags_of.items()
    ]
    head = ("NAME", "KIND", "TAGS", "DEPLOYMENT")
    session.show(value, lambda: _table(head, rows, "no app is deployed"))


def _instances(session: _Session, arguments: argparse.Namespace) -> None:
    app, cls, _ = _split(arguments.of, "APP[:CLASS]") if arguments.of else (None, None, None)
    found = session.client.list_instances(app, cls)
    rows = [
        (
            f"{info.app}:{info.cls}:{info.instance_id}",
            "named" if info.named else "leased",
            info.state,
            str(info.restarts),
            str(info.pid or ""),
            (info.node_id or "")[:12],
            _names(info.tags),
        )
        for info in found
    ]
    head = ("INSTANCE", "LIVES", "STATE", "RESTARTS", "PID", "NODE", "TAGS")
    session.show(
        [info.model_dump(mode="json") for info in found],
        lambda: _table(head, rows, "no instance lives"),
    )


def _inspect(session: _Session, arguments: argparse.Namespace) -> None:
    app, cls, instance_id = _split(arguments.what)
    value: dict[str, Any]
    if instance_id is not None and cls is not None:
        value = _find_instance(session, app, cls, instance_id).model_dump(mode="json")
    elif cls is not None:
        from apothic.cls import Cls

        value = Cls.from_name(app, cls, client=session.client).inspect().model_dump(mode="json")
    else:
        manifest = session.client.find_app(app)
        value = {**manifest.model_dump(mode="json"), "deployment_id": manifest.deployment_id}
    print(json.dumps(value, indent=2))


def _find_instance(session: _Session, app: str, cls: str, instance_id: str) -> InstanceInfo:
    """Ask a ready instance how it is; of another, tell what the cluster knows without asking it."""
    for info in session.client.list_instances(app, cls):
        if info.instance_id == instance_id and info.state != "ready":
            return info
    ref = session.client.attach(_handle(session, app, cls, instance_id))
    try:
        return ref.inspect()
    finally:
        if not ref.handle.named:
            ref.release()


def _close(session: _Session, arguments: argparse.Namespace) -> None:
    app, cls, instance_id = _split(arguments.instance)
    if cls is None or instance_id is None:
        raise InvalidOptionError(
            f"{arguments.instance!r} names no instance: write APP:CLASS:ID, as `apothic instances` "
            f"lists them."
        )
    report = session.client.attach(_handle(session, app, cls, instance_id)).close()
    session.show(report.model_dump(mode="json"), lambda: _close_text(arguments.instance, report))


def _close_text(name: str, report: CloseReport) -> str:
    lines = [f"closed {name}" if report.closed else f"{name}: {report.note or 'nothing to close'}"]
    for hook in report.hooks:
        lines.append(f"  exit hook {hook.name}: {hook.error or 'done'} ({hook.duration_s:.3f} s)")
    if report.interrupted_calls:
        lines.append(f"  interrupted calls: {report.interrupted_calls}")
    if report.closed and report.note:
        lines.append(f"  {report.note}")
    return "\n".join(lines)


def _handle(session: _Session, app: str, cls: str, instance_id: str) -> ClassInstanceHandle:
    from apothic.values import ClassInstanceHandle

    return ClassInstanceHandle(
        cluster_id=session.client.cluster_id,
        app=app,
        cls=cls,
        instance_id=instance_id,
        spec_digest="",
        named=True,
    )


# -- sandboxes -----------------------------------------------------------------------------------


def _sandboxes(session: _Session, arguments: argparse.Namespace) -> None:
    of = getattr(arguments, "of", None)
    app, name, _ = _split(of, "APP[:SANDBOX]") if of else (None, None, None)
    found = session.client.list_sandboxes(app, name)
    rows = [
        (
            f"{info.app}:{info.sandbox}:{info.sandbox_id}",
            "named" if info.named else "leased",
            info.state,
            str(info.restarts),
            (info.node_id or "")[:12],
            info.network or "",
        )
        for info in found
    ]
    head = ("SESSION", "LIVES", "STATE", "RESTARTS", "NODE", "NETWORK")
    session.show(
        [info.model_dump(mode="json") for info in found],
        lambda: _table(head, rows, "no session lives"),
    )


def _sandboxes_inspect(session: _Session, arguments: argparse.Namespace) -> None:
    from apothic.sandbox import Sandbox

    app, name, sandbox_id = _split(arguments.what, "APP:SANDBOX[:ID]")
    if name is None:
        raise InvalidOptionError(
            f"{arguments.what!r} names no sandbox: write APP:SANDBOX or APP:SANDBOX:ID."
        )
    if sandbox_id is None:
        value = Sandbox.from_name(app, name, client=session.client).inspect()
        print(json.dumps(value.model_dump(mode="json"), indent=2))
    else:
        info = _find_session(session, _sandbox_handle(session, app, name, sandbox_id))
        print(json.dumps(info.model_dump(mode="json"), indent=2))


def _find_session(session: _Session, handle: SandboxHandle) -> SandboxSessionInfo:
    """Ask a ready session how it is; of another, tell what the cluster knows without asking it."""
    for info in session.client.list_sandboxes(handle.app, handle.sandbox):
        if info.sandbox_id == handle.sandbox_id and info.state != "ready":
            return info
    ref = session.client.attach_sandbox(handle)
    try:
        return ref.inspect()
    finally:
        if not ref.handle.named:
            ref.release()


def _sandboxes_close(session: _Session, arguments: argparse.Namespace) -> None:
    app, name, sandbox_id = _split(arguments.session, "APP:SANDBOX:ID")
    if name is None or sandbox_id is None:
        raise InvalidOptionError(
            f"{arguments.session!r} names no session: write APP:SANDBOX:ID, as `apothic sandboxes` "
            f"lists them."
        )
    handle = _sandbox_handle(session, app, name, sandbox_id)
    report = session.client.attach_sandbox(handle).close()
    session.show(report.model_dump(mode="json"), lambda: _close_text(arguments.session, report))


def _sandbox_handle(session: _Session, app: str, name: str, sandbox_id: str) -> SandboxHandle:
    from apothic.sandbox_values import SandboxHandle

    return SandboxHandle(
        cluster_id=session.client.cluster_id,
        app=app,
        sandbox=name,
        sandbox_id=sandbox_id,
        spec_digest="",
        named=True,
    )


# -- secrets and volumes -------------------------------------------------------------------------


def _secrets_list(session: _Session, arguments: argparse.Namespace) -> None:
    names = session.client.list_secrets()
    session.show(names, lambda: "\n".join(names) or "no secret is stored")


def _secrets_create(session: _Session, arguments: argparse.Namespace) -> None:
    from apothic.secret import Secret

    value: str | dict[str, str]
    if arguments.from_env:
        missing = [name for name in arguments.from_env if name not in os.environ]
        if missing:
            raise InvalidOptionError(
                f"--from-env {missing[0]}: this environment has no such variable. Export it first."
            )
        value = {name: os.environ[name] for name in arguments.from_env}
    elif sys.stdin.isatty():
        value = getpass.getpass(f"value of {arguments.name}: ")
    else:
        value = sys.stdin.read().removesuffix("\n")
    if not value:
        raise InvalidOptionError(
            f"the value of secret {arguments.name!r} is empty. Write it to standard input, or name "
            f"variables with --from-env."
        )
    store = Secret.set if arguments.replace else Secret.create
    store(arguments.name, value, client=session.client)
    session.show({"secret": arguments.name}, lambda: f"stored secret {arguments.name}")


def _secrets_delete(session: _Session, arguments: argparse.Namespace) -> None:
    from apothic.secret import Secret

    Secret.from_name(arguments.name).delete(client=session.client)
    session.show({"secret": arguments.name}, lambda: f"deleted secret {arguments.name}")


def _volumes(session: _Session, arguments: argparse.Namespace) -> None:
    found = session.client.list_volumes()
    value = [
        {"name": each.name, "backend": each.backend, "size_gb": each.size_gb} for each in found
    ]
    rows = [
        (each.name, each.backend, "" if each.size_gb is None else f"{each.size_gb:g}")
        for each in found
    ]
    session.show(
        value, lambda: _table(("VOLUME", "BACKEND", "SIZE GB"), rows, "no volume is recorded")
    )


def _volumes_delete(session: _Session, arguments: argparse.Namespace) -> None:
    from apothic.volume import Volume

    Volume.from_name(arguments.name).delete(client=session.client)
    session.show({"volume": arguments.name}, lambda: f"deleted volume {arguments.name}")


# -- placement -----------------------------------------------------------------------------------


def _offers(session: _Session, arguments: argparse.Namespace) -> None:
    from apothic.cls import Cls
    from apothic.sandbox import Sandbox

    if arguments.of is None:
        text = session.client.offers_table()
    else:
        app, name, _ = _split(arguments.of, "APP:NAME")
        if name is None:
            raise InvalidOptionError(
                f"--for {arguments.of!r} names no class or sandbox: write APP:NAME."
            )
        if name in session.client.find_app(app).sandboxes:
            text = Sandbox.from_name(app, name, client=session.client).explain()
        else:
            text = session.client.explain(Cls.from_name(app, name, client=session.client).spec)
    session.show({"for": arguments.of, "table": text}, lambda: text)


def _offers_register(session: _Session, arguments: argparse.Namespace) -> None:
    from apothic.node_types import read_node_types

    found = read_node_types(arguments.file)
    session.client.register_node_types(found)
    names = [node_type.name for node_type in found]
    session.show({"registered": names}, lambda: f"registered {', '.join(names)}")


def _offers_unregister(session: _Session, arguments: argparse.Namespace) -> None:
    if not session.client.unregister_node_type(arguments.name):
        known = ", ".join(each.name for each in session.client.list_node_types()) or "none"
        raise NotFoundError(
            f"no node type {arguments.name!r} is registered: registered are {known}. Check the name."
        )
    session.show({"unregistered": arguments.name}, lambda: f"unregistered {arguments.name}")


# -- text ----------------------------------------------------------------------------------------


def _split(name: str, form: str = "APP[:CLASS[:ID]]") -> tuple[str, str | None, str | None]:
    """Split a name of at most as many parts as its form has; the others are None.

    An id may hold colons itself.
    """
    parts = name.split(":", 2)
    if not all(parts) or len(parts) > form.count(":") + 1:
        raise InvalidOptionError(f"{name!r} is not valid: it takes {form}. Write it like that.")
    return parts[0], parts[1] if len(parts) > 1 else None, parts[2] if len(parts) > 2 else None


def _names(names: Sequence[str]) -> str:
    return ",".join(names)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> str:
    """Lay out rows in columns; columns that hold nothing are left out."""
    if not rows:
        return empty
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[row[i] for i in kept] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )

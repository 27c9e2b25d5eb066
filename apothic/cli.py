"""The `apothic` command: what is deployed, what lives, and closing it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from apothic.errors import ApothicError, InvalidOptionError

if TYPE_CHECKING:
    from apothic.backend import ControlPlaneClient

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(prog="apothic", description=__doc__)
    parser.add_argument("--base-url", help="the cluster: host:6379, ray://host:10001, auto")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="deployed apps and live instances")
    explain = verbs.add_parser("explain", help="which nodes could run a class, and why not others")
    explain.add_argument("cls", metavar="APP:CLASS")
    inspect = verbs.add_parser("inspect", help="a class as JSON, with tags and metadata")
    inspect.add_argument("cls", metavar="APP:CLASS")
    offers = verbs.add_parser("offers", help="kinds of nodes, live ones and those to be started")
    offers.add_argument("--for", dest="cls", metavar="APP:CLASS", help="which could run a class")
    change = offers.add_subparsers(dest="change", metavar="{register,unregister}")
    register = change.add_parser("register", help="make node types known that are not started")
    register.add_argument("file", metavar="FILE", help="a cluster-launcher file, as for `ray up`")
    unregister = change.add_parser("unregister", help="forget such a node type")
    unregister.add_argument("name", metavar="NODE_TYPE")
    close = verbs.add_parser("close", help="close a named instance, with its exit hooks")
    close.add_argument("instance", metavar="APP:CLASS:ID")
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments)
    except ApothicError as error:
        print(f"apothic: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    from apothic.backend import connect
    from apothic.cls import Cls

    # A look from the shell must not start a cluster of its own.
    client = connect(None, arguments.base_url or "auto")
    if arguments.verb == "list":
        for app in client.list_apps():
            for name, spec in client.find_app(app).classes.items():
                print(f"{app}:{name}  {' '.join(spec.tags)}".rstrip())
        for info in client.list_instances():
            kind = "named" if info.named else "leased"
            print(f"{info.app}:{info.cls}:{info.instance_id}  {kind}")
        return 0
    if arguments.verb == "close":
        app, cls, instance_id = [*arguments.instance.split(":", 2), "", ""][:3]
        report = Cls.from_name(app, cls, client=client).close_named(instance_id)
        print(report.model_dump_json(indent=2))
        return 0
    if arguments.verb == "offers" and not arguments.cls:
        return _offers(client, arguments)
    app, _, cls = arguments.cls.partition(":")
    found = Cls.from_name(app, cls, client=client)
    print(
        found.explain()
        if arguments.verb in ("explain", "offers")
        else found.inspect().model_dump_json(indent=2)
    )
    return 0


def _offers(client: ControlPlaneClient, arguments: argparse.Namespace) -> int:
    if arguments.change == "register":
        from apothic.node_types import read_node_types

        found = read_node_types(arguments.file)
        client.register_node_types(found)
        print(f"registered: {', '.join(each.name for each in found)}")
    elif arguments.change == "unregister":
        if not client.unregister_node_type(arguments.name):
            known = ", ".join(each.name for each in client.list_node_types()) or "none"
            raise InvalidOptionError(
                f"no node type {arguments.name!r} is registered: registered are {known}. Check the name."
            )
        print(f"unregistered: {arguments.name}")
    else:
        print(client.offers_table())
    return 0

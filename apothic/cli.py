"""The `apothic` command: what is deployed, what lives, and closing it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from apothic.errors import ApothicError

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
    app, _, cls = arguments.cls.partition(":")
    found = Cls.from_name(app, cls, client=client)
    print(
        found.explain()
        if arguments.verb == "explain"
        else found.inspect().model_dump_json(indent=2)
    )
    return 0

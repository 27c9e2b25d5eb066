"""Sessions on this machine: `open_local`, behind `apothic.Sandbox.local` and the engine for tests.

`workspace` is the machine as a workspace, `supervisor` the process that starts and ends its programs,
`process` one of them, `files` its files, `reference` what runs a `SessionCore` on it in a thread.
"""

from __future__ import annotations

from apothic.local_session.reference import CoreRef, open_local

__all__ = ["CoreRef", "open_local"]

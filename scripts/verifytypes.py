"""Check that no public type of a package is unknown; print how many pyright calls ambiguous.

Usage: python scripts/verifytypes.py PACKAGE

Ambiguous ones are inferred, as the async twins are: every checker may infer them, but need not alike.
"""

from __future__ import annotations

import json
import subprocess
import sys


def main(package: str) -> int:
    """Run pyright and give the exit status."""
    command = [sys.executable, "-m", "pyright", "--verifytypes", package]
    run = subprocess.run(
        [*command, "--ignoreexternal", "--outputjson"], capture_output=True, text=True, check=False
    )
    found = json.loads(run.stdout)["typeCompleteness"]
    counts = found["exportedSymbolCounts"]
    print(
        f"verifytypes: {counts['withKnownType']} known, {counts['withAmbiguousType']} ambiguous, "
        f"{counts['withUnknownType']} unknown"
    )
    return 1 if counts["withUnknownType"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

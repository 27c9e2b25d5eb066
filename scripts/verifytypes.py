"""Check that every public type of a package is known, to every type checker alike.

Usage: python scripts/verifytypes.py PACKAGE
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
    for symbol in found["symbols"]:
        if symbol["isExported"] and not symbol["isTypeKnown"]:
            print(f"  {symbol['name']}")
    return 1 if counts["withUnknownType"] + counts["withAmbiguousType"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

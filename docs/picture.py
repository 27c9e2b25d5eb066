"""Draw a program's output as an SVG.

``make quickstart | python docs/picture.py > docs/quickstart.svg`` draws the README's picture.
"""

from __future__ import annotations

import re
import sys
from html import escape

CHARACTER_PX, LINE_PX, MARGIN_PX = 8.43, 20, 20
STYLE = """text { font: 14px ui-monospace, "DejaVu Sans Mono", Menlo, monospace }
.title { fill: #7ee787; font-weight: bold } .plain { fill: #e6edf3 } .trace { fill: #ffa198 }"""


def draw(lines: list[str]) -> str:
    """Give the SVG of some lines: unindented ones are titles, ``|`` begins a traceback."""
    width = max(map(len, lines)) * CHARACTER_PX + 2 * MARGIN_PX
    height = len(lines) * LINE_PX + 2 * MARGIN_PX
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img" '
        'xml:space="preserve">',
        f"<style>{STYLE}</style>",
        f'<rect width="{width:.0f}" height="{height}" rx="10" fill="#0d1117"/>',
    ]
    for number, line in enumerate(lines):
        kind = "trace" if line.startswith(("  |", "    |")) else "plain"
        kind = "title" if number and line and not line.startswith(" ") else kind
        y = MARGIN_PX + (number + 0.75) * LINE_PX
        parts.append(f'<text class="{kind}" x="{MARGIN_PX}" y="{y:g}">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Read the output, shorten its paths, and write the picture."""
    text = re.sub(r'File "[^"]*/', 'File "…/', sys.stdin.read())
    print(draw(text.strip().splitlines()), end="")


if __name__ == "__main__":
    main()

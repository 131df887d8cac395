"""Draw docs/assets/red.svg, a red finding as a terminal shows it: `python scripts/write_picture.py`.

The text is the output that README.md would quote: the finding in a checkpoint whose template lacks a space.
"""

from __future__ import annotations

import tempfile
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

from write_outputs import ROOT, failing_template, write_checkpoint

from pytest_mistral_lora.records.files import write_text

PICTURE = ROOT / "docs" / "assets" / "red.svg"
COMMAND = "$ pytest --mistral-golden --mistral-tokenizer my-mistral"
COLUMNS = 88
_LINE, _LETTER, _MARGIN = 19, 8.0, 16
_STYLE = """\
  .page { fill: #ffffff; stroke: #d0d7de; } text { fill: #1f2328; font: 13px/1 ui-monospace, SFMono-Regular, Menlo,
  Consolas, "DejaVu Sans Mono", monospace; white-space: pre; }
  .rule { fill: #b3261e; font-weight: bold; } .mark { fill: #8a5a00; font-weight: bold; } .quiet { fill: #57606a; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #30363d; } text { fill: #e6edf3; }
    .rule { fill: #ff9b8f; } .mark { fill: #f0c36d; } .quiet { fill: #9da7b3; }
  }"""


def picture() -> str:
    """Return the picture as SVG, which follows the colour scheme of its reader."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(folder / "checkpoints" / "my-mistral")
        text = failing_template(folder)
    lines = [(COMMAND, "quiet")]
    for line in text.rstrip("\n").split("\n"):
        lines += [(part, _style_of(line)) for part in _wrapped(line)]
    width, height = round(COLUMNS * _LETTER + 2 * _MARGIN), len(lines) * _LINE + 2 * _MARGIN
    spans = "\n".join(_line(number, line, style) for number, (line, style) in enumerate(lines))
    words = escape(" ".join(text.partition("\n")[0].split()), {'"': "&quot;"})
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{words}">
<style>
{_STYLE}
</style>
<rect class="page" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>
{spans}
</svg>
"""


def _wrapped(line: str) -> list[str]:
    """Return a line in parts that fit; the columns of a table are not broken."""
    return textwrap.wrap(line, COLUMNS, subsequent_indent="    ", drop_whitespace=False) or [""]


def _style_of(line: str) -> str:
    """Return the class of a line of the output; empty for plain text."""
    if line.startswith("ML"):
        return "rule"
    if line.lstrip().startswith(">"):
        return "mark"
    return "quiet" if line.lstrip().startswith("token ") else ""


def _line(number: int, line: str, style: str) -> str:
    kind = f' class="{style}"' if style else ""
    y = _MARGIN + (number + 1) * _LINE - 6
    return f'<text x="{_MARGIN}" y="{y}"{kind} xml:space="preserve">{escape(line)}</text>'


if __name__ == "__main__":
    write_text(PICTURE, picture())

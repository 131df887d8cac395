"""The prompts of real servers: record them, and write them down as docs/serving/README.md.

python scripts/write_server_scoreboard.py           the page, from what is recorded
python scripts/write_server_scoreboard.py --record NAME KIND=URL TOKENIZER SETTING [VERSION]
                                                    ask a running server, and record its prompts
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from server_records import RECORDED, ROOT, Judged, RecordedServer, read_recorded, record, server_target

from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.serving.servers import SERVERS

PAGE = RECORDED.parent / "README.md"

_INTRODUCTION = """\
# Scoreboard: the prompts of real servers

To find the setting that serves your model as it was trained, look at the lines of your server and tokenizer; to repeat
a line, start the server with its setting, and run

```console
$ mistral-lora serve-check vllm=http://127.0.0.1:8000 --tokenizer spm-v3
```

Made by `python scripts/write_server_scoreboard.py` from the answers of the servers themselves (`recorded/`), recorded
by `python scripts/write_server_scoreboard.py --record NAME KIND=URL TOKENIZER SETTING`. The weights are tiny and
random, the tokenizers are Mistral's own, and the rows are the packaged ones (`goldens/cases.json`); the last table has
the smallest row of each named deviation.

*Right* prompts have the ids of mistral-common. A prompt that differs as [a named deviation](../deviations.md) predicts
is counted under its name. By a `control-literal` anybody can forge a turn: it is ML906, an error, of each server but
the known builds of llama.cpp, which have no setting that prevents it. All else is a class of
[../rules.md](../rules.md). A server that hides its ids is compared by their number, and the cell begins with `#`. A
file for llama.cpp is that of its own converter, or written by the tests with the same fields, which the setting names.
Not recorded: servers on a GPU, quantised files, images, and SGLang, Text Generation Inference and Ollama, which have no
build that runs here."""


def page() -> str:
    """Return docs/serving/README.md."""
    judged = [one.judged() for one in read_recorded()]
    lines = [*_INTRODUCTION.splitlines(), "", *_summary(judged)]
    for tokenizer in sorted({one.recorded.tokenizer for one in judged}):
        lines += [
            "",
            f"## {tokenizer}, row by row",
            "",
            *_rows([one for one in judged if one.recorded.tokenizer == tokenizer]),
        ]
    lines += ["", *_deviations([one for one in judged if one.example_cells])]
    return "\n".join(lines) + "\n"


def _summary(judged: Sequence[Judged]) -> Iterator[str]:
    yield "## In short"
    yield ""
    yield "| server | setting | tokenizer | right | named deviations | refused, or other ids |"
    yield "|---|---|---|---|---|---|"
    for one in judged:
        cells, tokenizer = list(one.cells.values()), one.recorded.tokenizer
        right = sum(cell in ("right", "# right", "both refuse") for cell in cells)
        named = Counter(name for cell in cells if cell.startswith("as ") for name in cell[3:].split(", "))
        others = Counter(rule for cell in cells if "ML" in cell for rule in cell.removeprefix("# ").split(", "))
        yield (
            f"| {_title(one.recorded)} | {_cell(one.recorded.setting)} | {tokenizer} | {right} of {len(cells)} "
            f"| {_counted(named)} | {_counted(others)} |"
        )


def _title(recorded: RecordedServer) -> str:
    version = recorded.version
    return version if version[:1].isalpha() else f"{SERVERS[recorded.kind].title} {version}"


def _cell(text: str) -> str:
    return f"`{text}`" if text.startswith("-") else text


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _rows(judged: Sequence[Judged]) -> Iterator[str]:
    yield f"| row | {' | '.join(map(_setting, judged))} |"
    yield "|---|" + "---|" * len(judged)
    for name in judged[0].cells:
        yield f"| {name} | " + " | ".join(one.cells.get(name, "") for one in judged) + " |"


def _deviations(judged: Sequence[Judged]) -> Iterator[str]:
    yield "## The named deviations, each by its smallest row"
    yield ""
    yield "The row of [a deviation](../deviations.md) has a turn more here, so that the prompt has it. ML907 is a row"
    yield "that the server refuses, ML919 one whose request fails. A chat request has no weights: every server merges"
    yield "answers of unequal weight."
    yield ""
    settings = list(dict.fromkeys(_setting(one) for one in judged))
    yield f"| deviation | tokenizer | {' | '.join(settings)} |"
    yield "|---|---|" + "---|" * len(settings)
    cells = {
        (name, one.recorded.tokenizer, _setting(one)): "yes" if cell == f"as {name}" else cell
        for one in judged
        for name, cell in one.example_cells.items()
    }
    for name, tokenizer in sorted({place[:2] for place in cells}):
        yield f"| {name} | {tokenizer} | {' | '.join(cells.get((name, tokenizer, one), '') for one in settings)} |"


def _setting(one: Judged) -> str:
    return f"{_title(one.recorded)}<br>{_cell(one.recorded.setting)}"


def main() -> None:
    """Record prompts, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", nargs="+", metavar="WORD", help="NAME KIND=URL TOKENIZER SETTING [VERSION]")
    args = parser.parse_args()
    if args.record:
        name, server, tokenizer, setting, *version = args.record
        kind, _, url = server.partition("=")
        target = server_target(kind, url, tokenizer)
        sys.stdout.write(f"{record(target, ''.join(version), setting, name).relative_to(ROOT)}\n")
        return
    write_text(PAGE, page())


if __name__ == "__main__":
    main()

"""What other trainers make of rows: record it with the trainers themselves, and write it down as docs/scoreboard/.

    python scripts/write_scoreboard.py                            the pages, from what is recorded
    python scripts/write_scoreboard.py --record trl               run TRL on every checkpoint, and record what it makes
    python scripts/write_scoreboard.py --checkpoint spm-v3-hub D  make one of the checkpoints, as the folder D
    python scripts/write_scoreboard.py --check                    change nothing; exit 1 if a page is not up to date

A runner that is recorded has to be installed here, or in the environment of `mistral-lora runner setup NAME`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from textwrap import shorten

import scoreboard_layers
from scoreboard_records import (
    COLUMNS,
    DERIVED,
    HUB,
    PAGES,
    REAL_TOKENIZERS,
    RECORDED,
    ROOT,
    TOKENIZERS,
    Column,
    Recorded,
    cases,
    checkpoint,
    loaded,
    oracle,
    read_lines,
    record,
    record_real,
    tokenizer_file,
)

from pytest_mistral_lora.checkpoint.encoder import make_encoder
from pytest_mistral_lora.conformance.encoded import CLASSES
from pytest_mistral_lora.conformance.encoded.comparison import row_findings
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.runners import RUNNERS

OURS = "pytest-mistral-lora"


@cache
def our_findings(tokenizer: str) -> dict[str, list[Finding]]:
    """Return what is wrong with our own trainer's encoding of each case."""
    encoder = make_encoder("mistral-common", loaded(tokenizer_file(tokenizer)))
    found = {}
    for case in cases(tokenizer):
        encoded = encoder.encode(case.row)
        found[case.name] = list(row_findings(case.row, encoded.input_ids, encoded.labels or (), oracle(tokenizer)))
    return found


def board_page() -> str:
    """Return docs/scoreboard/README.md."""
    lines = [*_INTRODUCTION.splitlines(), "", *_configurations(), "", *_summary(), "", *_layers(), "", *_real(), ""]
    for tokenizer in TOKENIZERS:
        lines += [f"## {tokenizer}, row by row", "", *_cases_table(tokenizer), ""]
    return "\n".join(lines[:-1]) + "\n"


_INTRODUCTION = """\
# Scoreboard: ids and labels of other trainers

To find the faults of the trainer that you use, look at its line in the tables below; to repeat a column, run its
command:

```console
$ mistral-lora runner setup trl
$ mistral-lora audit --runner trl --tokenizer spm-v3
```

Made by `python scripts/write_scoreboard.py` from the output of the trainers themselves (`recorded/`), recorded by
`python scripts/write_scoreboard.py --record NAME` in the environments of `mistral-lora runner setup NAME`.
[../runners.md](../runners.md) explains how their rows are taken; [reproductions.md](reproductions.md) has the smallest
row that shows each difference.

mistral-common's encoding is right, with loss on the assistants' tokens alone. A cell has `sound` if ids and labels are
exactly that, else the rules that are broken: each is one class of [../rules.md](../rules.md). The rows are the packaged
ones (`goldens/cases.json`) that the tokenizer's version can encode. The trainers get a checkpoint folder with
`tokenizer.json`, made of the tokenizer file, and the chat template that mistral-common generates. A name that ends in
`-hub` is such a folder with Mistral's own file beside it, as in Mistral's repositories on the Hub; to make it, run
`python scripts/write_scoreboard.py --checkpoint NAME FOLDER`. A name that begins with `derived-` is a Tekken file of a
version that mistral-common knows and does not ship, derived from a shipped vocabulary; the same command writes it. If
your checkpoint has other files, its results may differ: the commands take any checkpoint as `--tokenizer`.

The configurations are each trainer's defaults for chat rows, and the variants that are listed. Not tried: other
templates, packing, several datasets, GPUs, and training itself. Ids and labels do not depend on the last two. None of
the configurations asks for answers of weight 0 to be masked, so `ML549` is not a fault of a trainer's code, but one of
its defaults. [../deviations.md](../deviations.md) lists the differences between the generated chat template and
mistral-common: a trainer that renders with it inherits them. ms-swift's templates for Small 3 and later have the date
of the recording in their ids.

`refused`: the trainer refuses a plain row, too, for the reason that follows. Beside mistral-common, transformers takes
`tekken.json` in place of `tokenizer.json`, and has no chat template ([ML236](../rules.md#ml236)): so TRL and Axolotl
refuse the Tekken folders, but for `axolotl-mistral-common`, which needs Mistral's file. TRL takes `tokenizer.json` if
the folder has a processor, as below. LLaMA-Factory renders a system message alone to read a checkpoint's template, and
those of versions 1 and 3 write none without a user message. It takes the BOS into each turn if `tokenizer.json` puts
none before a text, as here: with one that does, 24 of 46 rows are sound on `derived-v13-hub`."""


def _configurations() -> Iterator[str]:
    yield "## Configurations"
    yield ""
    yield "| configuration | description | versions | recorded | command for one column |"
    yield "|---|---|---|---|---|"
    for column in COLUMNS:
        link = f"[{column.name}](../../{column.config.relative_to(ROOT).as_posix()})"
        runs = column.recorded.items()
        versions = _grouped({name: _versions(one.environment) for name, one in runs})
        dates = _grouped({name: one.date for name, one in runs})
        yield f"| {link} | {column.about} | {versions} | {dates} | `{column.command('TOKENIZER')}` |"
    yield f"| {OURS} | this package's own trainer, `backend: mistral-common` | | | `mistral-lora train recipe.yaml` |"


def _grouped(by_tokenizer: dict[str, str]) -> str:
    """Return the value of all tokenizers, or each value with its tokenizers."""
    groups: dict[str, list[str]] = {}
    for tokenizer, value in by_tokenizer.items():
        groups.setdefault(value, []).append(tokenizer)
    several = len(groups) > 1
    return "<br>".join(f"{', '.join(names)}: {value}" if several else value for value, names in groups.items())


def _versions(environment: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in environment.items() if version != "not installed")


def _summary() -> Iterator[str]:
    yield "## In short"
    yield ""
    yield f"| configuration | {' | '.join(TOKENIZERS)} |"
    yield "|---|" + "---|" * len(TOKENIZERS)
    for column in COLUMNS:
        runs = column.recorded
        cells = [_short(runs[name]) if name in runs else "not run" for name in TOKENIZERS]
        yield f"| {column.name} | {' | '.join(cells)} |"
    yield f"| {OURS} | {' | '.join(_counted(our_findings(name)) for name in TOKENIZERS)} |"


def _short(one: Recorded) -> str:
    reason = one.refused.rpartition("a plain row is refused, too: ")[2]
    return f"refused: {_cell(reason)}" if reason else _counted(one.findings)


def _counted(findings: dict[str, list[Finding]]) -> str:
    sound = sum(not found for found in findings.values())
    counts = Counter(finding.rule for found in findings.values() for finding in found)
    classes = "".join(f"<br>{CLASSES[rule]} {count}" for rule, count in sorted(counts.items()))
    return f"{sound} of {len(findings)} sound{classes}"


def _layers() -> Iterator[str]:
    yield "## Which layers get an adapter"
    yield ""
    yield from _LAYERS.splitlines()
    yield ""
    yield from scoreboard_layers.table()


_LAYERS = """\
Each trainer, started on a tiny `Mistral3ForConditionalGeneration` around the text model in the head of the column
(Small 3.2: mistral; Ministral 3: ministral3; Small 4: mistral4) and stopped before its first step: the layers of the
text model that it adapts, and in bold those elsewhere, which rows of text give no gradient. The folder has
`tekken.json` and `tokenizer.json`, derived, as on the Hub; *tokenizer* is the class that the trainer loads. Axolotl is
given `tokenizer_use_mistral_common: true`: by default, it loads a tokenizer without a template from such a folder, and
refuses it. Recorded by `python scripts/scoreboard_layers.py PYTHON NAME`. In Small 4, four of the five layers of an
attention block have other names than `q_proj`, `k_proj`, `v_proj` and `o_proj`, and the MLP is experts beside shared
ones: see [../checkpoints.md](../checkpoints.md)."""


def _real() -> Iterator[str]:
    yield "## On real dialogues"
    yield ""
    yield "All English dialogues of the package chatterbot-corpus, as user and assistant by turns, recorded by"
    yield "`python scripts/write_scoreboard.py --record NAME --real`. No row of them was written to be difficult. A"
    yield "configuration that refuses the tokenizer above has no line."
    yield ""
    yield "| configuration | tokenizer | version | recorded | rows | sound | broken rules, in how many places |"
    yield "|---|---|---|---|---|---|---|"
    for column in COLUMNS:
        for tokenizer in REAL_TOKENIZERS:
            file = RECORDED / column.name / f"{tokenizer}-real.json"
            if file.is_file():
                [data] = read_lines(file)
                classes = ", ".join(f"{CLASSES[rule]} {count}" for rule, count in data["classes"].items())
                run = f"{tokenizer} | {column.runner.title} {data['version']} | {data['date']}"
                yield f"| {column.name} | {run} | {data['rows']} of {data['of']} | {data['sound']} | {classes} |"


def _cases_table(tokenizer: str) -> Iterator[str]:
    columns = {column.name: column.recorded.get(tokenizer) for column in COLUMNS}
    found = {name: one.findings for name, one in columns.items() if one is not None and not one.refused}
    found[OURS] = our_findings(tokenizer)
    yield f"| row | {' | '.join(found)} |"
    yield "|---|" + "---|" * len(found)
    for case in cases(tokenizer):
        cells = [_rules(findings[case.name]) for findings in found.values()]
        yield f"| {case.name} | {' | '.join(cells)} |"


def _rules(findings: list[Finding]) -> str:
    return " ".join(f"[{f.rule}](../rules.md#{f.rule.lower()})" for f in findings) or "sound"


def _cell(text: str) -> str:
    return shorten(text, 200, placeholder=" ...").replace("|", "\\|")


def reproductions_page() -> str:
    """Return docs/scoreboard/reproductions.md: the smallest row that shows each difference of each configuration."""
    lines = ["# The smallest row that shows each difference", "", *_REPRODUCTIONS.splitlines()]
    for column in COLUMNS:
        found = sorted(_smallest(column).items())
        config = column.config.read_text(encoding="utf-8")
        lines += ["", f"## {column.name}", "", f"```yaml\n{config}```"] if found else []
        for rule, (tokenizer, finding) in found:
            versions = _versions(column.recorded[tokenizer].environment)
            lines += ["", f"### {column.name}: {CLASSES[rule]} ({rule}), on {tokenizer}", "", versions, ""]
            lines += [f"```console\n$ {column.command(tokenizer)} --dataset row.jsonl\n```", ""]
            lines += [f"```json\n{finding.row}\n```", "", f"{_sentence(finding)}", ""]
            lines += ["```text", *finding.detail.splitlines(), "```"] if finding.detail else []
    return "\n".join(lines).rstrip("\n") + "\n"


def _sentence(finding: Finding) -> str:
    return finding.found + (f"; expected: {finding.expected}" if finding.expected else "")


_REPRODUCTIONS = """\
To reproduce a difference, save the row as `row.jsonl` and run the command. Each section has the configuration, the row,
and the tokens: those of mistral-common, and those of the trainer. `python scripts/write_scoreboard.py` makes this page
from the output of the trainers."""


def _smallest(column: Column) -> dict[str, tuple[str, Finding]]:
    """Return for each rule that a configuration breaks the finding with the shortest row, and its tokenizer."""
    every = [
        (finding, tokenizer)
        for tokenizer, one in column.recorded.items()
        for found in one.findings.values()
        for finding in found
    ]
    shortest: dict[str, tuple[str, Finding]] = {}
    # a derived file has to be made first: where a shipped one shows the difference, it is taken
    for finding, tokenizer in sorted(every, key=lambda pair: (pair[1].removesuffix(HUB) in DERIVED, len(pair[0].row))):
        shortest.setdefault(finding.rule, (tokenizer, finding))
    return shortest


def main() -> int:
    """Record, or write the pages, or say which are not up to date (exit code 1)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", choices=[*RUNNERS], help="run this runner, and record what it makes")
    parser.add_argument("--real", action="store_true", help="with --record, on real dialogues")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is not up to date")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="with --record, these configurations or checkpoints")
    parser.add_argument("--checkpoint", nargs=2, metavar=("NAME", "FOLDER"), help="make a checkpoint of the scoreboard")
    given = parser.parse_args()
    if given.checkpoint:
        print(checkpoint(given.checkpoint[0], Path(given.checkpoint[1])))
        return 0
    for column in COLUMNS if given.record else ():
        for tokenizer in REAL_TOKENIZERS if given.real else TOKENIZERS:
            chosen = not given.only or {column.name, tokenizer} & set(given.only)
            if column.runner.name == given.record and chosen:
                print(f"{column.name} on {tokenizer}", flush=True)
                (record_real if given.real else record)(column, tokenizer)
    return _write(check=given.check)


def pages() -> dict[str, str]:
    """Return every page by its name."""
    return {"README.md": board_page(), "reproductions.md": reproductions_page()}


def _write(*, check: bool) -> int:
    stale = 0
    for name, text in pages().items():
        path = PAGES / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale += 1
            print(f"scoreboard/{name} {'is not up to date' if check else 'written'}")
            if not check:
                write_text(path, text)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

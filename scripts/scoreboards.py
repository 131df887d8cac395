"""The scoreboards of trainers, servers and answers: record what programs make of packaged cases, and write the tables.

    python scripts/scoreboards.py write                    every table in docs/, from what is recorded
    python scripts/scoreboards.py write prompts --check    exit 1 if the tables of a board are not up to date
    python scripts/scoreboards.py record rows pairs --trainer trl
                                                           run a trainer on every checkpoint, and record the verdicts
    python scripts/scoreboards.py record prompts --server vllm=http://127.0.0.1:8000 --tokenizer spm-v3
        --setting="--tokenizer-mode mistral" --name vllm-mistral
                                                           ask a running server, and record its prompts
    python scripts/scoreboards.py checkpoint spm-v3-hub D  make a checkpoint of the boards, as the folder D

The boards of trainers are rows, pairs (preferences), real (dialogues that nobody wrote to be difficult), prepared (the
folders that a trainer prepares, judged without messages) and layers (those that get an adapter). A trainer has to be
installed here, or in the environment of `mistral-lora runner setup NAME`.

The boards of servers are prompts and answers. For answers, TOKENIZER is a folder or a file, and the server has a probe
of it: `mistral-lora export DIR --to llamacpp --probe --output probe`. A server that cannot be asked by ids needs
`--probe probe`, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from boards import answers, layers, prepared, prompts, trainer_runs
from boards.inputs import DOCS, PAIR_TOKENIZERS, REAL_TOKENIZERS, ROOT, TOKENIZERS, checkpoint
from boards.pages import BOARDS, filled, page_of
from boards.servers import RunningServer
from boards.trainers import CONFIGURATIONS, PAIR_CONFIGURATIONS

from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.runners import TRAINERS

_OF_TRAINERS = {
    "rows": (trainer_runs.record, CONFIGURATIONS, TOKENIZERS),
    "pairs": (trainer_runs.record, PAIR_CONFIGURATIONS, PAIR_TOKENIZERS),
    "real": (trainer_runs.record_real, CONFIGURATIONS, REAL_TOKENIZERS),
    "prepared": (prepared.record, CONFIGURATIONS, REAL_TOKENIZERS),
}
"""How each board of trainers is recorded, with its configurations and tokenizers."""
_OF_SERVERS = {"prompts": prompts.record, "answers": answers.record}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    write = actions.add_parser("write", help="write the tables of the pages in docs/")
    write.add_argument("boards", nargs="*", metavar="BOARD", help=f"{', '.join(BOARDS)}; all of them without a name")
    write.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is not up to date")
    record = actions.add_parser("record", help="run a trainer or ask a server, and record the verdicts")
    record.add_argument("boards", nargs="+", metavar="BOARD", help=", ".join(BOARDS))
    trainers = [name for name, runner in TRAINERS.items() if not runner.is_evaluation]
    record.add_argument("--trainer", choices=trainers, help="the trainer to run")
    record.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these configurations or tokenizers")
    record.add_argument("--server", metavar="KIND=URL", help="the running server to ask")
    record.add_argument("--tokenizer", help="the tokenizer that the server has")
    record.add_argument("--setting", help="the files and options that decide what it makes")
    record.add_argument("--name", help="the name of the file of the record")
    record.add_argument("--version", default="", help="the version of a server that reports none")
    record.add_argument("--probe", type=Path, metavar="FOLDER", help="the exported probe that is served")
    made = actions.add_parser("checkpoint", help="make a checkpoint of the boards")
    made.add_argument("name", choices=TOKENIZERS, metavar="NAME", help=", ".join(TOKENIZERS))
    made.add_argument("folder", type=Path, metavar="FOLDER")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Write tables, record a program, or make a checkpoint.

    Args:
        words: The command line; that of the process by default.
    """
    parser = _parser()
    given = parser.parse_args(words)
    if given.action == "checkpoint":
        print(checkpoint(given.name, given.folder))
        return 0
    if unknown := [name for name in given.boards if name not in BOARDS]:
        parser.error(f"{unknown[0]!r} is not a board: {', '.join(BOARDS)}")
    if given.action == "write":
        return _write(given.boards or BOARDS, is_check=given.check)
    for board in given.boards:
        needed = ("server", "tokenizer", "setting", "name") if board in _OF_SERVERS else ("trainer",)
        if missing := [name for name in needed if not getattr(given, name)]:
            parser.error(f"to record {board}, add --{missing[0]}")
    for board in given.boards:
        _record(board, given)
    return 0


def _write(boards: Sequence[str], *, is_check: bool) -> int:
    stale = False
    for board in boards:
        page = DOCS / page_of(board)
        text = filled(board)
        if text != page.read_text(encoding="utf-8"):
            stale = True
            print(f"{page.relative_to(ROOT)}, {board}: {'is not up to date' if is_check else 'written'}")
            if not is_check:
                write_text(page, text)
    return int(is_check and stale)


def _record(board: str, given: argparse.Namespace) -> None:
    if board in _OF_SERVERS:
        named = (given.name, given.server, given.tokenizer, given.setting, given.version, given.probe)
        print(_OF_SERVERS[board](RunningServer(*named)))
    elif board == "layers":
        layers.record(given.trainer)
    else:
        record, configurations, tokenizers = _OF_TRAINERS[board]
        for configuration, tokenizer in product(configurations, tokenizers):
            is_chosen = not given.only or {configuration.name, tokenizer} & set(given.only)
            if configuration.runner.name == given.trainer and is_chosen:
                print(f"{board}: {configuration.name} on {tokenizer}", flush=True)
                record(configuration, tokenizer)


if __name__ == "__main__":
    sys.exit(main())

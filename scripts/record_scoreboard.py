"""Record what other trainers make of rows, with the trainers themselves: the verdicts behind docs/scoreboard/.

    python scripts/record_scoreboard.py trl                        run TRL on every checkpoint, and record the verdicts
    python scripts/record_scoreboard.py trl --pairs                the same on preference pairs
    python scripts/record_scoreboard.py trl --real                 the same on real dialogues
    python scripts/record_scoreboard.py trl --prepared             how the folders that TRL prepares are judged
    python scripts/record_scoreboard.py --checkpoint spm-v3-hub D  make one of the checkpoints, as the folder D

A runner that is recorded has to be installed here, or in the environment of `mistral-lora runner setup NAME`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from prepared_records import record_prepared
from scoreboard_records import (
    COLUMNS,
    PAIR_COLUMNS,
    PAIR_TOKENIZERS,
    REAL_TOKENIZERS,
    TOKENIZERS,
    checkpoint,
    record,
    record_real,
)

from pytest_mistral_lora.runners import RUNNERS


def main() -> None:
    """Record a runner, or make a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trainers = [name for name, runner in RUNNERS.items() if not runner.is_evaluation]
    parser.add_argument("runner", nargs="?", choices=trainers, help="run this runner, and record what it makes")
    parser.add_argument("--pairs", action="store_true", help="on preference pairs")
    parser.add_argument("--real", action="store_true", help="on real dialogues")
    parser.add_argument("--prepared", action="store_true", help="the folders that it prepares, without messages")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these configurations or checkpoints")
    parser.add_argument("--checkpoint", nargs=2, metavar=("NAME", "FOLDER"), help="make a checkpoint of the scoreboard")
    given = parser.parse_args()
    if given.checkpoint:
        print(checkpoint(given.checkpoint[0], Path(given.checkpoint[1])))
        return
    if not given.runner:
        parser.error("name a runner, or --checkpoint")
    write, columns, tokenizers = record, COLUMNS, TOKENIZERS
    if given.pairs:
        columns, tokenizers = PAIR_COLUMNS, PAIR_TOKENIZERS
    if given.real:
        write, tokenizers = record_real, REAL_TOKENIZERS
    if given.prepared:
        write, tokenizers = record_prepared, REAL_TOKENIZERS
    for column in columns:
        for tokenizer in tokenizers:
            is_chosen = not given.only or {column.name, tokenizer} & set(given.only)
            if column.runner.name == given.runner and is_chosen:
                print(f"{column.name} on {tokenizer}", flush=True)
                write(column, tokenizer)


if __name__ == "__main__":
    main()

"""`mistral-lora template`: a chat template that marks the assistant's text for a trainer."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pytest_mistral_lora.cli.verb import Verbs, add_json_option, add_oracle_option, add_tokenizer_option, add_verb
from pytest_mistral_lora.errors import EXIT_OK

SUMMARY = "write the official chat template with {% generation %} blocks"

_DESCRIPTION = """\
Write the official chat template of a tokenizer with {% generation %} blocks around the assistant's text. TRL needs them
for `assistant_only_loss`. The template renders every conversation byte for byte as before.

From version 13 on, a tokenizer has tokens for thinking if its model thinks. A file of version 11 does not show it, and
mistral-common's template writes thinking as text in <think> for every one: for a model that does not think
(Mistral-Small-3.2), add --no-thinking."""


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(
        verbs,
        "template",
        run,
        description=_DESCRIPTION,
        examples=("mistral-lora template --tokenizer checkpoints/my-mistral --output training.jinja",),
    )
    add_tokenizer_option(parser)
    add_oracle_option(parser)
    parser.add_argument("--no-thinking", action="store_true", help="refuse thinking in rows of version 11")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: standard output)")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Write the template to a file or to standard output."""
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer, training_template
    from pytest_mistral_lora.records.files import write_text

    text = training_template(CheckpointTokenizer(args.tokenizer, args.oracle), thinking=not args.no_thinking)
    if args.json:
        text = json.dumps({"tokenizer": str(args.tokenizer), "template": text}, ensure_ascii=False)
    if args.output:
        write_text(args.output, text)
    else:
        sys.stdout.write(f"{text}\n")
    return EXIT_OK

"""`mistral-lora serve-check`: the prompts that a running server feeds its model."""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_mistral_lora.cli.check import judge
from pytest_mistral_lora.cli.verb import Verbs, add_format_option, add_tokenizer_option, add_verb
from pytest_mistral_lora.conformance.named_targets import name_of
from pytest_mistral_lora.conformance.server_target import ServerChoice
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import InputError

SUMMARY = "check the prompts that a running server feeds its model"

_DESCRIPTION = """\
Send the packaged rows to a running server, and hold the prompts that it makes of them to mistral-common: ids, text that
becomes a control token, and refusals. How much an answer proves is printed: vLLM shows the ids that it fed, llama.cpp a
preview, and a server with OpenAI's API alone the number of tokens.

With --adapter or --golden, ask for the answers of golden transcripts, too, greedily: by the ids of their prompts and by
their messages. The precision of the weights, which decides how near a near tie is, may be named: vllm:bf16=URL.

Each row is one short request (one token, greedy). The key of the server is read from MISTRAL_SERVER_KEY. Plain http
goes to this machine alone."""


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(
        verbs,
        "serve-check",
        run,
        description=_DESCRIPTION,
        examples=(
            "mistral-lora serve-check llamacpp=http://127.0.0.1:8080 --tokenizer models/base",
            "mistral-lora serve-check llamacpp=http://127.0.0.1:8080 --tokenizer models/base --adapter lora-out",
            "mistral-lora serve-check vllm=https://models.example.org --tokenizer spm-v3 --model tuned",
        ),
        failure="a prompt is not that of mistral-common, or no check could judge anything",
    )
    parser.add_argument("server", metavar="NAME=URL", help="llamacpp, vllm or openai, and the address of the server")
    add_tokenizer_option(parser)
    parser.add_argument("--model", default="", metavar="NAME", help="model to ask (default: the first that it lists)")
    parser.add_argument(
        "--rows",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="rows to ask in place of the packaged ones (JSON Lines; repeatable)",
    )
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="adapter or merged folder that is served: replay its transcripts"
    )
    parser.add_argument(
        "--golden",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="transcripts to replay in place of those of --adapter (repeatable)",
    )
    add_format_option(parser)


def run(args: argparse.Namespace) -> int:
    """Check the server; return 1 if a check finds an error."""
    chosen = ServerChoice.parse(args.server)
    for path in (*args.rows, *args.golden, *([args.adapter] if args.adapter else [])):
        if not path.exists():
            raise InputError("no such file or folder", place=str(path))
    tokenizer = Target(name_of(args.tokenizer), args.tokenizer)
    asked = {"model": args.model, "rows": tuple(args.rows), "golden": tuple(args.golden)}
    return judge(
        [chosen.target(name_of(chosen.name), tokenizer, args.adapter, **asked)],
        args.output_format,
        command="serve-check",
    )

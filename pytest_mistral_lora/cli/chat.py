"""`mistral-lora chat`: ask a base, an adapter or a merged model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pytest_mistral_lora.cli.verb import (
    INPUT,
    Verb,
    add_device_option,
    print_json,
    whole_number,
)
from pytest_mistral_lora.errors import EXIT_OK, InputError, RowError, RowsError, counted
from pytest_mistral_lora.extras import require_extra
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.training.generate.chat_session import ChatAnswer, ChatSession

_DESCRIPTION = """\
Ask a model. Prompts are encoded by the backend of training, from the tokenizer in the adapter's folder, so that the
model gets the ids that it was trained on. Control tokens that you type stay text.

On a terminal, each line that you type continues the conversation; /new begins another one, and Ctrl-C stops an answer.
In a pipe, each line of standard input is a question of its own, and its answer is printed before the next line is read.

With --json, each answer is one JSON object on a line of its own: prompt, prompt_ids, ids, text and stop (eos, or
length if it was cut off)."""

_NEW = "/new"
"""Characters of a model's text that would move a terminal's cursor or set its title."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=INPUT, metavar="DIR", help="folder of an adapter, a merged model or a base")
    parser.add_argument(
        "--base", type=INPUT, metavar="DIR", help="base folder of an adapter (default: the base that the adapter names)"
    )
    parser.add_argument("--no-adapter", action="store_true", help="ask the base of the adapter, with the same prompts")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this, and end (default: read standard input)")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt (default: none)")
    parser.add_argument(
        "--max-new-tokens", type=whole_number, default=256, metavar="N", help="longest answer, in tokens (default: 256)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="draw tokens at this temperature (default: 0, the most probable token each time)",
    )
    parser.add_argument(
        "--seed",
        type=partial(whole_number, least=0),
        default=0,
        metavar="N",
        help="seed of the drawn tokens (default: 0)",
    )
    parser.add_argument("--ids", action="store_true", help="show the ids of prompt and answer, with their pieces")
    add_device_option(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object for each answer")


def run(args: argparse.Namespace) -> int:
    """Answer the prompt, or the lines of standard input.

    Raises:
        InputError: If an option or the folder cannot be used.
        RowsError: If lines in a pipe cannot be encoded, after the other lines are answered.
    """
    if not 0 <= args.temperature <= 100:  # also NaN
        raise InputError(str(args.temperature), place="--temperature", expected="0, or a number up to 100")
    from pytest_mistral_lora.records.files import require_folder

    require_extra("train")
    require_folder(args.folder)
    sys.stderr.write("loading the model\n")
    sys.stderr.flush()
    import torch

    from pytest_mistral_lora.training.generate.chat_session import ChatSession, load_chat_model

    loaded = load_chat_model(args.folder, args.base, use_adapter=not args.no_adapter, device=args.device)
    torch.manual_seed(args.seed)
    how = "greedy" if args.temperature == 0 else f"temperature {args.temperature:g}, seed {args.seed}"
    sys.stderr.write(f"{loaded.title}; {how}, at most {args.max_new_tokens} tokens\n")
    talk = ChatSession(loaded.model, loaded.encoder, args.system, args.max_new_tokens, args.temperature)
    if args.prompt is not None:
        _answer(talk, args.prompt, Place.of("--prompt"), args)
    elif sys.stdin.isatty():
        _talk(talk, args)
    else:
        _answer_lines(talk, args)
    return EXIT_OK


def _answer(talk: ChatSession, text: str, place: Place, args: argparse.Namespace) -> None:
    """Ask the model, and print the answer while it arrives."""

    def write(part: str) -> None:
        sys.stdout.write(part)
        sys.stdout.flush()

    if args.json:
        # the object comes when the answer is whole
        answer = talk.ask(text, _Progress(place), place=place)
        ids = {"prompt_ids": list(answer.prompt_ids), "ids": list(answer.ids)}
        data = {"prompt": text, **ids, "text": answer.text, "stop": answer.stop}
        print_json(data, indented=False)
        sys.stdout.flush()
        return
    answer = talk.ask(text, write, place=place)
    write("\n")
    if args.ids:
        write(_ids_text(talk, answer))
    if answer.stop == "length":
        sys.stderr.write(f"(cut off after {args.max_new_tokens} tokens: --max-new-tokens)\n")


class _Progress:
    """Shows on standard error, every few seconds, how long the answer is so far."""

    def __init__(self, place: Place) -> None:
        from pytest_mistral_lora.training.display import RunDisplay

        self._place, self._display, self._length = place, RunDisplay(sys.stderr), 0

    def __call__(self, part: str) -> None:
        self._length += len(part)
        self._display.meanwhile(f"{self._place}: {counted(self._length, 'character')} so far")


def _ids_text(talk: ChatSession, answer: ChatAnswer) -> str:
    def line(name: str, ids: Sequence[int]) -> str:
        # pieces as Python writes them, which shows spaces, line ends and quotes
        return (
            f"{name} ({len(ids)}): "
            + ", ".join(f"{token_id} {talk.encoder.piece(token_id)!r}" for token_id in ids)
            + "\n"
        )

    return line("prompt ids", answer.prompt_ids) + line("answer ids", answer.ids)


def _talk(talk: ChatSession, args: argparse.Namespace) -> None:
    """Answer typed lines as one conversation."""
    sys.stderr.write(f"Type a message. {_NEW} begins another conversation; Ctrl-D ends.\n")
    while True:
        sys.stderr.write("> ")
        sys.stderr.flush()
        text = sys.stdin.readline()
        if not text:
            sys.stderr.write("\n")
            return
        text = text.rstrip("\r\n")
        if text == _NEW:
            talk.messages = []
        elif text.strip():
            try:
                _answer(talk, text, Place.of("your message"), args)
            except RowError as error:
                sys.stderr.write(f"error: {error}\n")
            except KeyboardInterrupt:  # the interrupted turn is dropped
                sys.stderr.write("\n(stopped; your message is forgotten)\n")


def _answer_lines(talk: ChatSession, args: argparse.Namespace) -> None:
    """Answer each line of standard input in a new conversation."""
    errors: list[RowError] = []
    for number, line in enumerate(_lines(), 1):
        if line.strip():
            talk.messages = []
            try:
                _answer(talk, line.rstrip("\r\n"), Place.of("standard input", number), args)
            except RowError as error:
                errors.append(error)
    if errors:
        raise RowsError(errors, place="standard input")


def _lines() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise InputError(f"not in {error.encoding}: {error.reason}", place="standard input", expected="text") from error


VERB = Verb(
    "chat",
    "ask an adapter, a merged model or a base, encoded as in training",
    _add_options,
    run,
    description=_DESCRIPTION,
    examples=(
        "mistral-lora chat lora-out",
        "mistral-lora chat lora-out --prompt Hello --ids",
        "mistral-lora chat lora-out --no-adapter",
        "mistral-lora chat models/base --temperature 0.7 --seed 1",
    ),
    memory_advice="Use the memory of the host with --device cpu, or shorter answers with --max-new-tokens.",
)

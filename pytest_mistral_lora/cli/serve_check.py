"""`mistral-lora serve-check`: the prompts that a running server feeds its model."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pytest_mistral_lora.cli.judging import (
    Judging,
    add_format_option,
    add_report_option,
    add_rules_option,
    add_xfails_option,
    check_options,
)
from pytest_mistral_lora.cli.verb import (
    INPUT,
    PathArgument,
    Verb,
    add_tokenizer_option,
    output_file,
    shown_path,
    whole_number,
)
from pytest_mistral_lora.conformance.named_tokenizer import named_tokenizer
from pytest_mistral_lora.conformance.server_target import ServerChoice, ServerTarget
from pytest_mistral_lora.conformance.targets import Target, name_of
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.extras import require_extra
from pytest_mistral_lora.records.asking_limits import AT_ONCE, AskingLimits, is_kept

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_SECONDS = 30.0
"""Time between two lines of a log about what a server was asked, in seconds."""

_DESCRIPTION = """\
Send the packaged rows to a running server, and compare its prompts with mistral-common: ids, text that becomes a
control token, and refusals. How much an answer proves is printed: a server shows the ids that it fed, or a preview of
them, or, with OpenAI's API alone (openai), the number of tokens. Without a NAME the kind is recognised by the endpoint
that has the version; docs/serving.md has the servers and versions that were run. For a server of another kind, give the
path of a script of your own, which gets the rows and writes ids: see the same page.

With --adapter or --golden, ask for the answers of golden transcripts, too, greedily: by the ids of their prompts and by
their messages. The precision of the weights, which decides how near a near tie is, may be named: NAME:bf16=URL. So may
a version that the server does not report: NAME@VERSION=URL. A named deviation is accepted only of the servers and
versions that docs/deviations.md has for it.

With --answers, ask for answers whose ids are known, too, whole and as a stream, and compare what a client gets with
what the model said. Serve a model that says them: `mistral-lora export DIR --to NAME --probe` writes one. On any
other model the request forces the answers, as far as the kind of server allows it; the rest is not checked.

Of a folder whose manifest declares its deployment with a server, ask that server for the declared name, by the
tokenizer and the transcripts of the folder. The key is that of the declared variable, and no other.

Without a server, NAME-parsers=PYTHON gives the ids of the known answers to the parsers of the server that this Python
has installed, if that kind has some: whole, token by token, and cut in two at each place.

Each row is one short request (one token, greedy). A server that answers HTTP 429 is asked again after the time that its
header Retry-After names, for a minute at most. With --kept, the answers are written to a file as they come, and the
same command goes on where it was stopped; remove the file to ask for everything again. The key of the server is read
from MISTRAL_SERVER_KEY. Plain http goes to this machine alone."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    from pytest_mistral_lora.programs.registry import SERVERS_GROUP, foreign_points, own_points

    kinds = ", ".join([*(point.name for point in own_points(SERVERS_GROUP)), "openai"])
    kinds += "".join(f"; {point.name}: of another package" for point in foreign_points(SERVERS_GROUP))
    parser.add_argument(
        "server",
        type=PathArgument("read", str),
        metavar="[NAME=]URL",
        help=f"address of the server, and its kind if you name it ({kinds}); or NAME-parsers=PYTHON; or the folder of "
        "an adapter or merged model that declares its deployment.server",
    )
    add_tokenizer_option(parser, required=False)
    parser.add_argument("--model", default="", metavar="NAME", help="model to ask (default: the first that it lists)")
    parser.add_argument(
        "--rows",
        type=INPUT,
        action="append",
        default=[],
        metavar="FILE",
        help="rows to ask in place of the packaged ones (JSON Lines; repeatable)",
    )
    parser.add_argument(
        "--adapter",
        type=PathArgument("read", str),
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="adapter or merged folder that is served: replay its transcripts; with NAME (repeatable), check that the "
        "server answers this name as this adapter, and not as another one or the base",
    )
    parser.add_argument(
        "--golden",
        type=INPUT,
        action="append",
        default=[],
        metavar="FOLDER",
        help="transcripts to replay in place of those of --adapter (repeatable)",
    )
    parser.add_argument(
        "--answers", action="store_true", help="ask for the known answers, too, and check what a client gets of them"
    )
    parser.add_argument(
        "--probe",
        type=INPUT,
        metavar="FOLDER",
        help="folder that `export --probe` wrote, if its model is served and the server cannot be asked by ids",
    )
    parser.add_argument(
        "--request-seconds",
        type=whole_number,
        metavar="S",
        help="limit of each request, for a server that loads its model at the first (default: 60 a row, 600 an answer)",
    )
    parser.add_argument(
        "--at-once",
        type=whole_number,
        default=AT_ONCE,
        metavar="N",
        help=f"most open requests (default: {AT_ONCE})",
    )
    parser.add_argument(
        "--kept",
        type=PathArgument("written", output_file(is_kept)),
        metavar="FILE",
        help="file that keeps the answers, so that a check that was stopped goes on where it ended (JSON Lines)",
    )
    add_xfails_option(parser)
    add_rules_option(parser)
    add_report_option(parser)
    add_format_option(parser)


def run(args: argparse.Namespace) -> int:
    """Check the server; return 1 if a check finds an error."""
    if Path(args.server).is_dir():
        return _ask_declared(args)
    if not {":", "="} & {*args.server}:
        expected = "the address of a server, or the folder of a deployment that names one"
        raise InputError("no address of a server, and no such folder", place=args.server, expected=expected)
    if args.tokenizer is None:
        expected = "the tokenizer of the served model, such as the folder of the base"
        raise InputError("no tokenizer is named", place="--tokenizer", expected=expected)
    return _ask(args, ServerChoice.parse(args.server))


def _ask_declared(args: argparse.Namespace) -> int:
    """Check the server that a folder declares; its tokenizer and its transcripts are those of the folder.

    Raises:
        InputError: If the folder declares no server.
    """
    from pytest_mistral_lora.records.adapter_folder import AdapterFolder
    from pytest_mistral_lora.records.manifest import DEPLOYMENT
    from pytest_mistral_lora.records.secrets import key_from

    folder = Path(args.server)
    declared = AdapterFolder(folder).require_manifest().data.get(DEPLOYMENT)
    if not declared or "server" not in declared:
        raise InputError(
            "declares no deployment.server",
            place=str(folder),
            expected="the address of a server, or the folder of a deployment that names one",
            next_step="Write the key into the recipe, and record it: mistral-lora note FOLDER --recipe recipe.yaml.",
        )
    if args.adapter:
        raise InputError(f"{folder} is the adapter that is asked for", place="--adapter", expected="the folder alone")
    server, variable = declared["server"], declared["server"].get("key_env", "")
    chosen = ServerChoice.parse(f"{server['kind']}={server['url']}")
    if chosen.is_parsers or chosen.kind.endswith(".py"):
        # a folder may be anybody's, and must not name a program to run
        raise InputError(
            f"the kind {server['kind']!r} is a program on this machine",
            place=str(folder / "manifest.json"),
            expected="a kind of server",
        )
    args.adapter, args.tokenizer = [str(folder)], args.tokenizer or folder
    if args.output_format == "text":
        key = f"the key of {variable}" if variable else "no key"
        text = f"{folder} declares: {args.model or declared['name']} at {chosen.url} ({chosen.kind}), asked with {key}"
        sys.stdout.write(f"{shown_path(text)}\n")
    with key_from(variable):
        return _ask(args, chosen)


def _ask(args: argparse.Namespace, chosen: ServerChoice) -> int:
    """Check a server, as the options say."""
    adapter, named = _adapters(args.adapter)
    folders = [folder for _, folder in named]
    for path in (
        *args.rows,
        *args.golden,
        *([adapter] if adapter else []),
        *folders,
        *([args.probe] if args.probe else []),
    ):
        if not path.exists():
            raise InputError("no such file or folder", place=str(path))
    if chosen.is_parsers:
        _refuse_questions(args)
    elif not chosen.kind.endswith(".py"):  # a script sends its own requests
        require_extra("serving")
    path, oracle, _ = named_tokenizer(args.tokenizer)
    tokenizer = Target(name_of(path), path, oracle_name=oracle)
    _ = tokenizer.oracle  # a tokenizer that does not load is bad usage, not a fault of the server
    questions = {"model": args.model, "rows": tuple(args.rows), "golden": tuple(args.golden)}
    questions["named_adapters"] = tuple(named)
    limits = AskingLimits(args.request_seconds or 0, args.at_once, args.kept)
    questions |= {} if chosen.is_parsers else {"limits": limits}
    if args.answers or args.probe:
        questions |= {"asks_answers": True, "probe_answers": _said_by(args.probe) if args.probe else None}
    target = chosen.target(name_of(chosen.name), tokenizer, adapter, **questions)
    options = check_options(args)
    judging = Judging.of(args, options=options)
    if not isinstance(target, ServerTarget):
        return judging.judge([target])
    return judging.judge([_asked(target)])


def _asked(target: ServerTarget) -> ServerTarget:
    """Ask the server before it is judged, and show how far that is: the report has a display of its own."""
    from pytest_mistral_lora.records.transcripts import TRANSCRIPTS

    progress = _AskedSoFar(target.url)
    golden = target.golden
    if target.adapter is not None and not golden and (target.adapter / TRANSCRIPTS).is_dir():
        golden = (target.adapter / TRANSCRIPTS,)
    shown = replace(target, progress=progress.step, golden=golden)
    # the target keeps its error for the check that reports it
    with progress.shown(), suppress(InputError):
        rows = shown.answers.rows
        if all(isinstance(asked_row.served, InputError) for asked_row in rows) or not shown.server.gives_answers:
            return shown
        if golden and shown.transcripts[0]:
            _ = shown.replayed
        if shown.asks_answers:
            _ = shown.forced_answers
    return shown


def _refuse_questions(args: argparse.Namespace) -> None:
    """Refuse the options of a running server for parsers.

    Raises:
        InputError: If one is given.
    """
    for option in ("model", "rows", "adapter", "golden", "probe", "kept"):
        if getattr(args, option):
            raise InputError(f"--{option} only applies to a running server, not to parsers", place=args.server)


def _adapters(given: list[str]) -> tuple[Path | None, list[tuple[str, Path]]]:
    """Return the adapter that is given without a name, and those that are given as NAME=DIR.

    Raises:
        InputError: If several have no name, or two have the same name.
    """
    plain: list[Path] = []
    named: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if Path(text).exists() or not equals or not name:
            plain.append(Path(text))
        elif name in named:
            raise InputError(f"the name {name!r} is given twice", place=text)
        else:
            named[name] = Path(folder)
    if len(plain) > 1:
        step = "Give each the name under which it is served: --adapter NAME=DIR."
        raise InputError("several adapters without a name", place=str(plain[1]), next_step=step)
    return (plain[0] if plain else None), list(named.items())


def _said_by(probe: Path) -> frozenset[str]:
    """Return the names of the answers that the model of an exported probe says."""
    from pytest_mistral_lora.records.probe import said_answers

    return said_answers(probe)


class _AskedSoFar:
    """Shows how much a server was asked: a bar on a terminal, and in a log a line each half minute."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._asked, self._done, self._total = "", 0, 0
        self._bar: tqdm[NoReturn] | None = None
        self._is_bar = sys.stderr.isatty()

    def step(self, asked: str, total: int) -> None:
        """Count an answer to one of the rows, the transcripts or the known answers."""
        if (asked, total) != (self._asked, self._total):
            self._asked, self._done, self._total = asked, 0, total
            if self._is_bar:
                from tqdm import tqdm

                self._bar = tqdm(desc=f"asking {self._url}", total=total, unit=f" {asked}", leave=False)
        self._done += 1
        if self._bar is not None:
            self._bar.update()
            if self._done == total:
                # before the report is printed
                self._bar.close()
                self._bar = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show it until the end of the block."""
        ended = threading.Event()
        began = time.monotonic()

        def write_lines() -> None:
            while not ended.wait(LOG_SECONDS):
                so_far = f"{self._done} of {self._total} {self._asked}" if self._asked else "no answer yet"
                seconds = time.monotonic() - began
                sys.stderr.write(f"asking {self._url}: {so_far} after {seconds:.0f} s\n")
                sys.stderr.flush()

        writer = threading.Thread(target=write_lines, daemon=True)
        if not self._is_bar:
            writer.start()
        try:
            yield
        finally:
            ended.set()
            if writer.is_alive():
                writer.join()
            if self._bar is not None:
                self._bar.close()


VERB = Verb(
    "serve-check",
    "check the prompts that a running server feeds its model",
    _add_options,
    run,
    description=_DESCRIPTION,
    examples=(
        "mistral-lora serve-check http://127.0.0.1:8080 --tokenizer models/base",
        "mistral-lora serve-check http://127.0.0.1:8080 --tokenizer models/base --adapter lora-out",
        "mistral-lora serve-check http://127.0.0.1:8080 --tokenizer models/base --answers",
        "mistral-lora serve-check lora-out",
        "mistral-lora serve-check openai:bf16=https://models.example.org --tokenizer spm-v3 --model tuned",
        "mistral-lora serve-check http://127.0.0.1:8000 --tokenizer spm-v3 --adapter a=lora-a --adapter b=lora-b",
        "mistral-lora serve-check ./my_server.py=http://127.0.0.1:9000 --tokenizer models/base",
    ),
    failure="a prompt or an answer differs, or no check could judge anything",
)

"""`mistral-lora export`, `template` and `runner`: a run in another trainer, or a model in a server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytest_mistral_lora.cli.verb import (
    INPUT,
    NEW_FOLDER,
    PathArgument,
    Verb,
    add_json_option,
    add_oracle_option,
    add_tokenizer_option,
    output_file,
    print_json,
    shown_path,
)
from pytest_mistral_lora.conformance.named_tokenizer import named_tokenizer
from pytest_mistral_lora.errors import EXIT_OK, InputError
from pytest_mistral_lora.escaping import safe_json, safe_text
from pytest_mistral_lora.extras import require_extra
from pytest_mistral_lora.programs.registry import SERVERS_GROUP, TRAINERS_GROUP, names_in
from pytest_mistral_lora.runners import TRAINERS

_TRAINER, _SERVER = (next(iter(names_in(group)), "NAME") for group in (TRAINERS_GROUP, SERVERS_GROUP))
"""The first name of each group, for examples of commands."""

_EXPORT_DESCRIPTION = """\
Write a folder that runs a recipe in another trainer: its configuration, and the rows, already split, cut and encoded as
`mistral-lora train` encodes them. Settings that the other trainer does not have, and everything that it does
differently, are printed and written to README.md in the folder.

The rows are token ids and labels. A trainer that takes a chat template gets messages and a training template instead,
if it then computes the same ids and labels for every row.

For a server, give the folder of an adapter or of a merged model: you get a folder with the
commands that serve it with the prompts of training. An adapter that the server would load wrongly is refused. Hold the
running server to mistral-common with `mistral-lora serve-check`.

With --probe, the folder has a tiny model in place of yours, with the same tokenizer, template and flags. It is trained
until it says known answers, by ids. `mistral-lora serve-check URL --answers` then shows what the server makes of them:
its grammar, its parsers and its stream."""


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=INPUT, metavar="SOURCE", help="recipe.yaml, or for a server the model's folder")
    programs = [*names_in(TRAINERS_GROUP), *names_in(SERVERS_GROUP)]
    parser.add_argument("--to", required=True, choices=programs, help="the other trainer, or the server")
    parser.add_argument("--output", required=True, type=NEW_FOLDER, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--rows",
        choices=("auto", "messages", "tokens"),
        help="form of the rows (default: auto, which is messages where they are exact, and otherwise tokens)",
    )
    parser.add_argument(
        "--base", type=INPUT, metavar="DIR", help="for a server: folder of the base (default: the one that is recorded)"
    )
    parser.add_argument(
        "--name", metavar="NAME", help="for a server: name of the model in requests (default: the folder's)"
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="for a server: in place of the model, a tiny one that says known answers (CPU, minutes)",
    )
    add_json_option(parser)


def run_export(args: argparse.Namespace) -> int:
    """Write the folder, and print how it differs from the source and the command that starts it."""
    is_for_server = args.to in names_in(SERVERS_GROUP)
    of_servers = {"--base": args.base, "--name": args.name, "--probe": args.probe or None}
    given = {"--rows": args.rows} if is_for_server else of_servers
    for option, value in given.items():
        if value is not None:
            kind = "trainers" if is_for_server else "servers"
            raise InputError(f"{option} only applies to {kind}, not to {args.to}", next_step=f"Leave {option} out.")
    return _export_for_server(args) if is_for_server else _export_for_trainer(args)


def _export_for_server(args: argparse.Namespace) -> int:
    from pytest_mistral_lora.records.files import require_folder, require_new

    # before torch is imported, which takes seconds
    require_folder(args.source)
    require_new(args.output)
    from pytest_mistral_lora.serving.servers import SERVERS
    from pytest_mistral_lora.training.export.servers import export_for_server

    to = SERVERS[args.to].load_exporter()
    if args.probe:
        require_extra("train")
    names = {"base": args.base, "name": args.name or ""}
    with _margin_bar(is_shown=args.probe) as progress:
        exported = export_for_server(args.source, to, args.output, **names, is_probe=args.probe, progress=progress)
    if args.json:
        print_json(asdict(exported))
        return EXIT_OK
    lines = [f"needs:     {exported.needs}"] if exported.needs else []
    lines += [f"different: {remark}" for remark in exported.remarks]
    lines += [f"run:       {shown_path(command)}" for command in exported.commands]
    lines.append(f"check:     {shown_path(exported.check)}")
    sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_OK


@contextmanager
def _margin_bar(*, is_shown: bool) -> Iterator[Callable[[int, float], object]]:
    """Yield the function that shows the steps of a probe's training: a bar if stderr is a terminal."""
    if not is_shown or not sys.stderr.isatty():
        yield lambda step, margin: None
        return
    from tqdm import tqdm

    with tqdm(desc="planting known answers", unit="step", leave=False) as bar:

        def show(step: int, margin: float) -> None:
            bar.update(step - bar.n)
            bar.set_postfix_str(f"smallest margin {margin:.1f} of 4 logits")

        yield show


def _export_for_trainer(args: argparse.Namespace) -> int:
    from pytest_mistral_lora.records.files import require_new
    from pytest_mistral_lora.training.recipe import load_recipe

    # before torch is imported, which takes seconds
    recipe = load_recipe(args.source)
    require_new(args.output)
    from pytest_mistral_lora.training.export.run import export

    exported = export(recipe, TRAINERS[args.to].load_exporter(), args.output, form=args.rows or "auto")
    if args.json:
        print_json(asdict(exported))
        return EXIT_OK
    # the differences come before the command: read them before you start it
    lines = [f"{shown_path(exported.config)}: rows as {exported.form}"]
    lines += [f"left out: {key}: {reason}" for key, reason in exported.not_told.items()]
    lines += [f"different: {remark}" for remark in exported.remarks]
    lines.append(f"start it:  {shown_path(exported.command)}")
    sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_OK


EXPORT = Verb(
    "export",
    "write a run for another trainer, or the files that serve a model",
    _add_export_options,
    run_export,
    description=_EXPORT_DESCRIPTION,
    examples=(
        f"mistral-lora export recipe.yaml --to {_TRAINER} --output run",
        f"mistral-lora export lora-out --to {_SERVER} --output served",
        f"mistral-lora export merged --to {_SERVER} --output served",
        f"mistral-lora export merged --to {_SERVER} --probe --output probe",
    ),
)


_TEMPLATE_DESCRIPTION = """\
Write the official chat template of a tokenizer with {% generation %} blocks around the assistant's text. A trainer
needs them for a loss on answers alone (`assistant_only_loss`). The template renders every conversation byte for byte as
before.

From version 13 on, a tokenizer has tokens for thinking if its model thinks. A file of version 11 does not show it, and
mistral-common's template writes thinking as text in <think> for every one: for a model that does not think
(Mistral-Small-3.2), add --no-thinking.

Some checkpoints are published with a template that writes a system prompt of its own, which mistral-common's template
does not have. To keep it, name that template: --system-prompt checkpoints/my-mistral/chat_template.jinja"""


def _is_template(file: Path) -> bool:
    from pytest_mistral_lora.records.files import beginning

    # by its name, or by its first letters (also of JSON: an earlier output with --json)
    return file.suffix == ".jinja" or beginning(file).lstrip().startswith(("{#", "{%", "{{", '{"tokenizer": '))


def _add_template_options(parser: argparse.ArgumentParser) -> None:
    add_tokenizer_option(parser)
    add_oracle_option(parser)
    parser.add_argument("--no-thinking", action="store_true", help="refuse thinking in rows of version 11")
    parser.add_argument(
        "--system-prompt",
        type=INPUT,
        metavar="FILE",
        help="system prompt for conversations without one: a text file, or a .jinja file whose own prompt is kept",
    )
    parser.add_argument(
        "--output",
        # a checkpoint's template is in its folder
        type=PathArgument("written", output_file(_is_template), inside=True),
        metavar="FILE",
        help="file to write (default: standard output)",
    )
    add_json_option(parser)


def run_template(args: argparse.Namespace) -> int:
    """Write the template to a file or to standard output."""
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer, system_prompt_of, training_template
    from pytest_mistral_lora.records.files import write_text

    tokenizer = CheckpointTokenizer(*named_tokenizer(args.tokenizer, args.oracle)[:2])
    prompt = None if args.system_prompt is None else system_prompt_of(args.system_prompt, tokenizer)
    text = training_template(tokenizer, thinking=not args.no_thinking, system_prompt=prompt)
    if args.json:
        text = safe_json({"tokenizer": str(args.tokenizer), "template": text})
    if args.output:
        write_text(args.output, text)
    elif safe_text(text) != text:
        found = "the template has characters or lines that are spelled out on standard output"
        raise InputError(found, expected="--output FILE, or --json")
    else:
        sys.stdout.write(f"{text}\n")
    return EXIT_OK


TEMPLATE = Verb(
    "template",
    "write the official chat template with {% generation %} blocks",
    _add_template_options,
    run_template,
    description=_TEMPLATE_DESCRIPTION,
    examples=(
        "mistral-lora template --tokenizer checkpoints/my-mistral --output training.jinja",
        "mistral-lora template --tokenizer checkpoints/my-mistral --system-prompt prompt.txt --output training.jinja",
    ),
)


_RUNNER_DESCRIPTION = """\
Other trainers need other library versions, so each gets a virtual environment of its own in the cache folder
($MISTRAL_LORA_CACHE): 2 GB, or 6 GB with the libraries of a GPU. A trainer that is installed beside this package needs
none."""

_SETUP = """\
Make the environment of a trainer, and print its folder. If an earlier call was interrupted, this one continues."""

_LIST = "List the environment of each trainer: its name, its state and its folder."


def _add_runner_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    setup = actions.add_parser("setup", help="make or finish the environment of a trainer", description=_SETUP)
    setup.add_argument("name", choices=[*TRAINERS], help="trainer")
    setup.add_argument(
        "--python",
        type=INPUT,
        metavar="PATH",
        help="Python that makes the environment (default: this one, or a newer one on the PATH if need be)",
    )

    listing = actions.add_parser("list", help="list the environments and their states", description=_LIST)
    add_json_option(listing)


def run_runner(args: argparse.Namespace) -> int:
    """Make an environment, or list all environments."""
    from pytest_mistral_lora.runners import Environment

    if args.action == "setup":
        environment = Environment(TRAINERS[args.name])
        # an environment takes gigabytes of downloads: tell the user that an interruption loses nothing
        try:
            is_new = environment.setup(args.python)
        except KeyboardInterrupt:
            sys.stderr.write("note: to continue, run the same command again\n")
            raise
        sys.stdout.write(f"{args.name} {'is ready' if is_new else 'was ready'}: {environment.folder}\n")
        return EXIT_OK
    found: list[dict[str, Any]] = []
    for name in TRAINERS:
        try:
            environment = Environment(TRAINERS[name])
        except InputError as error:  # of another package: the others are listed all the same
            found.append({"name": name, "state": f"not checked: {error}", "folder": None})
        else:
            found.append({"name": name, "state": environment.state, "folder": environment.folder})
    if args.json:
        print_json(found)
    else:
        sys.stdout.writelines(f"{one['name']:<14}{one['state']:<28}{one['folder'] or ''}\n" for one in found)
    return EXIT_OK


RUNNER = Verb(
    "runner",
    "install other trainers in environments of their own",
    _add_runner_options,
    run_runner,
    description=_RUNNER_DESCRIPTION,
    examples=(f"mistral-lora runner setup {_TRAINER}", "mistral-lora runner list"),
)

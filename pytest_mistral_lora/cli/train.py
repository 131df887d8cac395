"""`mistral-lora train`: a recipe's adapter."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

from packaging.version import Version

from pytest_mistral_lora.cli.judging import add_xfails_option
from pytest_mistral_lora.cli.verb import INPUT, Verb, shown_path
from pytest_mistral_lora.errors import EXIT_FINDING, EXIT_OK
from pytest_mistral_lora.extras import require_extra

if TYPE_CHECKING:
    from pytest_mistral_lora.records.gate import Gate
    from pytest_mistral_lora.training.display import RunDisplay

_DESCRIPTION = """\
Train the adapter of a recipe, and write its folder: tensors, tokenizer files, manifest.json and DECISION.md. Print the
folder's path.

The rows are judged in the pass that encodes them, by the rules of `mistral-lora check recipe.yaml`: a finding stops the
run before a weight is loaded, and the exit code is 1. Correct the rows, accept the finding with a reason in a file for
--xfails or for the recipe's key xfails, or train with --unjudged. A later run with the same rows takes the verdict.

After Ctrl-C or SIGTERM, the run ends with a checkpoint after the current step; a second signal ends it at once. A
run that fails leaves failure.json in its work folder, beside the output folder. If the recipe's evaluation.gate fails,
the folder is written all the same, and the exit code is 1. To train on several GPUs, start the same command with a
launcher, as in the last example."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=INPUT, help="recipe.yaml")
    parser.add_argument("--resume", action="store_true", help="continue an unfinished run from its last checkpoint")
    add_xfails_option(parser)
    parser.add_argument(
        "--unjudged",
        action="store_true",
        help="train on rows that are not judged; manifest.json and DECISION.md record it",
    )


def run(args: argparse.Namespace) -> int:
    """Train, and print the path of the adapter's folder, once for all processes of the run."""
    from pytest_mistral_lora.training.recipe import load_recipe

    # before the slow imports below: a wrong key or an existing folder is reported immediately
    recipe = load_recipe(args.recipe)
    require_extra("train")
    from pytest_mistral_lora.training.devices import is_main
    from pytest_mistral_lora.training.display import RunDisplay
    from pytest_mistral_lora.training.run_folder import opened_run, refuse_missing_inputs

    with opened_run(recipe, resume=args.resume):
        refuse_missing_inputs(recipe)
    let_memory_grow()
    display = RunDisplay.on_stderr()
    display.phase("loading PyTorch, transformers and PEFT")
    from pytest_mistral_lora.training.callbacks import stop_on_signals
    from pytest_mistral_lora.training.progress import next_commands
    from pytest_mistral_lora.training.run import train

    with stop_on_signals() as stop:
        result = train(
            recipe,
            resume=args.resume,
            xfails=args.xfails,
            unjudged=args.unjudged,
            display=display,
            stop=stop,
        )
    if result.gate is not None:
        _show_gate(result.gate, display)
    display.line("next:", "bold")
    tally = result.data.train.figures.tally
    chats = tally.completions < tally.used
    for command in next_commands(result.output, answers=bool(result.completions), chats=chats):
        display.line(f"  {command}")
    # a launcher joins the output of its processes, and a script that reads the path needs a single line
    if is_main():
        sys.stdout.write(f"{shown_path(result.output)}\n")
    return EXIT_FINDING if result.gate is not None and result.gate.verdict == "failed" else EXIT_OK


def _show_gate(gate: Gate, display: RunDisplay) -> None:
    """Show the table of the gate, and why a line did not pass."""
    from pytest_mistral_lora.records.gate import table_lines

    for text in (*table_lines(gate), *gate.reasons()):
        display.line(text)
    step = "; the adapter is written, and its manifest records it" if gate.verdict == "failed" else ""
    display.line(f"gate: {gate.verdict}{step}", {"failed": "bold red", "passed": "green"}.get(gate.verdict, "yellow"))


def let_memory_grow() -> None:
    """Let PyTorch's allocator of a GPU grow its segments, unless the user has configured it; before torch is imported.

    Packs of rows differ in size: segments of fixed size would leave gaps (PyTorch's CUDA notes).
    """
    older, newer = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    if not {older, newer} & os.environ.keys():
        # torch 2.9 has the newer name, too, and ignores it on CUDA (pytorch/pytorch#183387)
        os.environ[newer if Version(version("torch")) >= Version("2.10") else older] = "expandable_segments:True"


VERB = Verb(
    "train",
    "train the adapter of a recipe (recipe.yaml)",
    _add_options,
    run,
    description=_DESCRIPTION,
    examples=(
        "mistral-lora train recipe.yaml",
        "mistral-lora train recipe.yaml --resume",
        "accelerate launch -m pytest_mistral_lora.training recipe.yaml",
    ),
    failure="the run or its gate fails",
)

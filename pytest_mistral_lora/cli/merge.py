"""`mistral-lora merge`: a model without an adapter, with a proof that it answers as base and adapter do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pytest_mistral_lora.cli.verb import (
    INPUT,
    NEW_FOLDER,
    Verb,
    add_device_option,
    add_json_option,
    print_json,
    shown_path,
)
from pytest_mistral_lora.errors import EXIT_OK

_DESCRIPTION = """\
Add an adapter to the weights of its base, and write the folder of the merged model. The sums are computed in float64,
one tensor at a time, and rounded once.

Before the folder appears, each element of the weights is compared with that sum, and base with adapter and then the
merged model answer the same prompts. The largest difference of a logit, and whether the answers are equal, are recorded
in manifest.json. If a weight is not the rounded sum, or the merged model does not answer as base and adapter do, no
folder is left."""

_MEMORY_ADVICE = """\
A merge loads the base with the adapter, and then the merged model, to compare their answers. Nothing is left of it. Use
a smaller --dtype, or the memory of the host with --device cpu."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=INPUT, metavar="DIR", help="adapter folder; it is not changed")
    parser.add_argument("output", type=NEW_FOLDER, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--base", type=INPUT, metavar="DIR", help="folder of the base (default: the base that the adapter names)"
    )
    parser.add_argument(
        "--dtype",
        choices=["base", "float32", "bfloat16", "float16"],
        default="base",
        help="dtype of the merged weights (default: the dtype of the base)",
    )
    parser.add_argument(
        "--golden",
        type=INPUT,
        metavar="FOLDER",
        help="transcripts with the prompts to compare (default: DIR/transcripts, or else one training row)",
    )
    # the documentation's British spelling, and the libraries' American one
    parser.add_argument(
        "--dequantise",
        "--dequantize",
        dest="dequantize",
        action="store_true",
        help="add the adapter to the dequantized weights: of a quantized base, or of a full base if the adapter was "
        "trained on it in 4 bits",
    )
    add_device_option(parser)
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Merge, and print the folder and how the merged model compares with base and adapter."""
    from pytest_mistral_lora.records.files import require_folder

    require_folder(args.adapter)  # before torch is imported, which takes seconds
    from pytest_mistral_lora.training.callbacks import stop_on_signals
    from pytest_mistral_lora.training.display import RunDisplay
    from pytest_mistral_lora.training.merge import merge

    # a signal removes the unfinished folder and ends the merge: unlike a training run, it has no step to finish
    with stop_on_signals(), RunDisplay.on_stderr() as display:
        display.start_bar()
        merged = merge(
            args.adapter,
            args.output,
            args.base,
            dtype=args.dtype,
            golden=args.golden,
            dequantize=args.dequantize,
            device=args.device,
            display=display,
        )
    merged = replace(merged, notes=(*merged.notes, *_remarks_of_servers(merged.output)))
    if args.json:
        print_json(merged.to_json())
        return EXIT_OK
    proof = merged.manifest["parent"]
    equal = proof["prompts"] - proof["near_ties"]
    lines = [
        shown_path(merged.output),
        f"{proof['merge_dtype']}, rounded sums; {equal} of {proof['prompts']} answers equal those of base "
        f"and adapter, logits at most {proof['max_abs_logit_difference']:.3g} apart; on {proof['device']}",
        *(f"note: {note}" for note in merged.notes),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_OK


def _remarks_of_servers(folder: Path) -> Iterator[str]:
    """Yield what each kind of server of this package needs to serve a merged model, beyond its folder."""
    from pytest_mistral_lora.serving.servers import SERVERS

    for server in SERVERS.of_this_package():
        if remark := server.remark_on_merged(folder):
            yield remark


VERB = Verb(
    "merge",
    "add an adapter to the weights of its base, and prove the result",
    _add_options,
    run,
    description=_DESCRIPTION,
    examples=("mistral-lora merge lora-out merged",),
    failure="the merged model answers otherwise than base and adapter, or the disk is full",
    memory_advice=_MEMORY_ADVICE,
)

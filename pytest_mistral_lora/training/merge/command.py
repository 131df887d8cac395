"""The command line of `mistral-lora merge`: a model that needs no adapter, and the proof that it is the same."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.errors import EXIT_OK, MistralLoraError

if TYPE_CHECKING:
    from pytest_mistral_lora.training.merge.merging import Merged

_DESCRIPTION = """\
Add an adapter to its base's weights, and write the folder of a model that needs neither. Sums are in float32, one
tensor at a time. Before the folder is there, base and adapter and then the merged model answer the same prompts, and
the largest difference of a logit and whether the answers are equal are recorded in its manifest.json."""
_EXITS = """\
Exit codes: 0 merged, 1 the merged model is not what base and adapter are, or the disk is full (then nothing is left),
2 bad usage or bad input, 3 out of memory, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM)."""

_OUT_OF_MEMORY = """\
out of memory: base and adapter, then the merged model, are loaded to be asked. Nothing is left. A smaller --dtype needs
less, and --device cpu uses the host's memory."""


def main(arguments: Sequence[str] | None = None, *, prog: str = f"python -m {__spec__.name}") -> int:
    """Run the command line; returns the exit code."""
    given = _parser(prog).parse_args(arguments)
    try:
        merged = _merge(given)
    except (MistralLoraError, KeyboardInterrupt, MemoryError, RuntimeError) as error:
        from pytest_mistral_lora.training.recovery.failure import exit_code, is_out_of_memory

        if is_out_of_memory(error):
            sys.stderr.write(f"error: {_OUT_OF_MEMORY} {error}\n")
        elif isinstance(error, RuntimeError):
            raise
        else:
            sys.stderr.write(f"error: {error or 'interrupted'}\n")
        return exit_code(error)
    shown = json.dumps(merged.to_json(), ensure_ascii=False, indent=2) if given.json else merged_text(merged)
    sys.stdout.write(f"{shown}\n")
    return EXIT_OK


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=_DESCRIPTION, epilog=_EXITS)
    parser.add_argument("adapter", type=Path, metavar="DIR", help="adapter folder; it is not changed")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--base", type=Path, metavar="DIR", help="base folder (default: the one that DIR names)")
    parser.add_argument(
        "--dtype",
        choices=["base", "float32", "bfloat16", "float16"],
        default="base",
        help="dtype of the merged weights (default: the base's own)",
    )
    parser.add_argument(
        "--golden",
        type=Path,
        metavar="FOLDER",
        help="transcripts whose prompts are asked (default: DIR/transcripts, or else one training row)",
    )
    parser.add_argument(
        "--dequantise",
        "--dequantize",
        dest="dequantize",
        action="store_true",
        help="add the adapter to what quantised weights stand for: of a quantised base, or of a full one that the "
        "adapter was trained on in 4 bits",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where the models answer")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _merge(given: argparse.Namespace) -> Merged:
    from pytest_mistral_lora.training.merge.merging import merge
    from pytest_mistral_lora.training.recovery.signals import stop_on_signals

    with stop_on_signals():
        return merge(
            given.adapter,
            given.output,
            given.base,
            dtype=given.dtype,
            golden=given.golden,
            dequantize=given.dequantize,
            device=given.device,
            progress=sys.stderr.isatty(),
        )


def merged_text(merged: Merged) -> str:
    """Return a merge for a terminal: the folder, how it compares with base and adapter, and what to know of it."""
    parent = merged.manifest["parent"]
    asked, ties = parent["prompts"], parent["near_ties"]
    lines = [
        str(merged.output),
        f"{parent['merge_dtype']}; {asked - ties} of {asked} answers equal those of base and adapter, "
        f"logits at most {parent['max_abs_logit_difference']:.3g} apart; on {parent['device']}",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in merged.notes)])


if __name__ == "__main__":
    sys.exit(main())

"""CPU seconds and memory with and without each speed patch: code of this package in place of code of a library.

Each patch is switched off here, not by an option of the package: the benchmark puts the library's own code back. The
two sides take turns, each in a process of its own. Run it from a checkout: python benchmarks/patches.py --help
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import rows
from rich import box
from rich.console import Console
from rich.table import Table

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle, encoder_trace, oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates import renderer
from pytest_mistral_lora.conformance.train.tiny_run import tiny_run

TOKENIZER = "spm-v3"
TEKKEN = "tekken-240911"


def without_tool_memory() -> None:
    """Let mistral-common check the schema of each tool of each row."""
    oracle.remember_tools = lambda validator: validator


def with_decoding() -> None:
    """Let mistral-common decode each conversation for its debugging text."""
    follow = encoder_trace.EncoderTrace.follow

    def follow_and_decode(self: encoder_trace.EncoderTrace, text: object, instruct: object) -> None:
        decode = instruct.decode  # type: ignore[attr-defined]
        follow(self, text, instruct)
        instruct.decode = decode  # type: ignore[attr-defined]

    encoder_trace.EncoderTrace.follow = follow_and_decode  # type: ignore[method-assign]


def with_plain_sandbox() -> None:
    """Let Jinja's sandbox judge each attribute each time."""
    from transformers.utils.chat_template_utils import render_jinja_template

    renderer.own_renderer = lambda: render_jinja_template  # type: ignore[assignment]


def with_loaded_file() -> None:
    """Let mistral-common load the tokenizer file again for its chat template."""
    from mistral_common.integrations.chat_templates.chat_templates import (
        convert_tokenizer_to_chat_template as generate,
    )

    oracle.Oracle._generated_template = lambda self, thinking, prompt: str(  # type: ignore[method-assign]
        generate(self.path, prompt, True, thinking)
    )


def with_all_objects_collected() -> None:
    """Let each collection of the tiny train walk the objects of the libraries, too."""
    gc.freeze = lambda: None


def with_library_layers() -> None:
    """Let PEFT and transformers compute the frozen layers of the model."""
    from pytest_mistral_lora.training.step import frozen_layers

    frozen_layers.use_frozen_layers = lambda model: None


def with_decoded_pieces() -> None:
    """Let mistral-common decode each token of a Tekken file by itself."""
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    oracle.load_tokenizer = MistralTokenizer.from_file


def with_plain_conversion() -> None:
    """Let transformers copy the tokenizer that it has made, and make the merges of a Tekken file by its function."""
    from pytest_mistral_lora.checkpoint import tokenizers

    tokenizers.quick_conversion = nullcontext  # type: ignore[assignment]
    tokenizers.with_quick_merges = lambda convert: convert


def encode(count: int) -> Callable[[], object]:
    """Return what encodes generated rows, tools among them."""
    judge, plain = Oracle(shipped_tokenizer(TOKENIZER)), generated(count)
    judge.encode(plain[0])
    return lambda: [judge.encode(row) for row in plain]


def encode_tools(count: int) -> Callable[[], object]:
    """Return what encodes generated rows with tools."""
    judge, plain = Oracle(shipped_tokenizer(TOKENIZER)), [row for row in generated(10 * count) if row.tools][:count]
    judge.encode(plain[0])
    return lambda: [judge.encode(row) for row in plain]


def render(count: int) -> Callable[[], object]:
    """Return what renders generated rows by mistral-common's template, as a dataset pass does."""
    source = Oracle(shipped_tokenizer(TOKENIZER)).chat_template()
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    questions = [
        {
            "asked": "render",
            "source": source,
            "messages": [*row.messages],
            "tools": list(row.tools) if row.tools else None,
            "variables": variables,
            "foreign": False,
        }
        for row in generated(count)
    ]
    renderer.answer(questions[0])
    return lambda: [renderer.answer(question) for question in questions]


def generate_template(count: int) -> Callable[[], object]:
    """Return what generates the chat template of a Tekken tokenizer."""
    judge = Oracle(shipped_tokenizer(TEKKEN))
    return judge.chat_template


def load_tekken(count: int) -> Callable[[], object]:
    """Return what loads a Tekken tokenizer."""
    file = shipped_tokenizer(TEKKEN)
    return lambda: Oracle(file)


def convert_tekken(count: int) -> Callable[[], object]:
    """Return what converts a Tekken tokenizer."""
    from transformers import AutoTokenizer  # noqa: F401  the import is no part of the work

    from pytest_mistral_lora.checkpoint.tokenizers import convert

    judge = Oracle(shipped_tokenizer(TEKKEN))
    judge.chat_template()
    return lambda: convert(judge)


def train_tiny(count: int) -> Callable[[], object]:
    """Return the tiny train of the suite."""
    judge = Oracle(shipped_tokenizer(TOKENIZER))

    def train() -> None:
        with tempfile.TemporaryDirectory() as folder:
            tiny_run(judge, Path(folder), device="cpu")

    return train


def train_layers(count: int) -> Callable[[], object]:
    """Return forward and backward passes of a LoRA model with the proportions of a real one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import MistralConfig, MistralForCausalLM

    from pytest_mistral_lora.training.step import frozen_layers

    torch.manual_seed(0)
    size = {"hidden_size": 768, "intermediate_size": 2688, "num_hidden_layers": 4, "vocab_size": 1024}
    config = MistralConfig(**size, num_attention_heads=12, num_key_value_heads=4)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(MistralForCausalLM(config), adapter)
    frozen_layers.use_frozen_layers(model)
    ids = torch.randint(0, 1024, (1, 2048))
    return lambda: [model(input_ids=ids, labels=ids).loss.backward() for _ in range(-(-count // 400))]


def generated(count: int) -> list[Row]:
    """Return generated rows, each checked."""
    return [parse_row(row) for row in rows.generated(count)]


PATCHES: dict[str, tuple[Callable[[], None], Callable[[int], Callable[[], object]]]] = {
    "tools": (without_tool_memory, encode_tools),
    "decode": (with_decoding, encode),
    "sandbox": (with_plain_sandbox, render),
    "template": (with_loaded_file, generate_template),
    "tekken": (with_decoded_pieces, load_tekken),
    "conversion": (with_plain_conversion, convert_tekken),
    "freeze": (with_all_objects_collected, train_tiny),
    "layers": (with_library_layers, train_layers),
}
"""What switches a patch off, and the work that it speeds up."""


class Cost(NamedTuple):
    """What a work costs.

    Attributes:
        seconds: CPU seconds.
        memory: MiB of resident memory at its most, above the memory before the work.
    """

    seconds: float
    memory: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the patches in alternating pairs, or one side of a pair, and print the costs."""
    given = _options(arguments)
    if given.side:
        sys.stdout.write(f"{json.dumps(_measured(given.side, given.patch[0], given.rows))}\n")
        return
    table = Table("patch", "with", "without", "gain", "MiB with", "without", "gain", box=box.MARKDOWN)
    for name in given.patch:
        costs: dict[str, list[Cost]] = {"with": [], "without": []}
        for pair in range(given.pairs):
            sys.stderr.write(f"{name}: pair {pair + 1} of {given.pairs}\n")
            for side, found in costs.items():
                command = [sys.executable, __file__, "--side", side, "--patch", name, "--rows", str(given.rows)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found.append(Cost(*json.loads(done.stdout)))
        cells = _cells([cost.seconds for cost in costs["with"]], [cost.seconds for cost in costs["without"]], "{:.2f}")
        cells += _cells([cost.memory for cost in costs["with"]], [cost.memory for cost in costs["without"]], "{:.0f}")
        table.add_row(name, *cells)
    Console(width=120).print(table)


def _cells(patched: Sequence[float], plain: Sequence[float], form: str) -> list[str]:
    """Return the medians with and without a patch, and the median gain over the pairs."""
    gains = [1 - ours / theirs for ours, theirs in zip(patched, plain, strict=True) if theirs]
    gain = f"{statistics.median(gains):.0%}" if gains else ""
    return [form.format(statistics.median(patched)), form.format(statistics.median(plain)), gain]


def _measured(side: str, name: str, count: int) -> Cost:
    switch_off, prepare = PATCHES[name]
    if side == "without":
        switch_off()
    work = prepare(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    work()
    seconds = time.process_time() - start
    return Cost(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--patch", nargs="+", choices=list(PATCHES), default=list(PATCHES), help="patches to measure; default: all")
    add("--rows", type=int, default=2000, help="rows of each run; default: 2000")
    add("--pairs", type=int, default=5, help="pairs of runs; default: 5")
    add("--side", choices=("with", "without"), help="measure one side of one patch, and print its CPU seconds")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

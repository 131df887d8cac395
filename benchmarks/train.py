"""Tokens per second and memory of a LoRA run, beside those of other trainers, in one call.

Each contestant trains once over the same rows, from the same weights, in a process of its own; they take turns. What it
prints is a table, or JSON; benchmarks/README.md says what the figures mean and how to get TRL beside it.
Run it from a checkout: python benchmarks/train.py --help
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import count, cycle, islice, repeat
from pathlib import Path
from typing import Any

import report
import rows

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle.tokenizer_file import oracle_file
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.encoder import Encoder, make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.training.adapter import adapted_layers, attach_adapter
from pytest_mistral_lora.training.recipe import Lora

HERE = Path(__file__).parent
BASE = HERE / "build" / "base"
PREPARE = HERE.parent / "examples" / "chatterbot-smollm2" / "prepare.py"
PEERS = ("torch", "trl>=1.16", "peft")
RANK = 16


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON where it is asked for."""
    given = _options(arguments)
    pythons = {report.OURS: sys.executable, report.PLAIN: sys.executable}
    if peers := _peers_python(given):
        pythons |= {report.PADDED: peers, report.PACKED: peers}
    found: dict[str, Any] = {"machine": machine(given), "tables": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = _base(given, folder)
        encoder = make_encoder("mistral-common" if oracle_file(base) else "chat-template", CheckpointTokenizer(base))
        task = prepare(given, base, folder)
        plain = write_rows(given, encoder, folder / "rows.json")
        contests = [("Training", plain, pythons)]
        if given.share_prefix:
            prompt = repeat(system_prompt(encoder, given.share_prefix))
            shared = write_rows(given, encoder, folder / "shared.json", prompt, longer=given.share_prefix)
            # a template may have a system prompt for rows that have none: it would be shared
            single = write_rows(given, encoder, folder / "single.json", (f"{number}." for number in count()))
            ours = dict.fromkeys((report.OURS, report.SHARED), sys.executable)
            contests.append((f"Rows that share a system prompt of {given.share_prefix} tokens", shared, ours))
            contests.append(("Rows that share none", single, ours))
        for title, rows_of, among in contests:
            results = take_turns({**task, "rows": rows_of["file"]}, among, given.repetitions, folder)
            table = {"title": title, "rows": rows_of, "results": report.summarize(results, given.precision)}
            report.show(table)
            found["tables"].append(table)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def prepare(given: argparse.Namespace, base: Path, folder: Path) -> dict[str, Any]:
    """Write the adapter that all contestants start from, and return what they are told."""
    lora = Lora(r=RANK, alpha=2 * RANK)
    layers = adapted_layers(BaseFolder(base), lora.target_modules)
    model = attach_adapter(load_base(BaseFolder(base), given.precision, "cpu"), lora, layers, seed=0)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    pad = BaseFolder(base).config.get("pad_token_id")
    return {
        "base": str(base),
        "adapter": str(folder / "adapter"),
        "pad_id": 0 if pad is None else pad,
        "rank": RANK,
        "learning_rate": 2e-4,
        "gemm_tokens": 1024,
        "seed": 0,
        **{name: getattr(given, name) for name in TOLD},
    }


def write_rows(
    given: argparse.Namespace, encoder: Encoder, file: Path, prompts: Iterable[str] | None = None, *, longer: int = 0
) -> dict[str, Any]:
    """Write rows as ids and labels, and return what the ratios rest on.

    Args:
        given: The options.
        encoder: Makes ids and labels.
        file: The file to write.
        prompts: A system prompt to put before each row.
        longer: How many tokens longer a row may be for it.
    """
    chats = rows.generated(10 * given.rows) if given.quick else rows.chats()
    if prompts is not None:
        led = zip(chats, prompts, strict=False)
        chats = ({**chat, "messages": _led(chat["messages"], prompt)} for chat, prompt in led)
    lengths = (length + longer for length in rows.lengths(given.max_length))
    plain = [
        {"input_ids": row.input_ids, "labels": row.labels}
        for row in islice(fitting(chats, encoder, lengths), given.rows + given.held_out)
    ]
    split = {"train": plain[: given.rows], "held_out": plain[given.rows :]}
    file.write_text(json.dumps(split))
    return {"file": str(file), **report.figures(split["train"], given.micro_batch_size)}


def _led(messages: Sequence[Mapping[str, Any]], system: str) -> list[Mapping[str, Any]]:
    return [{"role": "system", "content": system}, *(one for one in messages if one["role"] != "system")]


def system_prompt(encoder: Encoder, tokens: int) -> str:
    """Return a text with which the shortest of rows has this many tokens."""
    text = ""
    for sentence in cycle(rows.SENTENCES):
        text = f"{text} {sentence}".strip()
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        if len(encoder.encode(parse_row({"messages": _led(talk, text)})).input_ids) >= tokens:
            return text
    raise AssertionError("sentences never end")


TOLD = (
    *("batch_size", "micro_batch_size", "micro_batch_tokens", "pack_length"),
    *("device", "precision", "checkpointing", "attention", "threads"),
)
"""Options that contestants are told as they are."""


def _base(given: argparse.Namespace, folder: Path) -> Path:
    """Return the base checkpoint's folder; make it, or bring it, where it is not there."""
    if given.quick:
        from pytest_mistral_lora.chat.oracle import shipped_tokenizer
        from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

        return write_tiny_base(folder / "base", shipped_tokenizer("spm-v3"))
    if pinned := re.fullmatch(r"([^/\s]+/[^/\s]+)@([0-9a-f]{40})", given.base):
        from pytest_mistral_lora.checkpoint.pins import resolve

        return resolve(*pinned.groups(), weights=True)
    if given.base == str(BASE) and not BASE.is_dir():
        subprocess.run([sys.executable, PREPARE, "--out", BASE.parent], check=True)
    return Path(given.base)


def fitting(chats: Iterator[Mapping[str, Any]], encoder: Encoder, lengths: Iterator[int]) -> Iterator[EncodedRow]:
    """Yield chats encoded, each up to the last answer that fits its length; those of which none fits are left out."""
    for chat, length in zip(chats, lengths, strict=False):
        best = None
        for end, message in enumerate(chat["messages"], start=1):
            if message["role"] != "assistant" or message.get("tool_calls"):
                continue
            try:
                encoded = encoder.encode(parse_row({**chat, "messages": chat["messages"][:end]}))
            except RowError:
                break
            if len(encoded.input_ids) > length:
                break
            best = encoded
        if best:
            yield best


def take_turns(
    task: Mapping[str, Any], pythons: Mapping[str, str], repetitions: int, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Return what each contestant measured in each repetition."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    for turn in range(repetitions):
        for name, python in pythons.items():
            _say(f"{turn + 1}/{repetitions}: {name}")
            results[name].append(run({**task, "contestant": name}, python, folder))
    return results


def run(task: Mapping[str, Any], python: str, folder: Path) -> dict[str, Any]:
    """Run one contestant in a process of its own."""
    (folder / "task.json").write_text(json.dumps(task))
    threads = str(task["threads"])
    subprocess.run(
        [python, HERE / "contestant.py", folder / "task.json", folder / "result.json"],
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
        stdout=sys.stderr,
        check=True,
    )
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def _peers_python(given: argparse.Namespace) -> str | None:
    """Return the Python that has TRL: the one named, the one of an environment that is made, this one, or None."""
    if given.peers_python:
        return str(given.peers_python)
    if given.make_peers:
        python = given.make_peers / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", given.make_peers], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
        return str(python)
    if find_spec("trl"):
        return sys.executable
    _say("TRL is not installed: see --peers-python and --make-peers")
    return None


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def machine(given: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures depend on, beside the versions that each contestant notes."""
    import torch

    return {
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if given.device == "cuda" else None,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()},
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--base", default=str(BASE), help="checkpoint folder, or REPO@COMMIT; default: SmolLM2 of 135M, made once")
    add("--rows", type=int, default=32, help="training rows; default: 32")
    add("--held-out", type=int, default=16, help="rows for the held-out loss; default: 16")
    add("--max-length", type=int, default=512, help="tokens of the longest row; default: 512")
    add("--batch-size", type=int, default=4, help="rows in an optimizer step; default: 4")
    add("--micro-batch-size", type=int, default=4, help="rows that a padding peer feeds at once; default: 4")
    add("--micro-batch-tokens", type=int, default=1024, help="tokens that ours feeds at once; default: 1024")
    add("--share-prefix", type=int, default=0, metavar="TOKENS", help="measure that option too, on a prompt so long")
    add("--pack-length", type=int, default=1024, help="tokens of TRL's packs, one a step; default: 1024")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--checkpointing", action="store_true", help="compute activations twice to keep fewer")
    add("--attention", help="attn_implementation of the models, such as flash_attention_2; default: theirs")
    add("--threads", type=int, default=1, help="CPU threads; default: 1")
    add("--repetitions", type=int, default=3, help="times that each trains; default: 3")
    add("--peers-python", type=Path, metavar="PATH", help="a Python that has TRL, if this one has not")
    add("--make-peers", type=Path, metavar="FOLDER", help="make a virtual environment with TRL there, or use it")
    add("--quick", action="store_true", help="a tiny random model and generated rows: shows that the script works")
    add("--json", type=Path, metavar="PATH", help="write the figures there too")
    given = parser.parse_args(arguments)
    if given.batch_size % given.micro_batch_size:
        parser.error(
            f"--batch-size {given.batch_size} is not a multiple of --micro-batch-size {given.micro_batch_size}"
        )
    return given


if __name__ == "__main__":
    main()

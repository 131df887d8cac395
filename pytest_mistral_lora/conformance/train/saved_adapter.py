"""The saved adapter, loaded in a process that has not trained it; its answers; and its merge into the base."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.train.harness import SCALE, Figures, TrainerHarness, TrainingLaw
from pytest_mistral_lora.conformance.train.model_laws import row_logits
from pytest_mistral_lora.conformance.train.step_laws import merge_by_hand, plain_model, supervised_positions
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


_MAX_NEW_TOKENS = 64


def in_a_new_process(folder: Path, device: str) -> dict[str, Any]:
    """Run `mistral-lora smoke` on the `adapter` of a folder, with its `base` and `rows.jsonl`; return its JSON.

    Raises:
        MistralLoraError: If the process fails.
    """
    command = [sys.executable, "-m", "pytest_mistral_lora.cli", "smoke", str(folder / "adapter")]
    command += ["--base", str(folder / "base"), "--rows", str(folder / "rows.jsonl"), "--json"]
    command += ["--max-new-tokens", str(_MAX_NEW_TOKENS), "--device", device]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if process.returncode:
        raise _failure(folder, f"exit code {process.returncode}", process.stderr)
    return dict(json.loads(process.stdout))


class ForkedProcess:
    """A process, forked before any training, that waits for the folder of a trained adapter.

    It has only imported the libraries, so it knows no more about the adapter than a new interpreter. The imports take
    most of the time of a smoke run, and run once instead of twice.
    """

    def __init__(self) -> None:
        # fork, because the other start methods import everything again; on Linux only, because Apple's frameworks do
        # not survive a fork
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._connection), daemon=True)
        self._process.start()
        theirs.close()

    @staticmethod
    def is_possible() -> bool:
        """Whether this process can be forked and the copy can run a model: CUDA does not work in a forked process."""
        import torch

        return sys.platform == "linux" and not torch.cuda.is_available()

    def ask(self, folder: Path, device: str) -> dict[str, Any]:
        """Return the same as `in_a_new_process`.

        Raises:
            MistralLoraError: If the process fails.
        """
        self._connection.send((folder, device))
        try:
            answer, failure = self._connection.recv()
        except EOFError:
            self._process.join()
            raise _failure(folder, f"exit code {self._process.exitcode}", "") from None
        if failure:
            raise _failure(folder, "an exception", failure)
        return dict(json.loads(answer))


def _serve(connection: Connection, other_end: Connection) -> None:
    other_end.close()  # while it is open here, the end of the first process would go unnoticed
    try:
        folder, device = connection.recv()
    except EOFError:
        return
    try:
        connection.send((_smoked(folder, device), ""))
    except Exception as error:
        connection.send(("", f"{type(error).__name__}: {error}"))


def _smoked(folder: Path, device: str) -> str:
    from pytest_mistral_lora.chat.row_files import read_rows
    from pytest_mistral_lora.training.generate.model_spec import model_spec, smoke

    spec = model_spec(folder / "adapter", folder / "base", device=device)
    result = smoke(spec, list(read_rows(folder / "rows.jsonl")), max_new_tokens=_MAX_NEW_TOKENS)
    return json.dumps(result, allow_nan=False)


def _failure(folder: Path, reason: str, detail: str) -> MistralLoraError:
    return MistralLoraError(
        f"the saved adapter cannot be used in a new process ({reason}): {detail}", place=str(folder / "adapter")
    )


# Of the largest logit, in float32; 3e-6 was measured.
_MERGED_TOLERANCE = 5e-5

_NEW_TOKENS = 16


def measure_generation(harness: TrainerHarness) -> Figures:
    """Generate an answer to each row, also by a hand-written greedy search, and in batches padded on either side."""
    import torch
    from transformers import GenerationConfig

    from pytest_mistral_lora.chat.row_files import read_rows
    from pytest_mistral_lora.training.generate import generate

    model = load_run(harness.adapter, harness.base)
    rows, eos = list(read_rows(harness.rows)), harness.encoder.eos_id
    answers = [
        list(completion.ids) for completion in generate(model, harness.encoder, rows, max_new_tokens=_NEW_TOKENS)
    ]
    prompts = [list(harness.encoder.prompt(row)) for row in rows]
    by_hand = []
    with torch.inference_mode():
        for prompt in prompts:
            # without a cache, a mask, or transformers' own loop
            ids = prompt.copy()
            while len(ids) < len(prompt) + _NEW_TOKENS and (len(ids) == len(prompt) or ids[-1] != eos):
                ids.append(int(row_logits(model, ids)[-1].argmax()))
            by_hand.append(ids[len(prompt) :])
    figures: dict[str, Any] = {"generated": answers, "by_hand": by_hand}
    length = max(map(len, prompts))
    config = GenerationConfig(do_sample=False, max_new_tokens=_NEW_TOKENS, eos_token_id=eos, pad_token_id=0)
    for side in ("left", "right"):
        ids_and_mask = []
        for columns in (prompts, [[1] * len(prompt) for prompt in prompts]):
            pads = [[0] * (length - len(column)) for column in columns]
            pairs = zip(pads, columns, strict=True)
            ids_and_mask.append(
                torch.tensor([pad + values if side == "left" else values + pad for pad, values in pairs])
            )
        with torch.inference_mode():
            output = model.generate(ids_and_mask[0], attention_mask=ids_and_mask[1], generation_config=config)
        rows_of_ids = output[:, length:].tolist()
        figures[side] = [row[: row.index(eos) + 1] if eos in row else row for row in rows_of_ids]
    return figures


def _judge_generation(figures: Figures, device: str) -> Iterator[Finding]:
    for name, expected in (("by_hand", "a greedy search by hand"), ("left", "a batch that is padded on the left")):
        for index, (answer, other) in enumerate(zip(figures["generated"], figures[name], strict=True)):
            if answer != other:
                yield Finding(
                    "ML324", f"generated {answer}", NOWHERE / f"row {index + 1}", f"{other}, as {expected} does"
                )
    # padding on the right must do harm here, or these rows could not reveal it in a trainer
    if figures["right"] == figures["left"]:
        yield Finding("ML324", "padding on the right goes unseen", NOWHERE, "completions that show it")


def load_run(adapter: Path, base: Path) -> Any:
    """Return base and adapter in float32 on the CPU, as `smoke` loads them."""
    from pytest_mistral_lora.training.generate import load_adapted

    return load_adapted(AdapterFolder(adapter), BaseFolder(base), "fp32", "cpu")


def merged_model(adapter: Path, base: Path) -> Any:
    """Return base and adapter merged into one plain model, in float32 on the CPU."""
    return load_run(adapter, base).merge_and_unload(safe_merge=True)


def measure_merging(harness: TrainerHarness) -> Figures:
    """Compare the merged model with base and adapter.

    Returns:
        `apart`: largest difference of a logit, relative to the largest one; `other_choices`: number of supervised
        positions with another greedy id; `strength`: how many times the update is in the weights, 1 if merged once.
    """
    import torch
    from safetensors.torch import load_file

    whole = load_run(harness.adapter, harness.base)
    merged = merged_model(harness.adapter, harness.base).eval()
    apart, largest, choices = 0.0, 0.0, 0
    with torch.inference_mode():
        for row in harness.encoded:
            expected, found = (row_logits(model, row.input_ids) for model in (whole, merged))
            apart = max(apart, float((found - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
            places = [place - 1 for place, _ in supervised_positions(row)]
            choices += int((found.argmax(-1) != expected.argmax(-1))[places].sum())
    base = {name: tensor.double() for name, tensor in plain_model(harness.base, torch.float32).state_dict().items()}
    weights = {name: tensor.double() for name, tensor in merged.state_dict().items()}
    # least squares over all adapted weights: with U = scale * B @ A, strength = <W' - W, U> / <U, U>
    along, square = 0.0, 0.0
    for name, wanted in merge_by_hand(base, load_file(harness.adapter / "adapter_model.safetensors"), SCALE).items():
        update = wanted - base[name]
        along += float(((weights[name] - base[name]) * update).sum())
        square += float((update * update).sum())
    return {"apart": apart / largest, "other_choices": choices, "strength": along / square}


def _judge_merging(figures: Figures, device: str) -> Iterator[Finding]:
    if figures["apart"] > _MERGED_TOLERANCE or figures["other_choices"]:
        found = f"logits are {figures['apart']:.2g} apart, relatively; {figures['other_choices']} greedy ids differ"
        yield Finding(
            "ML325", found, Place.of("the merged model"), f"at most {_MERGED_TOLERANCE} apart, and the same ids"
        )
    if abs(figures["strength"] - 1) > 1e-3:
        found = f"the adapter is merged {figures['strength']:.3f} times"
        yield Finding("ML325", found, Place.of("the merged model"), "once, scaled by alpha / r")


ADAPTER_LAWS = (
    TrainingLaw("ML324", measure_generation, _judge_generation, needs_adapter=True),
    TrainingLaw("ML325", measure_merging, _judge_merging, needs_adapter=True),
)

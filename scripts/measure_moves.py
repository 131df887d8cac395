"""Measure how log-probabilities move by dtype and quantisation: `python scripts/measure_moves.py SIZE LAYERS STEPS`.

A tiny model is trained for some steps, so that its answers are more or less certain, its answers are recorded, and
llama.cpp (the package `xllamacpp`) answers the same prompts with its weights in each form. The table of
`records.judgement.TOLERANCES` lies above what this printed for several sizes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support")]

import gguf  # noqa: E402
from gguf_files import write_gguf  # noqa: E402
from learned_rows import LEARNED  # noqa: E402
from llamacpp_process import converted_model, served, write_lora  # noqa: E402

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer  # noqa: E402
from pytest_mistral_lora.chat.row_files import read_rows  # noqa: E402
from pytest_mistral_lora.checkpoint import tiny_model  # noqa: E402
from pytest_mistral_lora.conformance.train.harness import TrainerHarness  # noqa: E402
from pytest_mistral_lora.records.transcripts import load_folder  # noqa: E402
from pytest_mistral_lora.training.generate.model_spec import record_rows  # noqa: E402
from pytest_mistral_lora.training.run import train  # noqa: E402

KINDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q5": "Q5_0", "q4": "Q4_0"}
GREEDY = {"temperature": 0, "samplers": ["temperature"], "n_probs": 1, "return_tokens": True, "cache_prompt": False}


def main(size: int, layers: int, steps: int, folder: Path) -> None:
    """Print the moves of a model of a size, trained for some steps."""
    tiny_model.HIDDEN_SIZE, tiny_model.LAYERS = size, layers
    harness, source = TrainerHarness(folder, folder, "cpu"), shipped_tokenizer("spm-v3")
    tiny_model.write_tiny_base(harness.base, source)
    harness.rows.write_text("".join(json.dumps(row) + "\n" for row in LEARNED), encoding="utf-8")
    train(harness.recipe(harness.adapter, steps=steps, batch_size=len(LEARNED)))
    rows = list(read_rows(harness.rows))
    record_rows(harness.adapter, rows, folder / "answers", harness.base, max_new_tokens=32, device="cpu")
    transcripts = load_folder(folder / "answers")
    fields, tensors = converted_model(harness.base, Oracle(source))
    lora = write_lora(folder / "lora.gguf", harness.adapter, harness.base)
    for name, scale in [*((kind, 1.0) for kind in KINDS), ("fp32", 0.6)]:
        file = write_gguf(folder / "m.gguf", fields, tensors, kind=getattr(gguf.GGMLQuantizationType, KINDS[name]))
        moves, same = [], 0
        with served(file, lora=str(lora), scale=scale) as (post, _):
            for golden in transcripts:
                limit = {"n_predict": golden.max_new_tokens, "prompt": list(golden.prompt_ids)}
                answer = post("/completion", {**limit, **GREEDY})
                listed, made = answer["completion_probabilities"], answer["tokens"]
                same += tuple(made[: len(golden.completion_ids)]) == golden.completion_ids
                if len(listed) != len(made):
                    continue  # it leaves out tokens that end within a character
                for token, step, recorded, before in zip(
                    made, listed, golden.completion_ids, golden.logprobs, strict=False
                ):
                    if token != recorded:
                        break
                    moves.append(abs(step["logprob"] - before))
        mean, most = fmean(moves or [0.0]), max(moves, default=0.0)
        scaled = "" if scale == 1 else f", the adapter x {scale}"
        number = f"{same} of {len(transcripts)} answers the same, {len(moves)} tokens"
        print(f"{size} x {layers}, {steps} steps, {name}{scaled}: {number}: {most:.4f} at most, {mean:.4f} on average")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(*map(int, sys.argv[1:4]), Path(temporary))

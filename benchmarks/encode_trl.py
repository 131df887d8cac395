"""Time how TRL's SFTTrainer prepares rows: `python encode_trl.py TOKENIZER_FOLDER ROWS.json` prints [seconds, CPU].

TRL prepares its rows when the trainer is made, so a trainer of one row is made as well, and its time taken off.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_caching
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM
from trl import SFTConfig, SFTTrainer


def make(tokenizer: Any, rows: list[dict[str, Any]], work: str) -> tuple[float, float]:
    """Make a trainer of rows, and return how long that took."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **shape))
    arguments = SFTConfig(
        output_dir=work,
        assistant_only_loss=True,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    start, cpu = time.perf_counter(), time.process_time()
    SFTTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return time.perf_counter() - start, time.process_time() - cpu


def main(folder: str, file: str) -> None:
    """Print the seconds for all rows of a file but one."""
    disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = json.loads(Path(file).read_text())
    with tempfile.TemporaryDirectory() as work:
        make(tokenizer, rows[:1], work)
        few, many = make(tokenizer, rows[:1], work), make(tokenizer, rows, work)
    sys.stdout.write(f"\n{json.dumps([more - less for more, less in zip(many, few, strict=True)])}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

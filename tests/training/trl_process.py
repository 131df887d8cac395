"""Run TRL's own code in a process of its own: `python trl_process.py RESULT (--config FILE | MODEL TEMPLATE ROWS)`.

With a configuration, its run is made. With a model, a template and rows, nothing is trained: what TRL would train on is
written, with `assistant_only_loss` on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def run(config: str) -> dict[str, Any]:
    """Train as `trl sft --config` does, in the current folder."""
    import trl
    from trl.scripts import sft

    seen: dict[str, Any] = {}
    train = trl.SFTTrainer.train

    def recording(self: Any, *args: Any, **options: Any) -> Any:
        seen["rows"] = encoded(self)
        result = train(self, *args, **options)
        seen["log"] = self.state.log_history
        return result

    trl.SFTTrainer.train = recording
    script, training, model, data = sft.make_parser().parse_args_and_config(["--config", config])
    sft.main(script, training, model, data)
    return seen


def assistant_only(model: str, template: str, rows: str) -> dict[str, Any]:
    """Prepare rows with a template, each alone, so that no row gets the keys of others."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if template:
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    arguments = SFTConfig(
        "out", assistant_only_loss=True, max_length=None, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True
    )
    loaded = AutoModelForCausalLM.from_pretrained(model)
    found = []
    for line in filter(None, Path(rows).read_text(encoding="utf-8").split("\n")):
        try:
            dataset = Dataset.from_list([json.loads(line)])
            trainer = SFTTrainer(loaded, arguments, train_dataset=dataset, processing_class=tokenizer)
            found += encoded(trainer)
        except Exception as error:
            found.append({"error": f"{type(error).__name__}: {error}"})
    return {"rows": found}


def encoded(trainer: Any) -> list[dict[str, Any]]:
    """Return what the trainer's collator makes of each row alone, up to its padding."""
    found = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        length = int(batch["attention_mask"][0].sum())
        found.append({name: batch[name][0][:length].tolist() for name in ("input_ids", "labels")})
    return found


if __name__ == "__main__":
    output, *words = sys.argv[1:]
    result = run(words[1]) if words[0] == "--config" else assistant_only(*words)
    Path(output).write_text(json.dumps(result), encoding="utf-8")

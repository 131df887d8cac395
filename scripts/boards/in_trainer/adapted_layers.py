"""Which layers a trainer gives an adapter, and which tokenizer it loads: run by its own Python, up to the first step.

    python adapted_layers.py NAME CHECKPOINT FOLDER SETTINGS

`SETTINGS` is a JSON object in the trainer's own keys. The last line of standard output is a JSON object: the `version`
of the trainer, and `layers`, the adapted modules by their names in memory, with `tokenizer`, its class, or `error`.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

_TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


class CapturedError(Exception):
    """Ends a training run before its first step."""


def trl(checkpoint: Path, folder: Path, rows: Path, settings: dict[str, Any]) -> None:
    """Run `trl sft`."""
    from trl.scripts import sft

    own = {"model_name_or_path": str(checkpoint), "dataset_name": str(rows.parent), "output_dir": str(folder / "out")}
    config = {**own, "use_cpu": True, "bf16": False, "report_to": "none", "use_peft": True, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    sft.main(*sft.make_parser().parse_args_and_config(["--config", str(folder / "config.yaml")]))


def axolotl(checkpoint: Path, folder: Path, rows: Path, settings: dict[str, Any]) -> None:
    """Run `axolotl train`."""
    from axolotl.cli.train import do_cli

    data = {"path": str(rows), "ds_type": "json", "type": "chat_template"}
    config = {
        "base_model": str(checkpoint),
        "datasets": [data],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "sequence_len": 256,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "max_steps": 1,
        "num_epochs": 1,
        "bf16": False,
        "dataset_num_proc": 1,
        **settings,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    do_cli(str(folder / "config.yaml"))


def llamafactory(checkpoint: Path, folder: Path, rows: Path, settings: dict[str, Any]) -> None:
    """Run `llamafactory-cli train`."""
    package = Path(__file__).parents[3] / "pytest_mistral_lora"
    sys.path[:0] = [
        str(package / "runners" / "scripts"),
        str(package / "field" / "trainers" / "llamafactory" / "runner"),
    ]
    from llamafactory_rows import stand_in_for_torchaudio

    stand_in_for_torchaudio()
    from llamafactory.train.tuner import run_exp

    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": rows.name, "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (rows.parent / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    own = {"model_name_or_path": str(checkpoint), "output_dir": str(folder / "out"), "dataset_dir": str(rows.parent)}
    run_exp({**own, "stage": "sft", "do_train": True, "finetuning_type": "lora", "dataset": "rows", **settings})


def ms_swift(checkpoint: Path, folder: Path, rows: Path, settings: dict[str, Any]) -> None:
    """Run `swift sft`."""
    from swift.pipelines.train.sft import SwiftSft

    own = {"model": str(checkpoint), "output_dir": str(folder / "out"), "dataset": str(rows), "tuner_type": "lora"}
    config = {**own, "torch_dtype": "float32", "use_hf": True, "check_model": False, "report_to": "none", **settings}
    SwiftSft([word for name, value in config.items() for word in (f"--{name}", str(value))]).run()


RUN = {"trl": trl, "axolotl": axolotl, "llamafactory": llamafactory, "ms-swift": ms_swift}


def main() -> None:
    """Run a trainer, and print what it made."""
    name, checkpoint, folder, settings = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
    sys.argv = sys.argv[:1]
    import transformers

    found: dict[str, Any] = {}

    def stop(self: Any, *given: Any, **named: Any) -> None:
        tokenizer = getattr(self, "processing_class", None) or getattr(self, "tokenizer", None)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        found["tokenizer"] = type(tokenizer).__name__
        found["layers"] = [
            layer.removeprefix("base_model.model.")
            for layer, module in self.model.named_modules()
            if hasattr(module, "lora_A")
        ]
        raise CapturedError

    transformers.Trainer._inner_training_loop = stop
    rows = folder / "data" / "train.jsonl"
    rows.parent.mkdir()
    rows.write_text("".join(json.dumps({"messages": _TURNS}) + "\n" for _ in range(4)))
    try:
        RUN[name](checkpoint, folder, rows, settings)
    except CapturedError:
        pass
    except Exception as error:
        found = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    print("\n" + json.dumps({"version": version(name), **(found or {"error": "it ended before it trained"})}))


if __name__ == "__main__":
    main()

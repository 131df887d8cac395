"""Stands in for llama.cpp's `convert_hf_to_gguf.py` and `convert_lora_to_gguf.py`, by whose names it is run.

The real ones are 200 MB of packages away, and refuse a vocabulary that is cut: test_converters.py runs them. Like them,
this one reads the exported folder alone, and names the splitter of each Tekken vocabulary `pixtral`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

# it is run through a link in a folder of its own
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from gguf_files import (
    CONTROL,
    NORMAL,
    adapter_fields,
    adapter_tensors,
    model_fields,
    model_tensors,
    tokenizer_fields,
    write_gguf,
)
from safetensors.numpy import load_file

from pytest_mistral_lora.chat.oracle import Oracle


def vocabulary(folder: Path) -> dict[str, Any]:
    """Return the fields of the tokenizer in a folder."""
    if (folder / "tokenizer.model").is_file():
        with tempfile.TemporaryDirectory() as temporary:
            oracle = Oracle(Path(shutil.copy(folder / "tokenizer.model", Path(temporary) / "tokenizer.model.v3")))
            fields = tokenizer_fields(oracle)
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return {**fields, "tokenizer.ggml.add_space_prefix": config.get("add_prefix_space")}
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    control = {token["id"]: token["content"] for token in data["added_tokens"] if token["special"]}
    by_id = {number: token for token, number in data["model"]["vocab"].items()} | control
    ids = {token: number for number, token in control.items()}
    fields = {
        "model": "gpt2",
        "pre": "pixtral",
        "tokens": [by_id[number] for number in range(len(by_id))],
        "token_type": [CONTROL if number in control else NORMAL for number in range(len(by_id))],
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in data["model"]["merges"]],
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "unknown_token_id": ids["<unk>"],
    }
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def convert_model(folder: Path, output: Path) -> None:
    """Write the GGUF file of a model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    fields = {**model_fields(config), **vocabulary(folder), "tokenizer.chat_template": template}
    weights = {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}
    write_gguf(output, fields, model_tensors(weights, config))


def convert_adapter(folder: Path, base: Path, output: Path) -> None:
    """Write the GGUF file of an adapter."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    fields = adapter_fields(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))
    write_gguf(output, fields, adapter_tensors(load_file(folder / "adapter_model.safetensors"), config))


def main() -> None:
    """Convert the folder that the command line names."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--outtype", choices=["f32"])
    parser.add_argument("--outfile", type=Path, required=True)
    given = parser.parse_args()
    if Path(sys.argv[0]).name == "convert_lora_to_gguf.py":
        convert_adapter(given.folder, given.base, given.outfile)
    else:
        convert_model(given.folder, given.outfile)


if __name__ == "__main__":
    main()

"""`README.md`: the model card, with the metadata that the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml

from pytest_mistral_lora.records.own_part import empty_part

CARD = "README.md"


def card_text(manifest: Mapping[str, Any]) -> str:
    """Return the model card of an adapter or a merged model.

    The front matter has the Hub's keys (https://huggingface.co/docs/hub/model-cards#model-card-metadata); what the
    recipe's `card` gives comes after them.
    """
    front = f"---\n{_metadata(manifest)}---"
    return "\n\n".join([front, _title(manifest), empty_part(), _use(manifest), _facts(manifest)]) + "\n"


def _metadata(manifest: Mapping[str, Any]) -> str:
    merged = manifest["kind"] == "merged"
    known = {
        "base_model": _hub_id(manifest["base"]),
        "base_model_relation": "finetune" if merged else "adapter",
        "datasets": [_hub_id(entry["path"]) for entry in manifest.get("dataset", {}).get("files", ())],
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "mistral"],
    }
    own = manifest.get("recipe", {}).get("card", {})
    return yaml.safe_dump({**known, **own}, sort_keys=False, allow_unicode=True)


def _hub_id(name: str) -> str:
    """Return a name that the Hub takes in metadata: it refuses a card with paths in it."""
    return name if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) else PurePosixPath(name).name or "local"


def _title(manifest: Mapping[str, Any]) -> str:
    base = f"`{manifest['base']}`" + (f" at `{manifest['revision']}`" if manifest["revision"] else "")
    if manifest["kind"] == "merged":
        return (
            f"# {_hub_id(manifest['base'])}, fine-tuned and merged\n\nFull weights: {base} with a LoRA adapter merged "
            "into it. It is a model of its own: no adapter of the base is valid on it."
        )
    return f"# LoRA adapter of {_hub_id(manifest['base'])}\n\nAn adapter, not a model. It is valid on {base} only."


def _use(manifest: Mapping[str, Any]) -> str:
    if manifest["kind"] == "merged":
        return '## Use\n\n```python\nmodel = AutoModelForCausalLM.from_pretrained("this folder")\n```'
    pin = f', revision="{manifest["revision"]}"' if manifest["revision"] else ""
    return (
        f'## Use\n\n```python\nbase = AutoModelForCausalLM.from_pretrained("{manifest["base"]}"{pin})\n'
        'model = PeftModel.from_pretrained(base, "this folder")\n```'
    )


def _facts(manifest: Mapping[str, Any]) -> str:
    tokenizer = manifest["tokenizer"]
    return (
        f"Prompts are those of `{tokenizer['file']}` ({tokenizer['version'] or tokenizer['backend']}), in this "
        "folder. [DECISION.md](DECISION.md) says what was trained on what, and how to do it again; `manifest.json` has "
        "every hash, and `mistral-lora verify .` computes them again."
    )

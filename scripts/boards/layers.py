"""Which layers other trainers give an adapter on tiny checkpoints of today's classes, recorded with the trainers.

Beside the trainers, the environments of `mistral-lora runner setup` need PEFT (TRL), torchvision, and triton and
evaluate (Axolotl): encoded rows need none of them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boards.inputs import derived_tekken
from boards.tables import head
from boards.trainers import RECORDED
from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, Architecture
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.runners import TRAINERS, interpreter

FILE = RECORDED / "layers.json"
TEXTS = ("mistral", "ministral3", "mistral4")
"""The text models in a `Mistral3ForConditionalGeneration`: as in Small 3.2, in Ministral 3, and in Small 4."""

# with tekken.json in the folder, the tokenizer that Axolotl loads by default has no template, and refuses answers
_MISTRAL_COMMON = {"tokenizer_use_mistral_common": True}
_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj"]
# https://github.com/axolotl-ai-cloud/axolotl/blob/main/examples/mistral4/qlora-text.yml
_REGEX = r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj"


@dataclass(frozen=True)
class Setting:
    """A trainer with the keys that choose its layers.

    Attributes:
        runner: Its name.
        about: The keys, as a reader would write them.
        keys: The keys, with others that the trainer asks for.
    """

    runner: str
    about: str
    keys: dict[str, Any]


SETTINGS = (
    Setting("trl", "lora_target_modules: all-linear", {"lora_target_modules": "all-linear"}),
    Setting("trl", f"lora_target_modules: [{', '.join(_NAMES)}]", {"lora_target_modules": _NAMES}),
    Setting("axolotl", "lora_target_linear: true", {"lora_target_linear": True, **_MISTRAL_COMMON}),
    Setting(
        "axolotl", f"lora_target_modules: '{_REGEX}' (its examples)", {"lora_target_modules": _REGEX, **_MISTRAL_COMMON}
    ),
    Setting("llamafactory", "lora_target: all (default)", {"template": "mistral_small"}),
    Setting("ms-swift", "target_modules: all-linear (default)", {"model_type": "mistral3", "system": "Be brief."}),
)


def make_checkpoint(text: str, folder: Path) -> Path:
    """Make a tiny model of text and images, with files as on the Hub: `tekken.json`, `tokenizer.json`, a template."""
    kind = Architecture(TEXT_MODELS[text], is_wrapped=True)
    tokenizer = derived_tekken().write_derived("derived-v13", folder, words=2000)
    checkpoint = write_tiny_base(folder / "base", tokenizer, architecture=kind)
    CheckpointTokenizer(checkpoint).fast.save_pretrained(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    # written by a newer transformers than some trainers pin; Mistral's own files have none
    config["vision_config"].pop("rope_parameters", None)
    write_json(checkpoint / "config.json", config)
    return checkpoint


def run(setting: Setting, checkpoint: Path) -> dict[str, Any]:
    """Return what a trainer adapts, or its error."""
    script = Path(__file__).parent / "in_trainer" / "adapted_layers.py"
    quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled"}
    with tempfile.TemporaryDirectory() as folder:
        own = {"HF_HOME": folder, "MODELSCOPE_CACHE": folder}
        words = [
            interpreter(TRAINERS[setting.runner]),
            script,
            setting.runner,
            checkpoint,
            folder,
            json.dumps(setting.keys),
        ]
        ended = subprocess.run(
            list(map(str, words)), env={**os.environ, **quiet, **own}, capture_output=True, text=True, check=False
        )
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    found: dict[str, Any] = (
        json.loads(lines[-1]) if lines else {"error": (ended.stderr.splitlines() or ["nothing"])[-1]}
    )
    return found


def record(runner: str) -> None:
    """Run a trainer on each checkpoint with each of its settings, and add what it makes to the record."""
    for text in TEXTS:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = make_checkpoint(text, Path(folder))
            for setting in (one for one in SETTINGS if one.runner == runner):
                made = run(setting, checkpoint)
                # at once, and this alone: another trainer may be recorded meanwhile
                write_json(FILE, {**read(), f"{setting.runner}: {setting.about}: {text}": made})


def read() -> dict[str, dict[str, Any]]:
    """Return what is recorded, by trainer, keys and text model."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    return found


def table() -> Iterator[str]:
    """Yield the lines of the table of the page."""
    yield from head("trainer, its keys", *TEXTS, "tokenizer")
    recorded = read()
    for one in SETTINGS:
        found = [recorded.get(f"{one.runner}: {one.about}: {text}", {}) for text in TEXTS]
        loaded = ", ".join(dict.fromkeys(each["tokenizer"] for each in found if "tokenizer" in each))
        versions = ", ".join(dict.fromkeys(each["version"] for each in found if "version" in each))
        # in code between backquotes, the site would show the backslash of an escaped bar
        about = f"<code>{one.about.replace('|', '&#124;')}</code>"
        yield f"| {one.runner} {versions}: {about} | {' | '.join(_described(each) for each in found)} | {loaded} |"


def _described(found: dict[str, Any]) -> str:
    """Return the kinds of layers, in the text model, and those elsewhere."""
    if "layers" not in found:
        return f"refused: {found['error']}".replace("|", "\\|")[:160] if found else "not run"
    text = _kinds(name for name in found["layers"] if ".language_model." in name)
    rest = [name for name in found["layers"] if ".language_model." not in name]
    places = {part: sum(part in name for name in rest) for part in ("vision_tower", "multi_modal_projector", "lm_head")}
    also = ", ".join(f"{count} in `{part}`" for part, count in places.items() if count)
    return f"{text or 'no layer of the text'}{f'; **{also}**' if also else ''}"


def _kinds(names: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(re.sub(r".*layers\.\d+\.(?:self_attn\.|mlp\.)?", "", name) for name in names))

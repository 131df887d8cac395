"""Write the memory that each recipe to copy needs: `python scripts/write_recipe_memory.py [--check]`.

The estimate is that of `mistral-lora check --device-memory`, from the dimensions in `dimensions.json`, which has the
source of each. Nothing is measured on the published weights.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.training.memory import RunMemory, parse_size, recipe_memory
from pytest_mistral_lora.training.recipe import load_recipe
from pytest_mistral_lora.training.step.memory_need import in_words

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
DIMENSIONS = RECIPES / "dimensions.json"
DEVICES = ("24GB", "48GB", "80GB")
HEADER = (
    "| recipe | memory in all | base in bf16 | adapter, gradients, optimizer | tokens at once | on 24 GB | on 48 GB |\n"
)
NOTE = "# Memory, computed from dimensions.json and not measured on the published weights: "


def configurations() -> dict[str, dict[str, Any]]:
    """Return the `config.json` of each recipe's checkpoint, as far as memory depends on it, by the recipe's name."""
    data = json.loads(DIMENSIONS.read_text(encoding="utf-8"))
    found = {}
    for name, one in data["recipes"].items():
        config = dict(one["config"])
        if "vision_config" in config:
            config["vision_config"] = data["vision"][config["vision_config"]]["config"]
        found[name] = config
    return found


def write_base(folder: Path, name: str) -> Path:
    """Write the configuration of a recipe's checkpoint into a folder, and return the folder."""
    (folder / "config.json").write_text(json.dumps(configurations()[name]), encoding="utf-8")
    return folder


def memory(name: str) -> RunMemory:
    """Return the estimate for a recipe; its parts are computed already."""
    with tempfile.TemporaryDirectory() as folder:
        found = recipe_memory(load_recipe(RECIPES / f"{name}.yaml"), BaseFolder(write_base(Path(folder), name)))
        _ = found.need
    return found


def on_device(found: RunMemory, device: str) -> str:
    """Return whether a recipe fits into the memory of a device, or the settings with which it does."""
    size = parse_size(device, place=device)
    usable = found.usable(size)
    if found.total <= usable:
        return "fits"
    # the recipes checkpoint already, and shorter rows would be other data
    fitting = {one.setting.removesuffix(", checkpointed"): one.bytes for one in found.savings(size)}
    fitting = {name: bytes_ for name, bytes_ in fitting.items() if bytes_ <= usable and not name.startswith("rows")}
    return "; ".join(f"{name}: {in_words(bytes_)}" for name, bytes_ in fitting.items()) or "no setting fits"


def row(name: str, found: RunMemory) -> str:
    """Return a recipe's row of the table."""
    parts = [in_words(size) for size in found.parts().values()]
    cells = [
        f"[{name}.yaml]({name}.yaml)",
        in_words(found.total),
        *parts,
        *(on_device(found, one) for one in DEVICES[:2]),
    ]
    return f"| {' | '.join(cells)} |\n"


def comment(found: RunMemory) -> str:
    """Return the line of a recipe's own comment."""
    smallest = next((one for one in DEVICES if found.total <= found.usable(parse_size(one, place=one))), None)
    fits = f"fits {smallest}" if smallest else "fits none of " + ", ".join(DEVICES)
    return f"{NOTE}{in_words(found.total)}; {fits}.\n"


def main() -> int:
    """Write the files, or with `--check` compare them; return 1 if one differs."""
    page = RECIPES / "README.md"
    rows, files = [], {}
    for name in configurations():
        found, file = memory(name), RECIPES / f"{name}.yaml"
        rows.append(row(name, found))
        text = file.read_text(encoding="utf-8")
        files[file] = re.sub(rf"^{NOTE}.*\n", comment(found), text, count=1, flags=re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    before, _, after = text.partition(HEADER)
    rule = "|---" * HEADER.count(" | ") + "|---|\n"
    files[page] = before + HEADER + rule + "".join(rows) + "\n" + after.partition("\n\n")[2]
    differing = [file for file, new in files.items() if file.read_text(encoding="utf-8") != new]
    for file in differing:
        print(f"{file.name} {'differs' if '--check' in sys.argv else 'written'}")
        if "--check" not in sys.argv:
            write_text(file, files[file])
    return 1 if differing and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())

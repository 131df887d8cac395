"""The verbs of the command line, and the least words that each has to be given."""

from __future__ import annotations

from pytest_mistral_lora.cli import VERBS

VERB_OF = {name: verb for group in VERBS.values() for name, verb in group.items()}
WORDS = {
    "init": [],
    "import": ["rows.json", "--to", "rows.jsonl"],
    "stats": ["recipe.yaml"],
    "check": [],
    "render": ["rows.jsonl", "--tokenizer", "."],
    "train": ["recipe.yaml"],
    "verify": ["out"],
    "smoke": ["out"],
    "chat": ["out"],
    "merge": ["out", "merged"],
    "export": ["recipe.yaml", "--to", "trl", "--output", "to"],
    "serve-check": ["openai=http://127.0.0.1:9", "--tokenizer", "."],
    "doctor": [],
    "pin": ["a/b"],
    "rules": [],
    "compare": ["main.json", "pr.json"],
    "diff": ["a", "b"],
    "note": ["out"],
    "template": ["--tokenizer", "."],
    "runner": ["list"],
}
"""The least that each verb has to be given."""

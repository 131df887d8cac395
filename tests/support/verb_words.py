"""The verbs of the command line, and the least words that each has to be given."""

from __future__ import annotations

from pytest_mistral_lora.cli import VERBS

VERB_OF = {name: verb for group in VERBS.values() for name, verb in group.items()}
WORDS = {
    "init": [],
    "pin": ["a/b"],
    "doctor": [],
    "check": [],
    "audit": ["rows.jsonl", "--tokenizer", "."],
    "compare": ["main.json", "pr.json"],
    "render": ["rows.jsonl", "--tokenizer", "."],
    "rules": [],
    "import": ["rows.json", "--to", "rows.jsonl"],
    "stats": ["recipe.yaml"],
    "train": ["recipe.yaml"],
    "chat": ["out"],
    "smoke": ["out"],
    "merge": ["out", "merged"],
    "verify": ["out"],
    "diff": ["a", "b"],
    "note": ["out"],
    "serve-check": ["openai=http://127.0.0.1:9", "--tokenizer", "."],
    "export": ["recipe.yaml", "--to", "trl", "--output", "to"],
    "template": ["--tokenizer", "."],
    "runner": ["list"],
}
"""The least that each verb has to be given."""

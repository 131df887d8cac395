"""Good and bad values of every option and ini key, and what the plugin makes of them."""

from __future__ import annotations

from typing import Any

import torch

from pytest_mistral_lora.chat.objective import Declaration, Objective
from pytest_mistral_lora.conformance.known import Xfail
from pytest_mistral_lora.conformance.rule_set import RuleSet
from pytest_mistral_lora.conformance.server_target import ServerChoice
from pytest_mistral_lora.conformance.targets import RunnerChoice
from pytest_mistral_lora.records.asking_limits import AskingLimits

GOOD: dict[str, tuple[str | None, str, Any]] = {
    "--mistral-tokenizer": ("tok.model.v3", "tokenizers", lambda here: (here / "tok.model.v3",)),
    "--mistral-recipe": ("recipe.yaml", "recipes", lambda here: (here / "recipe.yaml",)),
    "--mistral-dataset": ("own/rows.jsonl", "datasets", lambda here: (here / "own" / "rows.jsonl",)),
    "--mistral-adapter": ("bare", "adapters", lambda here: (here / "bare",)),
    "--mistral-base": ("own", "base", lambda here: here / "own"),
    "--mistral-oracle": ("spm-v7", "oracle", lambda here: "spm-v7"),
    "--mistral-objective": (
        "no-calls, last-answer",
        "objective",
        lambda here: Declaration(Objective("last-answer", ("no-calls",)), "--mistral-objective"),
    ),
    "--mistral-encoded": ("own/rows.jsonl", "encoded", lambda here: (here / "own" / "rows.jsonl",)),
    "--mistral-server": (
        "vllm=http://127.0.0.1:8000/",
        "servers",
        lambda here: (ServerChoice("vllm", "http://127.0.0.1:8000"),),
    ),
    "--mistral-server-rows": ("own/rows.jsonl", "server_rows", lambda here: (here / "own" / "rows.jsonl",)),
    "--mistral-server-answers": (None, "server_answers", lambda here: True),
    "--mistral-server-request-seconds": ("600", "server_limits", lambda here: AskingLimits(seconds=600)),
    "--mistral-gguf": ("own/rows.jsonl", "ggufs", lambda here: (here / "own" / "rows.jsonl",)),
    "--mistral-runner": (
        "trl=own/rows.jsonl",
        "runners",
        lambda here: (RunnerChoice("trl", here / "own" / "rows.jsonl"),),
    ),
    "--mistral-allow-code": (None, "allow_code", lambda here: True),
    "--mistral-golden-dir": ("own", "golden_folders", lambda here: (here / "own",)),
    "--mistral-no-train": (None, "train", lambda here: False),
    "--mistral-device": ("cpu", "device", lambda here: "cpu"),
    "--mistral-examples": ("7", "examples", lambda here: 7),
    "--mistral-seed": ("0", "seed", lambda here: 0),
    "--mistral-fail-on": ("note, not-checked", "fail_on", lambda here: frozenset({"note", "not-checked"})),
    "--mistral-xfails": ("known.txt", "xfails", lambda here: (Xfail("ML204", "looked at", f"{here / 'known.txt'}:1"),)),
    "--mistral-rules": ("0.1", "rules", lambda here: RuleSet("0.1")),
    "--mistral-write-xfails": ("new.txt", "write_xfails", lambda here: here / "new.txt"),
    "--mistral-output-format": ("github", "output_format", lambda here: "github"),
    "--mistral-report": ("out.json", "report", lambda here: here / "out.json"),
}
NEEDS = {
    "--mistral-base": (("--mistral-adapter", "bare"), "adapters"),
    "--mistral-dataset": (("--mistral-tokenizer", "tok.model.v3"), "tokenizers"),
    "--mistral-server": (("--mistral-tokenizer", "tok.model.v3"), "tokenizers"),
    "--mistral-server-rows": (
        ("--mistral-server", "http://127.0.0.1:8000", "--mistral-tokenizer", "tok.model.v3"),
        "servers tokenizers",
    ),
    "--mistral-server-answers": (
        ("--mistral-server", "http://127.0.0.1:8000", "--mistral-tokenizer", "tok.model.v3"),
        "servers tokenizers",
    ),
    "--mistral-server-request-seconds": (
        ("--mistral-server", "http://127.0.0.1:8000", "--mistral-tokenizer", "tok.model.v3"),
        "servers tokenizers",
    ),
    "--mistral-encoded": (("--mistral-tokenizer", "tok.model.v3"), "tokenizers"),
    "--mistral-objective": (
        ("--mistral-encoded", "own/rows.jsonl", "--mistral-tokenizer", "tok.model.v3"),
        "encoded tokenizers",
    ),
}
"""Options that make no sense alone: what goes with them, and which settings that changes."""
DEFAULTS = {
    "tokenizers": (),
    "recipes": (),
    "datasets": (),
    "adapters": (),
    "base": None,
    "oracle": None,
    "objective": None,
    "encoded": (),
    "ggufs": (),
    "servers": (),
    "server_rows": (),
    "server_answers": False,
    "server_limits": AskingLimits(),
    "runners": (),
    "allow_code": False,
    "require_manifest": False,
    "golden_folders": (),
    "update": False,
    "train": True,
    "device": "auto",
    "examples": 20,
    "seed": None,
    "fail_on": frozenset(),
    "xfails": (),
    "rules": None,
    "leaves_out_targets": False,
    "write_xfails": None,
    "output_format": "text",
    "report": None,
}
RECIPE = f"""\
base: {{path: own, weights_sha256: {"a" * 64}}}
data: {{train: [own/rows.jsonl]}}
training: {{steps: 1, learning_rate: 1e-3, batch_size: 1, micro_batch_tokens: 1}}
output: out
"""
NO_CUDA = (f"torch {torch.__version__} finds no CUDA device", "expected auto or cpu")
NAMES = "spm-v1, spm-v2, spm-v3, spm-v7, spm-v7m1, tekken-240718, tekken-240911"
NO_ORACLE = ("spm-v8: ", f"expected {NAMES}, none, ")
NO_RUNNER = ("'nope'", "expected one of trl, axolotl, llamafactory, ms-swift, lm-eval, ")
NO_TOKENIZER = ("no such file or folder: nope", NAMES)
LONG = f"{'x' * 300}.json"
BAD = [
    ("--mistral-tokenizer", "nope", NO_TOKENIZER),
    ("--mistral-dataset", "nope", ("no such file or folder: nope",)),
    ("--mistral-recipe", "nope", ("no such file or folder: nope",)),
    ("--mistral-tokenizer", LONG, (f"{LONG}: ", "too long")),
    ("--mistral-recipe", LONG, (f"{LONG}: ", "too long")),
    ("--mistral-recipe", "bare", ("a folder: bare",)),
    ("--mistral-adapter", "tok.model.v3", ("not a folder: tok.model.v3",)),
    ("--mistral-base", "tok.model.v3", ("not a folder: tok.model.v3",)),
    ("--mistral-oracle", "spm-v8", NO_ORACLE),
    ("--mistral-objective", "last", ("'last' is no objective", "last-answer")),
    ("--mistral-objective", "answers,answers", ("names a word twice",)),
    ("--mistral-encoded", "nope", ("no such file or folder: nope",)),
    ("--mistral-gguf", "own", ("a folder: own",)),
    (
        "--mistral-server",
        "lmstudio=http://127.0.0.1",
        ("'lmstudio'", "expected one of llamacpp, vllm, sglang, ollama, openai, "),
    ),
    ("--mistral-server-request-seconds", "0", ("'0'; expected a whole number, 1 or more",)),
    ("--mistral-server-request-seconds", "1.5", ("'1.5'; expected a whole number",)),
    ("--mistral-fail-on", "notes", ("'notes' (did you mean 'note'?)", "expected note or not-checked")),
    ("--mistral-fail-on", "note,", ("''; expected note or not-checked",)),
    ("--mistral-runner", "nope", NO_RUNNER),
    ("--mistral-runner", "trl=nope", ("nope: no such file", "TRL")),
    ("--mistral-xfails", "nope", ("no such file or folder: nope",)),
    ("--mistral-rules", "9.9", ("'9.9'", "expected 0.1")),
    ("--mistral-golden-dir", "nope", ("no such file or folder: nope",)),
    ("--mistral-golden-dir", "tok.model.v3", ("not a folder: tok.model.v3",)),
    ("--mistral-golden-dir", "bare", ("rows (*.jsonl)", " in bare")),
    ("--mistral-device", "tpu", ("'tpu'; expected one of auto, cpu, cuda",)),
    ("--mistral-examples", "0", ("'0'; expected a whole number, 1 or more",)),
    ("--mistral-examples", "many", ("'many'; expected a whole number",)),
    ("--mistral-examples", "1.5", ("'1.5'; expected a whole number",)),
    ("--mistral-seed", "-1", ("'-1'; expected a whole number, 0 or more",)),
    ("--mistral-seed", "x", ("'x'; expected a whole number",)),
    ("--mistral-write-xfails", "known.txt", ("known.txt exists",)),
    ("--mistral-write-xfails", "nope/new.txt", ("nope: no such folder",)),
    ("--mistral-output-format", "sarif", ("'sarif'; expected one of text, github",)),
    ("--mistral-report", "out.txt", ("out.txt", ".html or .md")),
    ("--mistral-report", "nope/out.json", ("nope: no such folder",)),
    ("--mistral-report", LONG, (f"{LONG}: ", "too long")),
    ("--mistral-report", "folder.json", ("folder.json: ", "expected a file")),
]
"""Options with a value that they do not take, and what the error then has."""
BAD_INI = [
    ("mistral_tokenizers = nope", NO_TOKENIZER),
    ("mistral_datasets = nope", ("no such file or folder: nope",)),
    ("mistral_recipes = nope", ("no such file or folder: nope",)),
    ("mistral_runners = nope", NO_RUNNER),
    ("mistral_base = nope", ("no such file or folder: nope",)),
    ("mistral_oracle = spm-v8", NO_ORACLE),
    ("mistral_xfails = nope", ("no such file or folder: nope",)),
    ("mistral_rules = newest", ("'newest'", "expected 0.1")),
    ("mistral_require_manifest = maybe", ("'maybe'",)),
    ("mistral_golden_dirs = nope", ("no such file or folder: nope",)),
    ("mistral_golden_dirs = tok.model.v3", ("not a folder: tok.model.v3",)),
    ("mistral_golden_dirs = bare", ("rows (*.jsonl)", " in bare")),
    ("mistral_output_format = sarif", ("'sarif'; expected one of text, github",)),
    ("mistral_device = tpu", ("'tpu'; expected one of auto, cpu, cuda",)),
    ("mistral_server_request_seconds = long", ("'long'",)),
    ("mistral_examples = 0", ("0; expected a whole number, 1 or more",)),
    ("mistral_examples = many", ("'many'",)),
    ("mistral_fail_on = error", ("'error'", "expected note or not-checked")),
]
"""Lines of an ini file with such a value."""

"""What docs/runners.md says is true: its example runs, and is found to do what the page says."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.runners import TRAINERS

PAGE = (Path(__file__).parents[1] / "docs" / "runners.md").read_text(encoding="utf-8")


def test_the_example_is_a_runner_and_its_faults_are_found(
    mistral_lora: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    [script] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "my_runner.py").write_text(script)
    messages = [{"role": "user", "content": "[INST]"}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    command = re.findall(r"\$ mistral-lora (check --runner \./my_runner\.py .*)", PAGE)[0].split()
    words = [str(shipped_tokenizer("spm-v3")) if word == "checkpoints/my-mistral" else word for word in command]
    process = mistral_lora(*words, "--output-format=jsonl", folder=tmp_path)
    assert process.returncode == 1, process.stderr
    found = {json.loads(line).get("rule") for line in process.stdout.splitlines()} - {None}
    assert found == set(re.findall(r"ML\d+", PAGE.rpartition("the audit finds that")[2])) == {"ML523", "ML543"}


def test_every_runner_is_on_the_page_with_its_command() -> None:
    for runner in TRAINERS.values():
        assert f"| `{runner.name}` | `{runner.command} FILE` |" in PAGE

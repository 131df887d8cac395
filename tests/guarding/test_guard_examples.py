"""The scripts of `examples/guard`, and Axolotl's plugin, where their trainers are installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import run_forked
from guarded_runs import chat_rows, encoded, make_trainer

from pytest_mistral_lora import GuardError
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.guarding.callback import REPORTS

EXAMPLES = Path(__file__).parents[2] / "examples" / "guard"
PAGE = (Path(__file__).parents[2] / "docs" / "guard.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def saved_base(base: Path) -> Path:
    """The tiny base with the files that AutoTokenizer loads, as every checkpoint has them."""
    BaseFolder(base).tokenizer().fast.save_pretrained(base.parent / "tokenizer")
    for file in (base.parent / "tokenizer").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    return base


@pytest.mark.parametrize("name", ["transformers_guard.py", "trl_guard.py"])
def test_a_script_trains_and_prints_its_verdict(name: str, saved_base: Path, tmp_path: Path) -> None:
    if name.startswith("trl"):
        pytest.importorskip("trl", reason="TRL is not installed here; tox run -e runner-trl")
    lines = [json.dumps({"messages": list(row.messages)}) for row in chat_rows(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    command = [sys.executable, EXAMPLES / name, saved_base, tmp_path / "rows.jsonl", tmp_path / "out"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = run_forked(command, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "guard: " in done.stdout
    assert "0 findings" in done.stdout


@pytest.mark.filterwarnings("ignore")
def test_axolotl_loads_the_plugin_of_its_configuration(base: Path, oracle: Oracle, tmp_path: Path) -> None:
    integrations = pytest.importorskip("axolotl.integrations.base", reason="Axolotl is not installed here")
    [name] = yaml.safe_load((EXAMPLES / "axolotl.yaml").read_text())["plugins"]
    plugin: Any = integrations.load_plugin(name)
    rows = encoded(oracle, chat_rows(8), messages=True)
    rows[3]["labels"][-1] = -100
    trainer = make_trainer(base, rows, tmp_path)
    plugin.post_trainer_create({}, trainer)
    with pytest.raises(GuardError, match=r"ML546 train_dataset\[3\]"):
        trainer.train()


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_page_runs(
    base: Path, oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "checkpoints" / "my-mistral")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    rows = encoded(oracle, chat_rows(4))
    for code in blocks:
        names["trainer"] = make_trainer(base, rows, tmp_path / "out", max_steps=1)
        exec(code, names)
    assert names["callback"].verdict.ok
    assert "guard: 4 rows of" in capsys.readouterr().out
    assert all((tmp_path / "out" / name).is_file() and name in PAGE for name in REPORTS)

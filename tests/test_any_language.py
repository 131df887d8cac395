"""`examples/any-language/run.py` asks real programs, and its table shows the fault of each answer."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from derived_tekken import derived_tokenizer
from gguf_files import write_gguf
from llamacpp_process import converted_model, needs_llamacpp

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.records.goldens import golden_paths, goldens_folder

FOLDER = Path(__file__).parents[1] / "examples" / "any-language"
GOLDENS = goldens_folder()
PROGRAM = """
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
for line in sys.stdin:
    name = json.loads(line)["case"]
    path = folder / "templates" / "spm-v3" / f"{name}.json"
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"refused": "by the fake"}
    answer = {key: recorded[key] for key in ("input_ids", "labels", "refused") if key in recorded}
    FAULT
    print(json.dumps(answer), flush=True)
"""
"""A program that knows the recorded ids and, for one case, has a fault."""


def run(*arguments: object) -> tuple[int, list[str]]:
    """Run the example with the standard library alone, and return its exit code and the lines of its table."""
    command = [sys.executable, "-I", "-S", str(FOLDER / "run.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout.splitlines()


def run_with(fault: str) -> tuple[int, list[str]]:
    return run(GOLDENS, "spm-v3", sys.executable, "-I", "-S", "-c", PROGRAM.replace("FAULT", fault), GOLDENS)


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("any_language_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_runner_needs_the_standard_library_alone() -> None:
    tree = ast.parse((FOLDER / "run.py").read_text(encoding="utf-8"))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {f"{node.module}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names


@pytest.mark.parametrize("name", ["spm-v1", pytest.param("tekken-240718", marks=pytest.mark.slow)])
def test_mistral_common_answers_as_recorded(name: str) -> None:
    code, lines = run(GOLDENS, name, sys.executable, FOLDER / "answer.py", shipped_tokenizer(name))
    asked = len(lines) - 1
    assert (code, lines[-1]) == (0, f"{asked} of {asked} as recorded")
    assert asked > len(golden_paths(GOLDENS / "templates" / name))
    assert {line.split()[1] for line in lines[:-1]} == {"same", "refused"} | ({"either"} if name == "spm-v1" else set())


@pytest.mark.parametrize(
    ("name", "derived"),
    [
        pytest.param("magistral-small-2506", "derived-v11", marks=pytest.mark.slow),
        pytest.param("magistral-small-2509", "derived-v13-thinking", marks=pytest.mark.slow),
    ],
)
def test_a_derived_file_answers_as_the_published_tokenizer(name: str, derived: str) -> None:
    code, lines = run(GOLDENS, name, sys.executable, FOLDER / "answer.py", derived_tokenizer(derived, words=0))
    assert (code, lines[-1]) == (0, "3 of 3 as recorded")


@needs_llamacpp
@pytest.mark.slow
def test_llamacpp_differs_in_rows_with_a_named_deviation_alone(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    oracle = Oracle(shipped_tokenizer("spm-v3"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    MistralForCausalLM(MistralConfig(vocab_size=oracle.vocab_size, num_key_value_heads=4, **sizes)).save_pretrained(
        tmp_path
    )
    model = write_gguf(tmp_path / "model.gguf", *converted_model(tmp_path, oracle))
    template = tmp_path / "chat_template.jinja"
    template.write_text(oracle.chat_template(), encoding="utf-8")
    code, lines = run(GOLDENS, "spm-v3", sys.executable, FOLDER / "answer_llamacpp.py", model, template)
    other = [line for line in lines[:-1] if line.split()[1] not in {"same", "refused", "either"}]
    unnamed = [line.split()[0] for line in other if "(chat templates differ: " not in line]
    assert (code, lines[-1]) == (1, f"{len(lines) - 1 - len(other)} of {len(lines) - 1} as recorded")
    # the template ignores the setting
    assert unnamed == ["effort-high", "effort-none-multi-turn"]


@pytest.mark.parametrize(
    ("fault", "row"),
    [
        ("if name == 'single': answer['input_ids'].pop()", "single other ids token 17: nothing, expected 2"),
        ("if name == 'single': answer['input_ids'].insert(0, 1)", "single other ids token 1: 1, expected 3"),
        ("if name == 'single': answer['labels'][0] = 1", "single other labels token 0: 1, expected -100"),
        ("if name == 'single': del answer['input_ids']", "single other ids None is not a list"),
        ("if name == 'single': answer = {'refused': 'no'}", "single wrongly refused no"),
        ("if name == 'single': answer = [1]", "single no answer not an object: [1]"),
        ("if name == 'single': print('hello', end=''); answer = 1", "single no answer not JSON: hello1"),
        (
            "if name == 'thinking': answer = {'input_ids': [1]}",
            "thinking not refused expected, for messages[1].content",
        ),
        (
            "if name == 'hostile-user': answer['input_ids'] = [1, 3]",
            "hostile-user other ids token 2: nothing, expected 16691 (chat templates differ: control-literal)",
        ),
    ],
)
def test_a_fault_is_shown_in_its_row(fault: str, row: str) -> None:
    code, lines = run_with(fault)
    name = row.split()[0]
    wrong = [" ".join(line.split()) for line in lines[:-1] if line.split()[1] not in {"same", "refused", "either"}]
    assert wrong == [row], name
    assert (code, lines[-1]) == (1, f"{len(lines) - 2} of {len(lines) - 1} as recorded")


def test_labels_can_be_left_out() -> None:
    code, lines = run_with("answer.pop('labels', 0)")
    assert (code, lines[-1]) == (0, f"{len(lines) - 1} of {len(lines) - 1} as recorded")


def test_a_program_that_ends_has_no_more_answers() -> None:
    code, lines = run_with("if name == 'system': sys.exit()")
    found = {line.split()[0]: line for line in lines[:-1]}
    assert code == 1
    assert "the program has ended" in found["system"]
    assert found["single"].split()[1] == "same"
    assert "the program has ended" in found["trailing-spaces"]


def test_a_program_that_does_not_answer_is_ended(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "SECONDS", 0.2)
    silent = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
    assert example.main([str(GOLDENS), "magistral-small-2506", *silent]) == 1
    assert "took more than 0.2 seconds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((), "Usage: python run.py"),
        ((GOLDENS, "spm-v9", "program"), "no cases for the tokenizer 'spm-v9'"),
        ((GOLDENS, "spm-v3", "no-such-program"), "no-such-program cannot be started"),
    ],
)
def test_a_wrong_call_is_named(
    example: ModuleType, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], found: str
) -> None:
    assert example.main([*map(str, arguments)]) == 2
    assert found in capsys.readouterr().err

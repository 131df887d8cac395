"""Where POSIX is missing, as on Windows, rows are still judged, and what needs it is refused or not checked.

Nothing was run on Windows: these tests take away from this system what Windows does not have.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import write_outputs
from verbs_without import run_verbs

import pytest_mistral_lora

PACKAGE = Path(pytest_mistral_lora.__file__).parent
MODULES = ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog")
"""Modules of the standard library that Windows does not have."""
NAMES = {
    "os": "fork forkpty geteuid getuid getgid killpg setsid getpgid wait4 pread sched_getaffinity O_NONBLOCK O_NOCTTY "
    "O_NOFOLLOW O_PATH WNOHANG mkfifo uname sysconf",
    "signal": "setitimer ITIMER_PROF SIGKILL SIGPROF SIGCHLD SIGPIPE SIGSTOP SIGXFSZ",
    "select": "poll",
}
"""Names of modules that Windows has without them."""

WITHOUT = """
import builtins, importlib, multiprocessing, os, types

class Windows(types.ModuleType):
    # a module as Windows has it

    def __init__(self, name, missing, own):
        super().__init__(name)
        self.missing, self.own, self.module = missing.split(), own, importlib.import_module(name)

    def __getattr__(self, name):
        if name in self.missing:
            raise AttributeError(name)
        return self.own[name] if name in self.own else getattr(self.module, name)

def open_file(path, *rest, **named):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return os.open(path, *rest, **named)

own = {"os": {"name": "nt", "open": open_file}}
windows = {name: Windows(name, missing, own.get(name, {})) for name, missing in names.items()}
multiprocessing.get_all_start_methods = lambda: ["spawn"]
real = builtins.__import__

# only for this package: libraries have code for Windows, which they choose when they are installed
def limited(name, globals=None, *rest, **named):
    if not (globals or {}).get("__name__", "").startswith("pytest_mistral_lora"):
        return real(name, globals, *rest, **named)
    if name.partition(".")[0] in modules:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return windows.get(name) or real(name, globals, *rest, **named)

builtins.__import__ = limited
"""
MORE = """
import pytest_mistral_lora.guarding.run_judge
from pathlib import Path
from pytest_mistral_lora.chat.templates.isolated import ask
from pytest_mistral_lora.errors import NoTemplateError
from pytest_mistral_lora.records.files import finished_folder
from pytest_mistral_lora.training.devices import memory_limit

with finished_folder(Path("made")) as folder:
    (folder / "file").write_text("")
results.append([0, str(memory_limit("cpu")), ""])
try:
    ask({"source": "{{ messages }}"})
except NoTemplateError as error:
    results.append([0, str(error), ""])
"""

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """The results of commands without POSIX, by a name."""
    folder = tmp_path_factory.mktemp("windows")
    write_outputs.write_rows(folder / "rows.jsonl", ROW)
    write_outputs.write_rows(folder / "bad.jsonl", {"messages": [{"role": "bot", "content": "Hi"}]})
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (folder / "sharegpt.json").write_text(json.dumps([{"conversations": talk}]))
    (folder / "own.py").write_text("")
    tokenizer = ["--tokenizer", "spm-v3"]
    commands = {
        "rows": ["check", "rows.jsonl", *tokenizer, "--json"],
        "bad": ["check", "bad.jsonl", *tokenizer, "--report", "report.json"],
        "import": ["import", "sharegpt.json", "--to", "imported.jsonl"],
        "render": ["render", "rows.jsonl", *tokenizer],
        "doctor": ["doctor"],
        "runner": ["check", "--runner", "own.py", "--dataset", "rows.jsonl", *tokenizer],
    }
    taken_away = f"modules, names = {MODULES!r}, {NAMES!r}\n{WITHOUT}"
    results = run_verbs(taken_away, [*commands.values()], folder, after=MORE)
    return dict(zip((*commands, "memory", "template"), results, strict=True))


def test_rows_are_imported_judged_and_reported(done: dict[str, tuple[int, str, str]]) -> None:
    codes = {name: done[name][0] for name in ("rows", "bad", "import", "render", "doctor")}
    assert codes == {"rows": 0, "bad": 1, "import": 0, "render": 0, "doctor": 0}, done
    assert "ML601" in done["bad"][1]


def test_a_folder_is_finished_and_the_memory_is_known(done: dict[str, tuple[int, str, str]]) -> None:
    # the folder is made by the same process, in which Windows' errors end it
    assert int(done["memory"][1]) > 0


def test_a_template_of_a_file_is_not_rendered(done: dict[str, tuple[int, str, str]]) -> None:
    assert "limits neither the time nor the memory" in done["template"][1]


def test_code_of_another_trainer_is_not_started(done: dict[str, tuple[int, str, str]]) -> None:
    code, output, errors = done["runner"]
    assert (code, "has no groups of processes" in errors + output) == (2, True)


def test_no_module_imports_one_of_posix_when_it_is_imported() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(path.name, name) for name in names if name.partition(".")[0] in MODULES]
    assert found == []

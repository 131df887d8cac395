from __future__ import annotations

import atexit
import copy
import ctypes
import faulthandler
import functools
import gc
import hashlib
import importlib
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import psutil
import pytest

# pytester forgets the modules that a run within this process was the first to import. The package rich keeps its own as
# attributes, and would mix the classes of two imports: all of it is there before.
import rich.console
import rich.emoji
import rich.table  # noqa: F401
from cut_sentencepiece import cut_v3
from hypothesis import settings
from worker_memory import WorkerMemory

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.chat.oracle.quick_tekken import QuickTekkenizer

# Two workers share two cores, and each starts processes: torch's threads would only wait for one another. Before torch
# is imported, and inherited by every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

# A worker that inherits it holds a third less memory: glibc has arenas for threads that are gone, such as those of a
# tokenizer, and gives little of them back.
os.environ["MALLOC_ARENA_MAX"] = "1"

# On the CPU, torch compiles a kernel for each shape of a matrix in bf16, and keeps 1024 of them in each of two caches:
# a worker that trains many tiny models would hold 250 MB of code.
os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = os.environ["LRU_CACHE_CAPACITY"] = "64"

# Hundreds of tests import this package anew, in this process or another one, and each would compile it again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# a workflow of GitHub that runs these tests must not change the output that they look at, nor get a summary of it
for _name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_WORKSPACE"):
    os.environ.pop(_name, None)

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=25)
settings.load_profile("repeatable")


if "MISTRAL_LORA_CACHE" not in os.environ:
    # what `check` and `train` keep for their next run is not the user's, and no earlier run of the tests has written it
    os.environ["MISTRAL_LORA_CACHE"] = _cache = tempfile.mkdtemp(prefix="mistral-lora-cache-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)


_NEW = 200_000
"""New objects after which the old ones are set apart: a tokenizer has 131,000 tokens."""

_GROWN = 200 << 20
"""Bytes by which this process grows until what was set apart is looked through: it holds garbage by then."""

_MANY = 1000 << 20
"""Bytes of a process from which the caches of tokenizers and models are emptied: with them, it has 2 GB and more."""

_M_MMAP_THRESHOLD = -3
"""The name of this option in glibc's malloc.h."""

_STDERR = pytest.StashKey[int]()

_kept = 0
_resident = 0
_between = 0
"""The memory after the last release between two files of tests: within a file, its fixtures hold more."""

_CONVERSIONS, _PARSED, _READ = 5, 2, 3
"""Conversions, parsed Tekken files and SentencePiece files that are kept: mistral-common ships five vocabularies."""

_converted: dict[int, Any] = {}
_parsed: dict[tuple[str, str], QuickTekkenizer] = {}
_read: dict[tuple[str, str], dict[str, Any]] = {}
"""What is kept, until the tests of the next folder."""

_LARGE = 1 << 20
"""Bytes of a tokenizer file that takes long to parse."""

_SECONDS, _LONG_SECONDS = 300, 1800
"""Seconds after which a test has hung, and one that is left out of a plain run: each takes a fifth of it at most."""

_GRACE = 60
"""Seconds after its limit in which a test that has hung must have ended; then its process is ended."""

_LONG = ("real", "gallery", "slow", "vllm", "browser")
"""The markers of tests that are left out of a plain run."""


def _set_apart() -> None:
    """Collect garbage, and have later collections look at new objects only.

    Trainer and pytest collect all garbage at the end of each run. With the tokenizers, models and modules that earlier
    tests have cached, this makes a tiny train five times as long.
    """
    global _kept
    gc.collect()
    gc.freeze()
    _kept = sys.getallocatedblocks()


def _release() -> None:
    """Collect the garbage among what was set apart, too, and give its memory back to the system.

    What is set apart while a test, a fixture or a module uses it is never collected if a cycle holds it, as it does
    a trainer, a traceback or a class: a worker would grow by gigabytes.
    """
    global _resident
    gc.unfreeze()
    if psutil.Process().memory_info().rss > _MANY:
        _forget_loaded()
    _set_apart()
    _trim()
    _resident = psutil.Process().memory_info().rss


def _end_file(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Empty the caches of a file of tests, which are of no use after it, and release what it leaves if it is much."""
    global _between
    if nextitem is None or nextitem.path.parent != item.path.parent:
        _converted.clear()
        _parsed.clear()
        _read.clear()
    module = getattr(item, "module", None)
    if module is not None:
        _empty_caches(module)
    if psutil.Process().memory_info().rss > _between + _GROWN:
        _release()
        _between = _resident


def _forget_loaded() -> None:
    """Empty the caches of functions that return a tokenizer or a model, or what holds one, by their annotation."""
    names = ("Oracle", "Tokenizer", "ChatTemplate", "RowJudge", "DatasetPass", "Target", "TranscriptModel", "nn.Module")
    root = Path(__file__).parents[1]
    ours = {root / name for name in ("tests", "scripts", "pytest_mistral_lora")}
    for module in list(sys.modules.values()):
        if not ours.isdisjoint(Path(getattr(module, "__file__", None) or "/").parents):
            _empty_caches(module, lambda made: any(name in made for name in names))


def _empty_caches(module: ModuleType, is_chosen: Callable[[str], bool] = lambda made: True) -> None:
    """Empty the caches of a module's functions, or of those whose return annotation is chosen."""
    for value in [*vars(module).values()]:
        is_own = isinstance(value, functools._lru_cache_wrapper) and value.__module__ == module.__name__
        if is_own and is_chosen(str(value.__wrapped__.__annotations__.get("return"))):
            value.cache_clear()


def _map_large_blocks() -> None:
    """Have the C library return each freed block of 1 MiB and more to the system, as it does before the first of them.

    After the first, glibc takes larger and larger ones from the heap, up to 32 MiB. There, the tensors of a tiny model
    lie between small objects that stay, and a worker holds 100 MB more. The variable MALLOC_MMAP_THRESHOLD_ would
    change the processes that tests start, too, and with them what a run under a limit of memory needs.
    """
    with suppress(AttributeError, OSError):  # glibc alone has it
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _trim() -> None:
    """Give freed memory back to the system: a conversion of 131,000 tokens leaves 150 MB of small gaps."""
    with suppress(AttributeError, OSError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def _limit(item: pytest.Item) -> float:
    """Return the seconds after which a test has hung."""
    is_long = any(mark.name in _LONG for mark in item.iter_markers())
    return float(os.environ.get("MISTRAL_LORA_FUZZ_SECONDS", 0)) + (_LONG_SECONDS if is_long else _SECONDS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test a time limit, if pytest-timeout is installed: the environment of a trainer lacks it."""
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            item.add_marker(pytest.mark.timeout(_limit(item)))


def pytest_configure(config: pytest.Config) -> None:
    """Keep the real stderr, for the stacks of a test that has hung, and bound and note the memory of each process."""
    _map_large_blocks()
    config.pluginmanager.register(WorkerMemory(config), "worker_memory")
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        config.stash[_STDERR] = os.dup(2)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """End the process of a test that goes on after its limit, and print where each of its threads was.

    The limit of pytest-timeout raises an error in the main thread. A thread that waits in a library never sees it, and
    a fixture that waits for another process at its end has it no more: one such test would stop the whole run.
    """
    faulthandler.dump_traceback_later(_limit(item) + _GRACE, file=item.config.stash[_STDERR], exit=True)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        if nextitem is None or nextitem.path != item.path:
            _end_file(item, nextitem)


def pytest_collection_finish() -> None:
    _set_apart()
    # Python's own limit of 700 new objects has every test that loads a tokenizer walk its 131,000 tokens many times.
    gc.set_threshold(20_000, 10, 10)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    if psutil.Process().memory_info().rss > _resident + _GROWN:
        _release()
    elif sys.getallocatedblocks() > _kept + _NEW:
        _set_apart()


@pytest.fixture(scope="session", autouse=True)
def interrupts_are_heard() -> Iterator[None]:
    """Hear SIGINT: a shell starts a job in the background with SIGINT ignored, and its children inherit that."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def converted_once() -> Iterator[None]:
    """Keep the last conversions of a process: hundreds of tests load the same files, and each would take a second.

    A caller gets a tokenizer that it may change, and that shares the vocabulary with those of other tests.
    """
    from pytest_mistral_lora.checkpoint import shared_conversion, tokenizers

    convert = tokenizers.convert

    def convert_and_keep(oracle: Oracle) -> Any:
        converted = convert(oracle)
        original = shared_conversion.original_of(converted)
        if _converted.pop(id(original), None) is None:
            _trim()  # it is a new one
        _keep(_converted, id(original), original, most=_CONVERSIONS)
        return converted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "convert", convert_and_keep)
        yield


@pytest.fixture(scope="session", autouse=True)
def read_once() -> Iterator[None]:
    """Keep the last SentencePiece files that mistral-common read: thousands of tests load one, for 35 ms each.

    A caller gets an object of its own; the model and the list of its pieces are shared.
    """
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer, get_spm_version

    read = SentencePieceTokenizer.__init__

    def read_and_keep(self: SentencePieceTokenizer, model_path: str | Path, tokenizer_version: Any = None) -> None:
        file = Path(model_path)
        if not file.is_file():
            return read(self, model_path, tokenizer_version)
        key = (file.name, hashlib.sha256(file.read_bytes()).hexdigest())
        found = _read.pop(key, None)
        if found is None:
            read(self, model_path, tokenizer_version)
            assert self.special_ids  # a cached property, which walks all pieces again
            found = {**vars(self)}
        version = tokenizer_version or get_spm_version(model_path, raise_deprecated=False)
        vars(self).update(found, _file_path=file, _version=version)
        return _keep(_read, key, found, most=_READ)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SentencePieceTokenizer, "__init__", read_and_keep)
        yield


def _keep(kept: dict[Any, Any], key: Any, value: Any, *, most: int) -> None:
    """Keep a value as the newest, and at most so many: a worker that keeps each variant of a file fills the memory."""
    kept[key] = value
    while len(kept) > most:
        del kept[next(iter(kept))]


@pytest.fixture(scope="session", autouse=True)
def parsed_once() -> Iterator[None]:
    """Keep the last large Tekken files that mistral-common parsed: hundreds of tests load one, for a second each.

    A caller gets an object of its own, since an oracle replaces a method; the vocabulary behind it is shared.
    """
    from pytest_mistral_lora.chat.oracle.quick_tekken import QuickTekkenizer

    parse = QuickTekkenizer.from_file

    def parse_once(path: str | Path) -> QuickTekkenizer:
        file = Path(path)
        if not file.is_file() or file.stat().st_size < _LARGE:
            return parse(path)
        key = (file.name, hashlib.sha256(file.read_bytes()).hexdigest())
        found = _parsed.pop(key, None)
        if found is None:
            found = parse(path)
            _trim()
        _keep(_parsed, key, found, most=_PARSED)
        parsed = copy.copy(found)
        parsed._file_path = file
        return parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuickTekkenizer, "from_file", parse_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def commit_asked_once() -> Iterator[None]:
    """Ask Git for the commit of this repository once: each verdict names it, for 12 ms of CPU."""
    from pytest_mistral_lora.records import git

    ask, root = git.code_of, Path(__file__).parents[1]
    known = functools.cache(ask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(git, "code_of", lambda folder: known(root) if folder.resolve() == root else ask(folder))
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with the tokenizer `spm-v3`, in a folder `base`, which no test changes."""
    from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

    return write_tiny_base(tmp_path_factory.mktemp("models") / "base", cut_v3())


@pytest.fixture(scope="session", autouse=True)
def no_kept_results() -> Iterator[None]:
    """Have `check` run every check, unless a test names a cache: a test may change what a result does not depend on."""
    from pytest_mistral_lora.cli import check

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "_kept_folder", lambda: None)
        yield


@pytest.fixture
def data_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the checks of a recipe and its rows alone: those of the base's tokenizer and template take seconds."""
    from pytest_mistral_lora.conformance.checks import Check
    from pytest_mistral_lora.conformance.finding import Result

    judged = Check.run
    monkeypatch.setattr(Check, "run", lambda check: judged(check) if check.subject == "dataset" else Result())


RunPytest = Callable[..., pytest.RunResult]
RunVerb = Callable[..., subprocess.CompletedProcess[str]]

_ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
_CASES = ("file", "text-ids", "save-and-load", "single", "own-rows-1", "template-agrees")


@pytest.fixture(scope="session")
def suite_libraries(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import what a run of the suite needs, before the first one in this process.

    pytester forgets the modules that such a run has imported, with all that they have cached: each run would read the
    rules, the facts and the versions of all installed packages again. And torch cannot be imported twice.
    """
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import MistralForCausalLM  # noqa: F401

    from pytest_mistral_lora import assertions, strategies  # noqa: F401
    from pytest_mistral_lora.conformance.checks import Settings
    from pytest_mistral_lora.conformance.collection import collect
    from pytest_mistral_lora.conformance.targets import Target
    from pytest_mistral_lora.runners import TRAINERS
    from pytest_mistral_lora.training import run  # noqa: F401

    for name in ("chat", "conformance", "environment", "plugin", "report", "starter"):
        room = importlib.import_module(f"pytest_mistral_lora.{name}")
        for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            importlib.import_module(module.name)
    assert [*TRAINERS.values()]  # their modules, too
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.jsonl").write_text(json.dumps(_ROW) + "\n", encoding="utf-8")
    for update in (True, False):
        chosen = Settings(1, None, "cpu", True, (folder,), update, folder)
        for check in collect([Target("spm-v1")], chosen):
            if check.case in _CASES:
                check.run()  # for its imports: under some versions of the libraries it has findings
    _set_apart()


@pytest.fixture(scope="session")
def tiny_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the session, which its workers share: the tiny run in it is made once, in the first test that asks.

    It is that of spm-v3 on the CPU; read it, and leave it as it is.
    """
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture
def run_pytest(
    suite_libraries: None, pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RunPytest:
    """Run pytest in the test's own folder, in this process and without what CI or the developer has set."""
    for name in ("CI", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: object) -> pytest.RunResult:
        monkeypatch.chdir(tmp_path)
        return pytester.runpytest_inprocess(*words)

    return run


@pytest.fixture
def mistral_lora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunVerb:
    """Run a verb of the command line in a folder, as a new process would, but in this one: torch is there already."""

    from pytest_mistral_lora.cli import main

    def run(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            patch.delenv("CI", raising=False)
            code = main([str(word) for word in words])
        output, errors = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, output, errors)

    return run

"""The pytest plugin: its hooks, and fixtures for your own tests.

Every pytest run in the environment pays for each module, import and decorator here, even if it does not use the suite.
So heavy imports stay in the bodies, and the fixtures stay in this module: importing another module takes longer than
defining them. PYTEST_DONT_REWRITE: this module has no assertions, and pytest would walk the whole syntax tree.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from pytest_mistral_lora.plugin import options

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

    from pytest_mistral_lora.chat.encoded import EncodedRow
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.conformance.train.tiny_run import TinyRun
    from pytest_mistral_lora.records.goldens import Golden

_FOLDER = __file__.removesuffix("plugin/__init__.py")
MARKERS = (
    "mistral_golden: a check of the Mistral conformance suite (made by --mistral-golden)",
    "mistral_training: trains a model; left out by --mistral-no-train",
    "mistral_gpu: needs a CUDA device; skipped if there is none",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options and their ini twins."""
    options.add(parser)


@pytest.hookimpl(trylast=True)  # after pytest-xdist has read its own options
def pytest_configure(config: pytest.Config) -> None:
    """Register markers, and the suite if the run uses it."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if options.asked_for(config):
        from pytest_mistral_lora.plugin.process import speed_up_imports

        speed_up_imports(config)
        from pytest_mistral_lora.errors import disk_fault
        from pytest_mistral_lora.escaping import in_block, safe_text
        from pytest_mistral_lora.plugin.settings import read_settings
        from pytest_mistral_lora.plugin.suite import Suite

        try:
            settings = read_settings(config)
        except pytest.UsageError as error:  # its text has names of files, and pytest prints it unescaped
            raise pytest.UsageError(safe_text(in_block(str(error)))) from error
        try:
            suite = Suite(config, settings)
        except OSError as error:
            raise pytest.UsageError(disk_fault(error) or str(error)) from error
        config.pluginmanager.register(suite, "mistral_lora_suite")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add each verdict that is not ok to the report of a failed test, such as that of `assert judge(path)`.

    The frames of this package are left out if an error of this project ends the test: its message says everything.
    """
    errors = sys.modules.get("pytest_mistral_lora.errors")
    failure = call.excinfo
    if errors is None or failure is None:
        return (yield)
    entries = failure.traceback
    if isinstance(failure.value, errors.MistralLoraError):
        for entry in entries:
            if str(entry.path).startswith((_FOLDER, "<")):  # a data class runs generated code
                # as if each function of the package had this variable, which --full-trace ignores
                entry.frame.f_locals["__tracebackhide__"] = True
    report = yield
    judging = sys.modules.get("pytest_mistral_lora.judging")
    if judging is not None and report.failed:
        # pytest keeps the value of an asserted call in the frame of the test
        values = (value for entry in entries for value in entry.frame.f_locals.values())
        verdicts = {id(value): value for value in values if isinstance(value, judging.Verdict) and not value}
        # the message of `raise_for_findings` is the verdict
        verdicts.pop(id(getattr(failure.value, "verdict", None)), None)
        report.sections += [("Mistral verdict", str(verdict)) for verdict in verdicts.values()]
    return report


@pytest.fixture(scope="session")
def mistral_tokenizer(pytestconfig: pytest.Config) -> CheckpointTokenizer:
    """The tokenizer under test (session): the first of `mistral_tokenizers`, else mistral-common's SentencePiece v3."""
    from pathlib import Path

    from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.plugin.values import oracle_choice, tokenizer_paths

    given = next(iter(tokenizer_paths(pytestconfig)), Path("spm-v3"))
    # a test may have changed the working directory
    path = pytestconfig.invocation_params.dir / given
    if str(given) in SHIPPED and not path.exists():
        return CheckpointTokenizer(shipped_tokenizer(str(given)))
    return CheckpointTokenizer(path, oracle_choice(pytestconfig))


@pytest.fixture(scope="session")
def mistral_oracle(mistral_tokenizer: CheckpointTokenizer) -> Oracle:
    """Mistral's own tokenization of the tokenizer under test (session)."""
    return mistral_tokenizer.oracle


@pytest.fixture(scope="session")
def mistral_encode(mistral_oracle: Oracle) -> Callable[[Any], EncodedRow]:
    """A function from a chat row (a mapping with `messages`) to its ids, labels and spans (session)."""
    return mistral_oracle.encode


@pytest.fixture(scope="session")
def mistral_golden(mistral_oracle: Oracle) -> Callable[[str], Golden]:
    """A function from the name of a packaged case to its golden for the tokenizer under test (session).

    It raises `InputError` for a tokenizer that has no packaged goldens, or for an unknown case.
    """
    from pytest_mistral_lora.records.goldens import packaged_golden

    return lambda case: packaged_golden(mistral_oracle.sha256, case)


@pytest.fixture(scope="session")
def served_prompt_ids(
    pytestconfig: pytest.Config, mistral_tokenizer: CheckpointTokenizer
) -> Callable[[Any], tuple[int, ...]]:
    """A function from a chat row to the ids of the prompt that the first of `mistral_servers` makes of it (session).

    It raises `InputError` if no server is named, the server refuses the messages, or it hides its ids.
    """
    from pytest_mistral_lora.conformance.server.checks import served_prompt
    from pytest_mistral_lora.plugin.values import server_choices, server_limits

    choice, limits = next(iter(server_choices(pytestconfig)), None), server_limits(pytestconfig)
    return lambda row: served_prompt(choice, row, mistral_tokenizer, limits)


@pytest.fixture(scope="session")
def mistral_tiny_model(mistral_oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A seeded tiny `MistralForCausalLM` with the vocabulary of the tokenizer under test, float32, CPU (session)."""
    from pytest_mistral_lora.extras import require_extra

    require_extra("train")
    from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
    from pytest_mistral_lora.checkpoint.base_model import load_base
    from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

    folder = write_tiny_base(tmp_path_factory.mktemp("mistral") / "tiny", mistral_oracle.path)
    return load_base(BaseFolder(folder), "fp32", "cpu")


@pytest.fixture(scope="session")
def mistral_lora_run(mistral_oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The tiny end-to-end train with the tokenizer under test: its folders and its measurements (session)."""
    from pytest_mistral_lora.extras import require_extra

    require_extra("train")
    from pytest_mistral_lora.conformance.train.tiny_run import tiny_run

    return tiny_run(mistral_oracle, tmp_path_factory.mktemp("mistral"), device="cpu")


@pytest.fixture(scope="session")
def mistral_manifest(mistral_lora_run: TinyRun) -> dict[str, Any]:
    """The `manifest.json` of `mistral_lora_run`, as plain data (session)."""
    from pytest_mistral_lora.chat.reading import read_json

    return dict(read_json(mistral_lora_run.adapter / "manifest.json"))

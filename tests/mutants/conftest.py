from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.checks import Settings, Subject
from pytest_mistral_lora.conformance.collection import NamedPaths, collect
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.targets import Target

FindingsOf = Callable[..., list[Finding]]


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as transformers saves it, with Mistral's own tokenizer file beside it: nothing is wrong."""
    folder = tmp_path_factory.mktemp("pristine") / "mistral-v3"
    source = shipped_tokenizer("spm-v3")
    CheckpointTokenizer(source).fast.save_pretrained(folder)
    shutil.copy(source, folder / "tokenizer.model.v3")
    return folder


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint folder to break."""
    return Path(shutil.copytree(pristine, tmp_path / "mistral-v3"))


@pytest.fixture(scope="session")
def findings_of(tmp_path_factory: pytest.TempPathFactory) -> FindingsOf:
    """Run the checks of one subject on a folder, as the suite does."""

    def run(folder: Path, subject: Subject, case: str = "") -> list[Finding]:
        settings = Settings(
            examples=20,
            seed=None,
            device="cpu",
            skip_training=True,
            golden_folders=(),
            update=False,
            shared_folder=tmp_path_factory.getbasetemp(),
        )
        [target] = NamedPaths(tokenizers=[folder]).targets()
        chosen = [c for c in collect([target], settings) if c.subject == subject and case in c.case]
        assert chosen
        return [finding for check in chosen for finding in check.run().findings]

    return run


@pytest.fixture(scope="session")
def v3() -> Target:
    return Target("spm-v3")

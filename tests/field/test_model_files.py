"""A file by which a server makes a model is known by its lines."""

from __future__ import annotations

import pytest

from pytest_mistral_lora.programs.model_files import model_file


@pytest.mark.parametrize(
    ("name", "text", "is_known"),
    [
        ("Modelfile", "FROM ./model.gguf\nTEMPLATE x\n", True),
        ("Modelfile.q4", "# ours\n  from mistral\n", True),
        ("my.modelfile", "FROM x\n", True),
        ("model.txt", "FROM ./a.gguf\nparameter stop x\n", True),
        ("Modelfile", "FROM " + "x" * 5000 + "\0\n", True),
        # a line or a name alone is not enough
        ("notes.txt", "FROM here\n", False),
        ("Modelfile", "no line of it\n", False),
    ],
)
def test_a_file_that_makes_a_model_is_known_by_its_lines(name: str, text: str, is_known: bool) -> None:
    assert bool(model_file(name, text)) is is_known

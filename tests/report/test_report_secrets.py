from __future__ import annotations

import pytest

from pytest_mistral_lora.records.secrets import redacted


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pass@host/x and git@host", "https://***@host/x and git@host"),
        ("https://user:p@ss@host/x", "https://***@host/x"),
        ("https://host/x?tokenizer=spm-v3&token=abc&n=1", "https://host/x?tokenizer=spm-v3&token=***&n=1"),
        ("https://host/x?X-Amz-Signature=abc#top", "https://host/x?X-Amz-Signature=***#top"),
        ("hf_" + "a" * 34, "***"),
        ("a ghp_" + "b" * 36 + ".", "a ***."),
        ("Authorization: Bearer abcdefgh1234", "Authorization: Bearer ***"),
        ("the hf_hub module, and sk-learn", "the hf_hub module, and sk-learn"),
        ("[INST] token=1 [/INST]", "[INST] token=1 [/INST]"),
    ],
)
def test_tokens_and_passwords_are_hidden(text: str, expected: str) -> None:
    assert redacted({"key": [text]}) == {"key": [expected]}


def test_values_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_SERVER_KEY", "s3cr3t-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t-key-and-more")
    monkeypatch.setenv("HF_TOKEN", "short")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallelism")
    found = redacted("s3cr3t-key-and-more s3cr3t-key short parallelism")
    assert found == "*** *** short parallelism"
    assert redacted(("a", 1, None, 0.5)) == ["a", 1, None, 0.5]

"""The forms of the answers of vLLM's own endpoints, read strictly: see `serving.forms`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pytest_mistral_lora.serving.forms import MOST, Form, Ids, Number, PerToken


class TokenLogprobs(Form):
    """The log-probabilities of a completion."""

    token_logprobs: PerToken[Number | None] | None = None


class TextChoice(Form):
    """One of the completions of a prompt."""

    token_ids: Ids
    text: str = ""
    finish_reason: str | None = None
    logprobs: TokenLogprobs | None = None


class TextCompletions(Form):
    """`/v1/completions` of vLLM."""

    choices: Annotated[list[TextChoice], Field(fail_fast=True, min_length=1, max_length=MOST)]

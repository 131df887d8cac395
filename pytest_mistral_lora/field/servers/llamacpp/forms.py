"""The forms of the answers of llama.cpp's endpoints, read strictly: see `serving.forms`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pytest_mistral_lora.serving.forms import Count, Form, Ids, ListedToken, ListOf, Number, PerToken, Timings


class DefaultSettings(Form):
    """The settings of a request that names none."""

    params: dict[str, Any] = Field(default_factory=dict)
    n_ctx: Count | None = None


class Properties(Form):
    """`/props` of llama.cpp."""

    model_ftype: str | None = None
    default_generation_settings: DefaultSettings = DefaultSettings()


class LoadedAdapter(Form):
    """An adapter that llama.cpp has loaded."""

    id: Count
    path: str
    scale: Number


class LoadedAdapters(Form):
    """`/lora-adapters` of llama.cpp, whose list is the whole answer."""

    adapters: ListOf[LoadedAdapter]


class RenderedPrompt(Form):
    """`/apply-template` of llama.cpp."""

    prompt: str


class Tokens(Form):
    """`/tokenize` of llama.cpp."""

    tokens: Ids


class PromptCompletion(Form):
    """`/completion` of llama.cpp."""

    tokens: Ids
    content: str = ""
    stop_type: str | None = None
    completion_probabilities: PerToken[ListedToken] | None = None
    timings: Timings = Timings()

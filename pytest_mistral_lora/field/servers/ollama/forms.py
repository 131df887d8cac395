"""The forms of the answers of Ollama's own endpoints, read strictly: see `serving.forms`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pytest_mistral_lora.serving.forms import Count, Form, ListOf, Name


class TaggedModel(Form):
    """A model of Ollama."""

    name: Name


class TagList(Form):
    """`/api/tags` of Ollama."""

    models: ListOf[TaggedModel]


class NativeFunction(Form):
    """The function of a tool call of Ollama, its arguments as an object."""

    name: str
    arguments: dict[str, Any]


class NativeCall(Form):
    """A tool call of Ollama."""

    function: NativeFunction


class NativeMessage(Form):
    """The message of an answer of Ollama."""

    content: str | None = None
    tool_calls: ListOf[NativeCall] | None = None


class Preview(Form):
    """The rendered prompt that Ollama shows."""

    rendered_template: str | None = None


class NativeChat(Form):
    """`/api/chat` of Ollama."""

    message: NativeMessage
    done_reason: str | None = None
    prompt_eval_count: Count | None = None
    preview: Preview | None = Field(None, alias="_debug_info")

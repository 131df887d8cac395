"""A conversation with a base, an adapter or a merged model, through the prompt path of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pytest_mistral_lora.chat.kinds.records import parse_trained, prompt_kind
from pytest_mistral_lora.chat.reading import scan_jsonl
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base, require_trainable
from pytest_mistral_lora.checkpoint.devices import Precision, choose_device
from pytest_mistral_lora.checkpoint.encoder import Encoder, make_encoder
from pytest_mistral_lora.errors import InputError, RowError, RowsError
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.records.adapter_config import CONFIG
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.training.generate.answers import complete
from pytest_mistral_lora.training.generate.model_spec import model_spec

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""The sign that decoders give for bytes that are not a whole character yet."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A conversation for a model to continue, or a gap to fill.

    Attributes:
        row: The row; the model answers in place of its last assistant turn, or of its completion.
        has_answer: Whether the answer comes from the file, so that an answer can be compared with it.
    """

    row: Row
    has_answer: bool


def prompt_row(data: Any, *, place: Place = NOWHERE) -> PromptRow:
    """Return plain JSON data as a row to answer: a conversation that ends with an answer or a question, or a gap.

    Raises:
        RowError: If the data is not a row.
    """
    kind = prompt_kind(data) if isinstance(data, Mapping) else None
    if kind is not None:
        # it stands for the answer that a model generates; no prompt contains it
        return PromptRow(kind.answered(data, [kind.placeholder], place), has_answer=False)
    return PromptRow(parse_trained(data, place=place), has_answer=True)


def read_prompt_rows(path: Path) -> list[PromptRow]:
    """Return the conversations of a JSONL file.

    Raises:
        InputError: If the file cannot be opened.
        RowsError: If any row is bad, or the file has no row.
    """
    found, errors = list[PromptRow](), list[RowError]()
    for item in scan_jsonl(path):
        try:
            if isinstance(item, RowError):
                raise item
            found.append(prompt_row(item[1], place=Place.of(path, item[0])))
        except RowError as error:
            errors.append(error)
    if not found and not errors:
        errors = [RowError("the file has no rows", place=str(path))]
    if errors:
        raise RowsError(errors, place=str(path))
    return found


@dataclass(eq=False)
class AnswerStream:
    """Passes the text of an answer on while its tokens come; a streamer of transformers' `generate`.

    A token may hold a part of a character: its bytes wait for the rest. The parts together are the decoded answer.

    Attributes:
        encoder: Decodes the tokens.
        on_text: Gets each part.
    """

    encoder: Encoder
    on_text: Callable[[str], None]
    _ids: list[int] = field(default_factory=list, init=False)
    _has_prompt: bool = field(default=False, init=False)
    _shown: str = field(default="", init=False)

    def put(self, value: torch.Tensor) -> None:
        """Take the next token; the first call has the prompt."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        self._ids += value.flatten().tolist()
        self._pass_on(self.encoder.decode(self._ids).rstrip(_INCOMPLETE))

    def end(self) -> None:
        """Pass the rest on, incomplete characters too."""
        self._pass_on(self.encoder.decode(self._ids))

    def _pass_on(self, text: str) -> None:
        # shorter than before while a character is incomplete
        if len(text) > len(self._shown) and text.startswith(self._shown):
            self.on_text(text[len(self._shown) :])
            self._shown = text


@dataclass(frozen=True)
class ChatAnswer:
    """The answer to one message.

    Attributes:
        prompt_ids: The ids that the model was given.
        ids: The ids that it generated, with the closing EOS.
        text: The decoded ids, without control tokens.
        stop: `eos`, or `length` if the answer was cut off.
    """

    prompt_ids: Sequence[int]
    ids: Sequence[int]
    text: str
    stop: Literal["eos", "length"]


@dataclass
class ChatSession:
    """A conversation with a loaded model.

    Attributes:
        model: The model, in eval mode.
        encoder: The backend that makes prompts.
        system: The system prompt; may be empty.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 for the most probable token each time; above, tokens are drawn, and torch's seed decides.
        messages: The turns so far.
    """

    model: Any
    encoder: Encoder
    system: str = ""
    max_new_tokens: int = 256
    temperature: float = 0.0
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str, on_text: Callable[[str], None] | None = None, *, place: Place = NOWHERE) -> ChatAnswer:
        """Return the answer to a message, and keep both as turns; an empty answer does not change the conversation.

        Args:
            text: The user's message. Text that looks like a control token stays text; a backend that cannot keep it as
                text refuses it.
            on_text: Called with each part of the answer.
            place: Place of the message, for the error.

        Raises:
            RowError: If the conversation cannot be encoded; then it does not change.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.encoder.prompt(prompt_row({"messages": [*system, *messages]}, place=place).row)
        stream = None if on_text is None else AnswerStream(self.encoder, on_text)
        ids = complete(
            self.model,
            self.encoder,
            prompt,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            streamer=stream,
        )
        answer = self.encoder.decode(ids)
        if answer.strip():
            self.messages = [*messages, {"role": "assistant", "content": answer}]
        return ChatAnswer(prompt, ids, answer, "eos" if ids and ids[-1] == self.encoder.eos_id else "length")


@dataclass(frozen=True)
class ChatModel:
    """A loaded model that answers messages.

    Attributes:
        model: The loaded model, in eval mode.
        encoder: The backend that makes prompts.
        title: Its description, in words.
    """

    model: Any
    encoder: Encoder
    title: str


def load_chat_model(
    folder: Path, base: Path | None = None, *, use_adapter: bool = True, device: str = "auto"
) -> ChatModel:
    """Load an adapter on its base, a merged model, or a base checkpoint.

    Args:
        folder: The folder of any of them.
        base: The base's folder; by default, the one that an adapter's folder records.
        use_adapter: Whether an adapter takes part; without it, its base answers the same prompts.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: If the folder is not one of these, or an option does not apply to it.
    """
    is_ours = (folder / CONFIG).exists() or AdapterFolder(folder).has_manifest
    is_base = (folder / "config.json").is_file() and not is_ours
    if is_base:
        if base is not None or not use_adapter:
            found = "a checkpoint without an adapter"
            raise InputError(found, place=str(folder), next_step="Leave --base and --no-adapter out.")
        return _load_checkpoint(folder, choose_device(device))
    spec = model_spec(folder, base, device=device)
    if spec.folder.kind == "merged" and not use_adapter:
        raise InputError("a merged model, whose adapter cannot be left out", place=str(folder))
    model = spec.load()
    where = f"{spec.quantization or spec.precision} on {spec.device}"
    if spec.folder.kind == "merged":
        return ChatModel(model, spec.encoder, f"the merged model {folder}, {where}")
    if use_adapter:
        return ChatModel(model, spec.encoder, f"the adapter {folder} on {spec.base}, {where}")
    # the model of PEFT itself can leave its adapter out within a block only
    model.base_model.disable_adapter_layers()
    return ChatModel(model, spec.encoder, f"the base {spec.base} without the adapter {folder}, {where}")


def _load_checkpoint(folder: Path, device: str) -> ChatModel:
    base = BaseFolder(folder)
    tokenizer = base.tokenizer()
    backend = "mistral-common" if tokenizer.has_oracle else "chat-template"
    require_trainable(base, backend)
    if backend == "mistral-common":
        tokenizer.require_same_ids()
    # as for `precision: auto` in a recipe
    wide = device == "cpu" or not torch.cuda.is_bf16_supported(including_emulation=False)
    precision: Precision = "fp32" if wide else "bf16"
    model = load_base(base, precision, device).eval()
    return ChatModel(model, make_encoder(backend, tokenizer), f"the base {folder}, {precision} on {device}")

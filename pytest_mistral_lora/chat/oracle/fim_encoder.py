"""The encoding of fill-in-the-middle rows: mistral-common's `encode_fim`, with the completion behind it.

mistral-common encodes what a server feeds the model: BOS, `[SUFFIX]`, the suffix, `[PREFIX]`, the prompt
(`InstructTokenizerV2.encode_fim`). The completion is what the model writes next, so its ids follow those of the prompt
unchanged, and EOS ends it. SentencePiece writes a space in front of each text that it encodes; the completion goes on
in the middle of a line, so it gets none. mistral-common leaves the space out of the suffix in the same way
(`_encode_infilling`): it encodes the text behind a character of two tokens, and drops them. So do Code Llama's
tokenizer, from which that comes, and its paper ("we suppress the implicit leading space that SentencePiece tokenizers
add upon encoding the middle part and the suffix", arXiv 2308.12950, section 2.3).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from pytest_mistral_lora.chat.fim import FimRow
from pytest_mistral_lora.chat.oracle.encoder_trace import Part, Turn
from pytest_mistral_lora.errors import MistralLoraError, OracleRejection

SENTINEL = "\u263a"
"""The character before which mistral-common encodes a suffix, to keep SentencePiece's space away from it."""

_SENTINEL_IDS = 2
"""Ids that mistral-common drops for it."""

_MARKERS = ("[SUFFIX]", "[PREFIX]")


def fim_unavailable(version: str, literals: Collection[str], sentinel: Sequence[int]) -> str:
    """Return why a tokenizer has no encoding of fill-in-the-middle; empty if it has one.

    Args:
        version: Its version.
        literals: Its control tokens.
        sentinel: Its ids of `SENTINEL`.
    """
    missing = [marker for marker in _MARKERS if marker not in literals]
    if missing:
        # mistral-common would write <unk> in their place
        return f"fill-in-the-middle needs {' and '.join(missing)}, which this tokenizer ({version}) does not have"
    if len(sentinel) != _SENTINEL_IDS:
        # a part of the character would stand in front of the suffix
        return (
            f"mistral-common drops {_SENTINEL_IDS} ids of {SENTINEL!r} in front of a suffix, and this tokenizer "
            f"({version}) has {len(sentinel)}"
        )
    return ""


class FimEncoder:
    """Encodes fill-in-the-middle rows with one tokenizer."""

    def __init__(
        self,
        encode_fim: Callable[[str, str], Sequence[int]],
        encode_text: Callable[[str], tuple[int, ...]],
        control_ids: Mapping[str, int],
        *,
        eos_id: int,
        version: str,
        spaces: bool,
    ) -> None:
        """Prepare the encoder.

        Args:
            encode_fim: mistral-common's `encode_fim`: returns the ids of a prompt and a suffix.
            encode_text: Encodes a bare text.
            control_ids: The id of each control token by its literal.
            eos_id: The id of `</s>`.
            version: The tokenizer's version, for errors.
            spaces: Whether the tokenizer writes a space in front of each text, as SentencePiece does.
        """
        self._encode_fim = encode_fim
        self._encode_text = encode_text
        self._suffix, self._prefix = (control_ids.get(marker) for marker in _MARKERS)
        self._eos = eos_id
        self._spaces = spaces
        self._sentinel = encode_text(SENTINEL)
        self.unavailable = fim_unavailable(version, control_ids, self._sentinel)

    def turns(self, row: FimRow) -> list[Turn]:
        """Return the turns of a row after BOS: suffix, prompt and completion, with EOS behind it.

        Raises:
            OracleRejection: If the tokenizer has no encoding of fill-in-the-middle.
        """
        prompt = self.prompt_turns(row)
        completion = self._completion_ids(row.completion)
        text: list[Part] = [(row.completion, completion)] if completion else []
        return [*prompt, Turn("completion", (*completion, self._eos), [*text, (None, (self._eos,))])]

    def prompt_turns(self, row: FimRow) -> list[Turn]:
        """Return the turns that the completion follows.

        Raises:
            OracleRejection: As `turns`.
        """
        if self.unavailable:
            raise OracleRejection(
                self.unavailable,
                place=row.place,
                expected="a tokenizer with [SUFFIX] and [PREFIX], such as Codestral's",
            )
        _, *ids = self._encode_fim(row.prompt, row.suffix)
        # text never holds a control token, so that the first one is the marker
        middle = ids.index(self._prefix) if self._prefix in ids else 0
        if ids[:1] != [self._suffix] or not middle:
            raise MistralLoraError(
                "mistral-common builds fill-in-the-middle in a way that this package does not know", place=row.place
            )
        pieces = ((("suffix", row.suffix), ids[:middle]), (("prompt", row.prompt), ids[middle:]))
        return [_marked_turn(role, text, tuple(run)) for (role, text), run in pieces]

    def decode_completion(self, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str:
        """Return the text of a completion: by itself, SentencePiece would drop the space that it begins with.

        Args:
            ids: The ids, with or without EOS.
            decode: Decodes ids to text, without control tokens.
        """
        return decode([*self._sentinel, *ids]).removeprefix(SENTINEL) if self._spaces else decode(ids)

    def _completion_ids(self, text: str) -> tuple[int, ...]:
        if not self._spaces:
            return self._encode_text(text)
        ids = self._encode_text(SENTINEL + text)
        if ids[:_SENTINEL_IDS] != self._sentinel:
            raise MistralLoraError(f"the tokenizer joins {SENTINEL!r} with the text after it: {text[:20]!r}")
        return ids[_SENTINEL_IDS:]


def _marked_turn(role: str, text: str, ids: tuple[int, ...]) -> Turn:
    """Return a turn of a marker and a text, which may be empty."""
    parts: list[Part] = [(text, ids[1:])] if len(ids) > 1 else []
    return Turn(role, ids, [(None, ids[:1]), *parts])

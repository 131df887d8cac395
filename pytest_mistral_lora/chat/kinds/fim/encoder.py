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

from collections.abc import Collection, Sequence

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.kinds.fim.rows import FIM_ROLES
from pytest_mistral_lora.chat.oracle.read_back import UnreadableIdsError
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.turns import Part, Tokenization, Turn
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

    def __init__(self, oracle: Tokenization) -> None:
        """Prepare the encoder of a tokenizer; `unavailable` gives the reason if it cannot encode such rows."""
        self._oracle = oracle
        self._suffix, self._prefix = (oracle.control_ids.get(marker) for marker in _MARKERS)
        # SentencePiece writes a space in front of each text
        self._spaces = oracle.kind == "spm"
        self._sentinel = oracle.encode_text(SENTINEL)
        self.unavailable: str = fim_unavailable(oracle.version, oracle.control_ids, self._sentinel)

    @classmethod
    def of(cls, oracle: Tokenization) -> FimEncoder:
        """Return the encoder of a tokenizer, which is prepared once."""
        return oracle.prepared(cls)

    def turns(self, row: Row) -> list[Turn]:
        """Return the turns of a row after BOS: suffix, prompt and completion, with EOS behind it.

        Raises:
            OracleRejection: If the tokenizer has no encoding of fill-in-the-middle.
        """
        prompt, eos = self.prompt_turns(row), self._oracle.eos_id
        written = _text(row, "completion")
        completion = self._completion_ids(written)
        text: list[Part] = [(written, completion)] if completion else []
        return [*prompt, Turn("completion", (*completion, eos), [*text, (None, (eos,))])]

    def prompt_turns(self, row: Row) -> list[Turn]:
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
        prompt, suffix = _text(row, "prompt"), _text(row, "suffix")
        _, *ids = self._prompt_ids(prompt, suffix)
        # text never holds a control token, so that the first one is the marker
        middle = ids.index(self._prefix) if self._prefix in ids else 0
        if ids[:1] != [self._suffix] or not middle:
            raise MistralLoraError(
                "mistral-common builds fill-in-the-middle in a way that this package does not know", place=row.place
            )
        pieces = ((("suffix", suffix), ids[:middle]), (("prompt", prompt), ids[middle:]))
        return [_marked_turn(role, text, tuple(run)) for (role, text), run in pieces]

    def decode_completion(self, ids: Sequence[int]) -> str:
        """Return the text of a completion: by itself, SentencePiece would drop the space that it begins with.

        Args:
            ids: The ids, with or without EOS.
        """
        decode = self._oracle.decode
        return decode([*self._sentinel, *ids]).removeprefix(SENTINEL) if self._spaces else decode(list(ids))

    def texts_of(self, ids: tuple[int, ...], labels: Sequence[int] | None) -> tuple[str, str, str]:
        """Return the prompt, the suffix and the completion of some ids; the first label begins the completion.

        Raises:
            UnreadableIdsError: If the ids have no `[PREFIX]`, or no label tells where the completion begins.
        """
        suffix, prefix = ids.index(self._oracle.control_ids["[SUFFIX]"]), self._oracle.control_ids["[PREFIX]"]
        if prefix not in ids[suffix:]:
            raise UnreadableIdsError(len(ids), "the ids end", "[PREFIX] behind the suffix")
        middle = ids.index(prefix, suffix)
        start = next((n for n, label in enumerate(labels or ()) if label != IGNORE_INDEX), len(ids))
        if start == len(ids):
            expected = "labels, which tell where the completion begins"
            raise UnreadableIdsError(middle, "no label behind [PREFIX]", expected)
        if start <= middle:
            raise UnreadableIdsError(start, "a label before [PREFIX]", "labels of the completion alone")
        end = len(ids) - (ids[-1] == self._oracle.eos_id)
        after, written = (self.decode_completion(run) for run in (ids[suffix + 1 : middle], ids[start:end]))
        return self._oracle.decode(ids[middle + 1 : start]), after, written

    def _prompt_ids(self, prompt: str, suffix: str) -> list[int]:
        from mistral_common.protocol.fim.request import FIMRequest

        request = FIMRequest(prompt=prompt, suffix=suffix)
        return self._oracle.traced_ids("prompt", lambda instruct: instruct.encode_fim(request).tokens)

    def _completion_ids(self, text: str) -> tuple[int, ...]:
        if not self._spaces:
            return self._oracle.encode_text(text)
        ids = self._oracle.encode_text(SENTINEL + text)
        if ids[:_SENTINEL_IDS] != self._sentinel:
            raise MistralLoraError(f"the tokenizer joins {SENTINEL!r} with the text after it: {text[:20]!r}")
        return ids[_SENTINEL_IDS:]


def _marked_turn(role: str, text: str, ids: tuple[int, ...]) -> Turn:
    """Return a turn of a marker and a text, which may be empty."""
    parts: list[Part] = [(text, ids[1:])] if len(ids) > 1 else []
    return Turn(role, ids, [(None, ids[:1]), *parts])


def _text(row: Row, role: str) -> str:
    return str(row.messages[FIM_ROLES.index(role)]["content"])

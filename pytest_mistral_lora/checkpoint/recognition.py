"""Recognise the tokenizer of a folder that has no Mistral tokenizer file, by its vocabulary."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pytest_mistral_lora.chat.oracle import SHIPPED, WRITES_TEMPLATES, Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.oracle.tokenizer_file import oracle_file
from pytest_mistral_lora.checkpoint.tokenizer_folder import (
    MODEL_CONFIG,
    NO_ORACLE,
    SPM_MODEL,
    TOKENIZER_JSON,
    TokenizerFiles,
    own_template,
)
from pytest_mistral_lora.errors import TokenizerError

PROBES = (
    "Hello, world!",
    "End.  Next  sentence.",
    "def f(x):\n    return x  # two\n\tdone\n",
    "'The' don't I'LL HTTPServer's we'Ve",
    "1234567890 3.14 -0.5e10",
    "日本語 中文 한국어",
    "é é ñ Å नमस्ते สวัสดี",
    "👩🏽‍🚀 👨‍👩‍👧‍👦 🇫🇷",
    "مرحبا שלום",
    '{"a": [1, 2.5, null], "b": "\\u00e9"}',
    "https://example.org/a?b=c&d=%20",
    "x\u0016y ju\u0016",
    "\ufb01 \u00bd \u2460 \uff21 \u00a0x \u212b",
)
"""Texts whose ids change with a wrong tokenizer, merge order or pre-tokenizer."""

NAME_IT = (
    "Name its Mistral tokenizer: --mistral-oracle (mistral-lora: --oracle; recipe: base.oracle) with a name such as "
    "spm-v3, the path of its tekken.json or tokenizer.model.vN, or none if there is none."
)

_PLACEHOLDER = re.compile(r"<SPECIAL_\d+>|\[control_\d+\]")
"""Control tokens without a meaning yet: later versions name some of them."""
_MARKER = re.compile(r"\[/?[A-Z][A-Z_]*\]")
_SYSTEM_MARKER = "[SYSTEM_PROMPT]"
"""The files of v3 and v7 have the same control tokens, and only v7 and later write this one."""
_IMAGE_MARKER = "[IMG]"


@dataclass(frozen=True, slots=True)
class Recognition:
    """The oracle of a folder without a Mistral tokenizer file, or the reason why no oracle applies.

    Attributes:
        oracle: The tokenizer that applies, or None.
        name: Our name of a shipped tokenizer, or the declared path; if no oracle applies, the closest tokenizer.
        same: Number of its ids with the same bytes in the folder.
        added: Number of the folder's ids that it does not have.
        alike: Other shipped tokenizers that fit as well.
        declared: Whether a setting named it.
        reason: Why no oracle applies; empty if an oracle applies.
    """

    oracle: Oracle | None
    name: str
    same: int = 0
    added: int = 0
    alike: tuple[str, ...] = ()
    declared: bool = False
    reason: str = ""

    @property
    def text(self) -> str:
        """A sentence for summaries."""
        if self.oracle is None:
            return self.reason
        how = "declared" if self.declared else "recognised"
        more = f", and {self.added:,} more" if self.added else ""
        fits = f"; {', '.join(self.alike)} fits equally, and differs only in images" if self.alike else ""
        ids = f"{self.same:,} of {self.oracle.vocab_size:,} ids are the same{more}"
        return f"{how} as {self.name}: {ids}{fits}"

    @property
    def is_exact(self) -> bool:
        """Whether the folder has exactly the ids of the oracle, with the same bytes."""
        return self.oracle is not None and self.same == self.oracle.vocab_size and not self.added


@dataclass(frozen=True, slots=True)
class StoredVocabulary:
    """The vocabulary in `tokenizer.json` or a bare `tokenizer.model`.

    Attributes:
        kind: `spm` for SentencePiece pieces, `tekken` for byte-level tokens.
        tokens: The bytes of each id, as `Oracle.vocabulary` has them.
        file: The file that it was read from, or the class that has it.
    """

    kind: Literal["spm", "tekken"]
    tokens: Mapping[int, bytes]
    file: str

    @classmethod
    def read(cls, files: TokenizerFiles) -> StoredVocabulary | None:
        """Return the vocabulary of a folder, or None if no file has a readable one."""
        data = files.json(TOKENIZER_JSON)
        model = data.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, list):
            # a Unigram model: its pieces with their scores, in the order of the ids
            vocabulary = {str(entry[0]): n for n, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
        if isinstance(vocabulary, dict):
            added = data.get("added_tokens")
            literals = {
                token["id"]: str(token.get("content"))
                for token in (added if isinstance(added, list) else ())
                if isinstance(token, dict) and isinstance(token.get("id"), int)
            }
            return cls.of(vocabulary, literals, TOKENIZER_JSON)
        model_proto = None if TOKENIZER_JSON in files.names else files.spm_model()
        if model_proto is None:
            return None
        try:
            pieces = spm_pieces(files.file(SPM_MODEL), model_proto)
        except TokenizerError:
            return None
        return cls("spm", {number: piece.encode() for number, (piece, _) in enumerate(pieces)}, SPM_MODEL)

    @classmethod
    def of(cls, vocabulary: Mapping[str, Any], added: Mapping[int, str], file: str) -> StoredVocabulary:
        """Return a vocabulary of pieces.

        Args:
            vocabulary: The id of each piece; a value that is no integer is left out.
            added: The added tokens, by their ids: texts, and not pieces.
            file: The file that it was read from, or the class that has it.
        """
        kind: Literal["spm", "tekken"] = "spm" if "<0x0A>" in vocabulary else "tekken"
        numbered = {number: str(piece) for piece, number in vocabulary.items() if isinstance(number, int)}
        tokens = {number: as_bytes(piece, kind) for number, piece in numbered.items()}
        tokens |= {number: literal.encode(errors="surrogatepass") for number, literal in added.items()}
        return cls(kind, tokens, file)

    def counts(self, oracle: Oracle) -> tuple[int, int]:
        """Return the number of an oracle's ids with the same bytes here, and of ids that the oracle does not have."""
        same = sum(self.tokens.get(number) == token for number, token in enumerate(oracle.vocabulary))
        return same, sum(number >= oracle.vocab_size for number in self.tokens)

    def first_difference(self, oracle: Oracle) -> str:
        """Return the first id with other bytes than in an oracle; empty if all are the same."""
        for number, token in enumerate(oracle.vocabulary):
            have = self.tokens.get(number)
            if have != token:
                shown = "missing" if have is None else repr(have.decode(errors="backslashreplace"))
                return f"id {number} is {shown}, and {token.decode(errors='backslashreplace')!r} there"
        return ""


# Byte-level BPE writes printable Latin-1 bytes as themselves, and the others as characters from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + n): byte for n, byte in enumerate(_OTHERS)}


def as_bytes(token: str, kind: str) -> bytes:
    """Return the bytes of a token of `tokenizer.json`, as `Oracle.vocabulary` has them."""
    if kind == "tekken" and all(char in _BYTES for char in token):
        return bytes(_BYTES[char] for char in token)
    return token.encode(errors="surrogatepass")


def spm_pieces(file: Path, content: bytes | None = None) -> list[tuple[str, float]]:
    """Return the pieces of a SentencePiece file with their scores, in the order of the ids.

    Args:
        file: The file.
        content: Its bytes; None to read it.

    Raises:
        TokenizerError: If it is not a SentencePiece file.
    """
    from sentencepiece import SentencePieceProcessor

    data = file.read_bytes() if content is None else content
    if not data:
        raise TokenizerError("is empty", place=str(file))
    try:
        model = SentencePieceProcessor(model_proto=data)
        return [(model.IdToPiece(number), model.GetScore(number)) for number in range(model.GetPieceSize())]
    except (RuntimeError, TypeError, ValueError) as error:
        raise TokenizerError(f"is not a SentencePiece model: {error}", place=str(file)) from error


@cache
def shipped_oracle(name: str) -> Oracle:
    """Return a tokenizer that mistral-common ships, loaded once a process."""
    return Oracle(shipped_tokenizer(name))


def recognise(files: TokenizerFiles) -> Recognition:
    """Return the shipped tokenizer that is closest to a folder's vocabulary, or the reason why none is close.

    The closest one is the tokenizer with the most ids of the same bytes, if these are more than half. A folder with
    the control tokens or the template of another version is not recognised: its ids would be the same, but not its
    layout.

    Several tokenizers of one vocabulary differ only in images. The result is the tokenizer that generates the folder's
    template, else one with images for a model with images, else the first.
    """
    stored = StoredVocabulary.read(files)
    if stored is None:
        return Recognition(None, "", reason=f"neither {TOKENIZER_JSON} nor {SPM_MODEL} has a vocabulary that loads")
    return recognise_vocabulary(stored, own_template(files) or "", images="vision_config" in files.json(MODEL_CONFIG))


def recognise_vocabulary(stored: StoredVocabulary, template: str, *, images: bool = False) -> Recognition:
    """Return the shipped tokenizer that is closest to a vocabulary, or the reason why none is close: see `recognise`.

    Args:
        stored: The vocabulary.
        template: The chat template beside it; empty if it is missing.
        images: Whether the model reads images.
    """
    known = {name: shipped_oracle(name) for name in SHIPPED if name.startswith(stored.kind)}
    counts = {name: stored.counts(oracle) for name, oracle in known.items()}
    most = max(same for same, _ in counts.values())
    fits = {name: known[name] for name, (same, _) in counts.items() if same == most}
    generated = {name: oracle.chat_template().strip("\n") for name, oracle in fits.items() if WRITES_TEMPLATES}
    same_template = [name for name, text in generated.items() if text == template.strip("\n")]
    with_images = [name for name, text in generated.items() if _IMAGE_MARKER in text]
    chosen = [*same_template, *(with_images if images or _IMAGE_MARKER in template else ()), *fits][0]
    (count, added), oracle = counts[chosen], known[chosen]
    if 2 * count <= oracle.vocab_size:
        closest = f"{count:,} of the {oracle.vocab_size:,} ids of {chosen}, which is the closest one"
        reason = f"its vocabulary is not that of a tokenizer that is known here: it shares {closest}"
        return Recognition(None, chosen, count, added, reason=reason)
    alike = tuple(name for name in fits if name != chosen)
    other = _another_version(stored, oracle, list(generated.values()), template)
    if other:
        reason = f"its vocabulary is that of {chosen}, but {other}, as a later version of it does"
        return Recognition(None, chosen, count, added, alike, reason=reason)
    return Recognition(oracle, chosen, count, added, alike)


def _another_version(stored: StoredVocabulary, oracle: Oracle, generated: list[str], template: str) -> str:
    """Return the token that only another version of a tokenizer has or writes; empty if no such token is found."""
    for number, literal in oracle.control_tokens.items():
        have = stored.tokens.get(number, b"").decode(errors="replace")
        if _PLACEHOLDER.fullmatch(literal) and _MARKER.fullmatch(have):
            return f"id {number} is {have}"
    writes = _SYSTEM_MARKER in template and not any(_SYSTEM_MARKER in text for text in generated)
    if writes and _SYSTEM_MARKER in oracle.control_tokens.values():
        return f"the chat template writes {_SYSTEM_MARKER}"
    return ""


def known_choice(text: str, folder: Path = Path()) -> str:
    """Return the oracle that a setting names: a name unchanged, or the path of a file, relative to a folder.

    Raises:
        TokenizerError: If neither the name nor the file exists.
    """
    if text in (*SHIPPED, NO_ORACLE):
        return text
    found, file = "no such name and no such file", None
    # a name with a NUL, a name that is too long, or an unknown user after `~`
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        # `./~` is a folder of that name
        path = folder / (Path(text).expanduser() if text.startswith("~") else text)
        file = oracle_file(path) if path.exists() else None
        found = "no Mistral tokenizer file" if path.is_dir() else found
    if file is None:
        expected = f"{', '.join(SHIPPED)}, {NO_ORACLE}, or the path of a tekken.json or tokenizer.model.vN"
        raise TokenizerError(found, place=text, expected=expected)
    return str(file)


def accept_oracle(name: str, files: TokenizerFiles, fast: Any) -> Recognition:
    """Compare a folder with a tokenizer: every id, and the ids of the probes.

    Args:
        name: Name of a shipped tokenizer, or path of a file, as a setting declares it.
        files: The files of the folder.
        fast: The transformers tokenizer of the folder; None if transformers does not load it.

    Raises:
        TokenizerError: If the setting names a file that is not a Mistral tokenizer.
    """
    stored = StoredVocabulary.read(files)
    if stored is None:
        return Recognition(None, name, declared=True, reason="the folder has no vocabulary that loads")
    return accept_vocabulary(name, stored, fast)


def accept_vocabulary(name: str, stored: StoredVocabulary, fast: Any) -> Recognition:
    """Compare a vocabulary with a tokenizer: every id, and the ids of the probes.

    Args:
        name: As for `accept_oracle`.
        stored: The vocabulary.
        fast: As for `accept_oracle`.

    Raises:
        TokenizerError: As for `accept_oracle`.
    """
    oracle = shipped_oracle(name) if name in SHIPPED else Oracle(name)
    (same, added), differs = stored.counts(oracle), stored.first_difference(oracle)
    if not differs and fast is not None:
        for text, want, have in probe_differences(oracle, fast):
            differs = f"{text!r} gets the ids {list(have)}, and {list(want)} there"
            break
    if differs:
        reason = f"its tokenizer is not {name}: {same:,} of {oracle.vocab_size:,} ids are the same, but {differs}"
        return Recognition(None, name, same, added, declared=True, reason=reason)
    return Recognition(oracle, name, same, added, declared=True)


def probe_differences(oracle: Oracle, fast: Any) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield each probe with different ids: the text, the ids of the oracle, and those of a transformers tokenizer."""
    space = " " if oracle.kind == "spm" else ""
    for text in PROBES:
        # The text follows a control token, as in a conversation: at the start of a string, SentencePiece differs.
        have = tuple(fast(f"</s>{space}{text}", add_special_tokens=False)["input_ids"])
        want = (oracle.eos_id, *oracle.encode_text(text))
        if have != want:
            yield text, want, have

"""The tokenizer that transformers loads, compared with mistral-common's token by token."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from pytest_mistral_lora.chat.diff import TokenDiff, equal_beginning
from pytest_mistral_lora.checkpoint.model_facts import ModelFacts
from pytest_mistral_lora.checkpoint.quick_conversion import quick_conversion
from pytest_mistral_lora.checkpoint.recognition import PROBES, as_bytes, probe_differences
from pytest_mistral_lora.checkpoint.shared_conversion import original_of
from pytest_mistral_lora.checkpoint.tokenizer_folder import (
    GENERATION_CONFIG,
    MODEL_CONFIG,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
)
from pytest_mistral_lora.checkpoint.weights import embedding_rows
from pytest_mistral_lora.conformance.finding import Finding, first_findings
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.tokenizer.generation import generation_findings
from pytest_mistral_lora.errors import InputError, TokenizerError
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle

_CHUNK = 64
_SHOWN = 5
_SAMPLE = 16_000
"""Tokens to check if the tokenizer was converted here: enough to show whether the conversion is right."""

_ROUND = 64
"""Rows of embeddings are padded to a multiple of 64, or of a multiple of 64, for the GPU's matrix units."""

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def oracle_of(target: Target) -> Oracle | None:
    """Return the oracle, or None if no oracle loads, which the check `control-tokens` reports."""
    try:
        return target.oracle
    except TokenizerError:
        return None


def end_ids(target: Target) -> set[int]:
    """Return the ids that end an answer: EOS of the tokenizer, and those at which the folder's model stops."""
    files = target.tokenizer.files
    stops = files.json(GENERATION_CONFIG).get("eos_token_id", files.json(MODEL_CONFIG).get("eos_token_id"))
    if target.tokenizer.has_fast:
        fast = target.tokenizer.fast
        special = {token for token, added in fast.added_tokens_decoder.items() if added.special}
        eos = fast.eos_token_id
    else:
        special, eos = {*target.oracle.control_tokens}, target.oracle.eos_id
    given = {token for token in (stops if isinstance(stops, list) else [stops]) if isinstance(token, int)} & special
    return {token for token in (*given, eos) if token is not None}


def control_tokens(target: Target) -> Iterator[Finding]:
    """Yield ML202 for control tokens that differ from mistral-common's, are not special, or swallow spaces."""
    oracle, fast = target.oracle, target.tokenizer.fast
    place = target.tokenizer.place
    # transformers recounts its tokens for each of these two
    added, size = fast.added_tokens_decoder, len(fast)
    findings: list[Finding] = []
    for token, literal in oracle.control_tokens.items():
        found = fast.convert_ids_to_tokens(token) if token < size else None
        if found != literal:
            findings.append(Finding("ML202", f"id {token} is {found!r}", place, f"the control token {literal!r}"))
        elif token not in added or not added[token].special:
            findings.append(Finding("ML202", f"{literal!r} (id {token}) is not special", place, "a special token"))
        elif flags := [flag for flag in _FLAGS if getattr(added[token], flag)]:
            found = f"{literal!r} (id {token}) has {' and '.join(flags)}"
            findings.append(Finding("ML202", found, place, "a token that leaves the text around it alone"))
    for token in sorted(added.keys() - oracle.control_tokens.keys() - {oracle.unk_id}):
        if added[token].special or token >= oracle.vocab_size:
            found = f"{added[token].content!r} (id {token}) is {'special' if added[token].special else 'added'}"
            findings.append(Finding("ML202", found, place, "no token that Mistral does not have"))
    yield from first_findings(findings, _SHOWN, place)


def named_tokens(target: Target, names: Sequence[str] = ("bos", "eos", "unk")) -> Iterator[Finding]:
    """Yield ML203 if a named token is not mistral-common's.

    Args:
        target: The target.
        names: The tokens to judge.
    """
    oracle, fast = target.oracle, target.tokenizer.fast
    for name in names:
        want, have = getattr(oracle, f"{name}_id"), getattr(fast, f"{name}_token_id")
        if have != want:
            found = "is not set" if have is None else f"is {have} {oracle.piece(have)!r}"
            yield Finding("ML203", f"{name}_token {found}", target.tokenizer.place, f"{want} {oracle.piece(want)!r}")


def eos_ids(target: Target) -> set[int]:
    """Return the ids of EOS as mistral-common and as transformers see it."""
    if not target.tokenizer.has_fast:
        return {target.oracle.eos_id}
    oracle = oracle_of(target)
    ids = {target.tokenizer.fast.eos_token_id, oracle.eos_id if oracle else None}
    return {token for token in ids if token is not None}


_PADS = "a token of no row: <pad> if the vocabulary has it, else <unk>"
_PAD_FIX = (
    'Set `"pad_token": "<pad>"` in `tokenizer_config.json` if the vocabulary has it, else `"pad_token": "<unk>"`, and '
    "its id as `pad_token_id` in `config.json` and `generation_config.json`."
)


def row_markers(oracle: Oracle | None) -> set[int]:
    """Return the ids of the control tokens that mistral-common writes between the texts of conversations."""
    if oracle is None:
        return set()
    return {token for token, literal in oracle.control_tokens.items() if literal in oracle.facts.control_tokens}


def pad(target: Target) -> Iterator[Finding]:
    """Yield ML204 if the tokenizer pads with an EOS, ML203 if the pad is text or a marker of rows."""
    fast, oracle = target.tokenizer.fast, oracle_of(target)
    place, token = target.tokenizer.place, fast.pad_token_id
    if token is not None and token in eos_ids(target):
        yield Finding("ML204", f"pad_token is EOS ({fast.pad_token!r}, id {token})", place, "another token")
    elif token is not None and oracle and token not in {*oracle.control_tokens, oracle.unk_id}:
        found = f"pad_token is {fast.pad_token!r} (id {token}), which stands for text"
        yield Finding("ML203", found, place, "a control token, or <unk>")
    elif token in row_markers(oracle):
        found = f"pad_token is {fast.pad_token!r} (id {token}), which each row with this marker has"
        yield Finding("ML203", found, place, _PADS, fix=_PAD_FIX)


def vocabulary(target: Target) -> Iterator[Finding]:
    """Yield ML214 if an id has another text than in mistral-common's vocabulary."""
    oracle, fast = target.oracle, target.tokenizer.fast
    place = target.tokenizer.place
    if len(fast) != oracle.vocab_size:
        yield Finding("ML214", f"{len(fast):,} tokens", place, f"{oracle.vocab_size:,} tokens")
    known = range(min(len(fast), oracle.vocab_size))
    text_ids = [token for token in known if token not in oracle.control_tokens and token != oracle.unk_id]
    if target.tokenizer.is_converted:
        text_ids = text_ids[:_SAMPLE]
    # bytes, not text: every token with a part of a character reads as U+FFFD
    have = dict(zip(text_ids, fast.convert_ids_to_tokens(text_ids), strict=True))
    want = _bytes_of(oracle, text_ids)
    other = [token for token in text_ids if as_bytes(have[token], oracle.kind) != want[token]]
    if other:
        sides = (as_bytes(have[other[0]], oracle.kind), want[other[0]])
        found, expected = (repr(side.decode(errors="backslashreplace")) for side in sides)
        found = f"{len(other):,} ids stand for other text, the first is {other[0]}: {found}"
        yield Finding("ML214", found, place, expected)


def _bytes_of(oracle: Oracle, tokens: Sequence[int]) -> Sequence[bytes] | Mapping[int, bytes]:
    """Return the bytes of some tokens, by id; more than a sample of them as the oracle keeps them."""
    return oracle.vocabulary if len(tokens) > _SAMPLE else {token: oracle.token_bytes(token) for token in tokens}


def text_ids(target: Target) -> Iterator[Finding]:
    """Yield ML205 for each probe, and for texts made of the whole vocabulary, whose ids differ from the oracle's."""
    files = target.tokenizer.files
    model = files.json(TOKENIZER_JSON).get("model")
    if isinstance(model, dict) and model.get("dropout"):
        found = f"model.dropout is {model['dropout']}: a text gets other ids each time"
        yield Finding("ML205", found, files.place(TOKENIZER_JSON), '"dropout": null')
        return
    oracle, fast = target.oracle, target.tokenizer.fast
    place = target.tokenizer.place
    for text, want, have in probe_differences(oracle, fast):
        yield Finding("ML205", f"{text!r} gets other ids", place, detail=_difference(want, have, oracle))
    # each control token between two texts: the space before it and the text after it must not change
    space = " " if oracle.kind == "spm" else ""
    before, after = oracle.encode_text("a "), oracle.encode_text(" b")
    texts = [f"</s>{space}a {literal}{space} b" for literal in oracle.control_tokens.values()]
    encoded = fast(texts, add_special_tokens=False)["input_ids"]
    for (token, literal), ids in zip(oracle.control_tokens.items(), encoded, strict=True):
        want = (oracle.eos_id, *before, token, *after)
        if tuple(ids) != want:
            detail = _difference(want, tuple(ids), oracle)
            yield Finding("ML205", f"text around {literal!r} gets other ids", place, detail=detail)
            return
    yield from _vocabulary_texts(target, place, space)


def _vocabulary_texts(target: Target, place: Place, space: str) -> Iterator[Finding]:
    """Yield ML205 for the first text of the vocabulary's own texts that gets other ids."""
    oracle, fast = target.oracle, target.tokenizer.fast
    chunks = _texts_of_all_tokens(target)
    encoded = fast([f"</s>{space}{chunk}" for chunk in chunks], add_special_tokens=False)["input_ids"]
    for chunk, ids in zip(chunks, encoded, strict=True):
        want = (oracle.eos_id, *oracle.encode_text(chunk))
        if tuple(ids) != want:
            detail = _difference(want, tuple(ids), oracle)
            yield Finding("ML205", "texts of the vocabulary get other ids", place, detail=detail)
            return


def _texts_of_all_tokens(target: Target) -> list[str]:
    """Join texts of the vocabulary in a shuffled order: all, so that every token and merge occurs, or a sample."""
    oracle, fast = target.oracle, target.tokenizer.fast
    count = min(_SAMPLE, oracle.vocab_size) if target.tokenizer.is_converted else oracle.vocab_size
    tokens = random.Random(0).sample(range(oracle.vocab_size), count)
    literals = re.compile("|".join(re.escape(token.content) for token in fast.added_tokens_decoder.values()))
    texts, spelled = [], _bytes_of(oracle, tokens)
    for token in tokens:
        piece = spelled[token].decode(errors="replace")
        if oracle.kind == "spm":
            piece = "" if piece.startswith("<0x") else piece.replace("▁", " ")
        # A token with a part of a character has no text, and decodes to U+FFFD.
        if "\ufffd" not in piece and token not in oracle.control_tokens and token != oracle.unk_id:
            texts.append(piece)
    chunks = ["".join(texts[start : start + _CHUNK]) for start in range(0, len(texts), _CHUNK)]
    return [literals.sub("", chunk) for chunk in chunks]


_SPACED = ("He said , no ! Is it ? I do n't , it 's .", " begins with a space", "ends with one ", "two  spaces")
"""Texts that a cleaning of spaces changes: `clean_up_tokenization` of transformers."""


def decoding(target: Target) -> Iterator[Finding]:
    """Yield ML239 if decoding the ids of a text changes it, here or in older versions of transformers.

    A newer transformers ignores `clean_up_tokenization_spaces` for the tokenizers that Mistral has.
    """
    files, fast = target.tokenizer.files, target.tokenizer.fast
    place = files.place(TOKENIZER_JSON)
    oracle = oracle_of(target)
    texts = [*PROBES, *_SPACED, *(_texts_of_all_tokens(target) if oracle else ())]
    if oracle is None:
        # the layout of another family may take a leading space
        texts = [text for text in texts if text.isascii() and not text.startswith(" ")]
        # a byte that the vocabulary lacks is lost before there are ids
        lost = _characters_without_ids(fast, texts)
        texts = [text for text in texts if lost.isdisjoint(text)]
        pairs = list(zip(texts, _ids(fast, texts), strict=True))
        normalizer = fast.backend_tokenizer.normalizer
        if normalizer is not None:
            # what the normaliser changed before there were ids is not the decoder's; SentencePiece's marks the spaces
            normalised = [normalizer.normalize_str(text).replace("▁", " ").removeprefix(" ") for text in texts]
            pairs = [pair for pair, text in zip(pairs, normalised, strict=True) if pair[0] == text]
    else:
        # after EOS, a text keeps its leading space; other ids than the oracle's are for ML205, not for the decoder
        after_eos = _ids(fast, [f"</s>{' ' if oracle.kind == 'spm' else ''}{text}" for text in texts])
        pairs = [
            (text, ids[1:])
            for text, ids in zip(texts, after_eos, strict=True)
            if tuple(ids) == (oracle.eos_id, *oracle.encode_text(text))
        ]
    for (text, _), decoded in zip(pairs, fast.batch_decode([ids for _, ids in pairs]), strict=True):
        if decoded != text:
            at = equal_beginning(text, decoded)
            found, expected = (repr(side[max(0, at - 20) : at + 20]) for side in (decoded, text))
            yield Finding("ML239", f"the ids of a text are decoded to {found}", place, expected, severity="error")
            return
    if files.json(TOKENIZER_CONFIG).get("clean_up_tokenization_spaces"):
        from pytest_mistral_lora.programs.facts import find_fact

        known = find_fact("decoding-cleans-spaces")
        older = "an older transformers" if known is None else f"transformers before {known.until['transformers']}"
        found = f"clean_up_tokenization_spaces is true: {older} decodes 'No , it is n't' to 'No, it isn't'"
        yield Finding("ML239", found, files.place(TOKENIZER_CONFIG), '"clean_up_tokenization_spaces": false')


def _characters_without_ids(fast: Any, texts: list[str]) -> set[str]:
    """Return the characters of the texts that get no id, or the id of an unknown token."""
    characters = sorted({character for text in texts for character in text})
    ids = _ids(fast, characters)
    return {character for character, own in zip(characters, ids, strict=True) if not own or fast.unk_token_id in own}


def _ids(fast: Any, texts: list[str]) -> list[list[int]]:
    if not texts:  # transformers raises an IndexError for a batch of none
        return []
    encoded: list[list[int]] = fast(texts, add_special_tokens=False)["input_ids"]
    return encoded


def save_and_load(target: Target) -> Iterator[Finding]:
    """Yield ML206 if saving and loading changes the tokenizer, by `AutoTokenizer` or by its saved class."""
    fast = target.tokenizer.fast
    conversion = original_of(fast)
    if conversion is fast:
        changes: Iterable[_Change] = _changes_by_saving(fast)
    else:
        # files may share it, and to save and load the vocabulary takes a second for Tekken; the template is its own
        if conversion not in _CHANGES:
            _CHANGES[conversion] = (*_changes_by_saving(conversion),)
        changes = (*_changes_by_saving(_with_template_alone(fast)), *_CHANGES[conversion])
    for found, expected, detail in changes:
        yield Finding("ML206", found, target.tokenizer.place, expected, detail)


_Change = tuple[str, str, str]
"""What saving and loading changes: found, expected, detail."""
_CHANGES: WeakKeyDictionary[Any, tuple[_Change, ...]] = WeakKeyDictionary()
"""What saving and loading changes in each conversion."""


def _with_template_alone(fast: Any) -> Any:
    """Return a tokenizer that has the chat template of another one, and no vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    empty.chat_template = fast.chat_template
    return empty


def _changes_by_saving(fast: Any) -> Iterator[_Change]:
    """Yield each difference of a tokenizer that is saved and loaded."""
    import transformers

    with tempfile.TemporaryDirectory() as folder, quick_conversion():
        fast.save_pretrained(folder)
        first = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        loaded = [first]
        name = first.init_kwargs.get("tokenizer_class") or type(first).__name__
        saved: Any = getattr(transformers, str(name), None)
        is_fast = isinstance(saved, type) and issubclass(saved, transformers.PreTrainedTokenizerFast)
        if is_fast and saved is not type(first):
            loaded.append(saved.from_pretrained(folder))
    for again in loaded:
        if again.chat_template != fast.chat_template:
            yield "the chat template changes", "the same template", ""
        if (was := fast.special_tokens_map) != (now := again.special_tokens_map):
            names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
            yield f"{', '.join(names)} changes by save and load", "the same tokens", ""
        for text in PROBES:
            before, after = (
                tuple(tokenizer(f"<s>{text}</s>", add_special_tokens=False)["input_ids"]) for tokenizer in (fast, again)
            )
            if before != after:
                yield f"{text!r} gets other ids after save and load", "", _difference(before, after, fast)


def model_config(target: Target) -> Iterator[Finding]:
    """Yield ML204, ML215, ML216, ML217, ML240 and ML241 if the model's configuration does not fit the tokenizer."""
    files = target.tokenizer.files
    for name in (MODEL_CONFIG, GENERATION_CONFIG):
        config = files.json(name)
        for part in ModelFacts(config).levels.values():
            yield from _named_ids(target, part, files.place(name))
    if GENERATION_CONFIG in files.names and GENERATION_CONFIG not in files.faults:
        place = files.place(GENERATION_CONFIG)
        yield from generation_findings(files.json(GENERATION_CONFIG), end_ids(target), place)
    yield from _embedding_findings(target)


def _named_ids(target: Target, config: Mapping[str, Any], place: Place) -> Iterator[Finding]:
    oracle, eos = oracle_of(target), eos_ids(target)
    rows = ModelFacts(target.tokenizer.files.json(MODEL_CONFIG)).vocabulary
    known = oracle.vocab_size if oracle else len(target.tokenizer.fast)
    # a pad may be added, if the embeddings have a row for it
    sizes = {"bos": known, "eos": known, "pad": rows if isinstance(rows, int) else known}
    given: dict[str, list[Any]] = {}
    for key in ("bos", "eos", "pad"):
        value = config.get(f"{key}_token_id")
        values = value if isinstance(value, list) else [value]
        if value is None:
            values = []
        given[key] = [item if isinstance(item, int) else repr(item) for item in values]
    fast: Any = target.tokenizer.fast if target.tokenizer.has_fast else None
    tokens = 0 if fast is None else len(fast)
    bos = oracle.bos_id if oracle else fast.bos_token_id
    for key, ids in given.items():
        for token in ids:
            if not (isinstance(token, int) and 0 <= token < sizes[key]):
                # of a token that was added to the tokenizer, the embeddings have too few rows
                cause = "ML215" if token in range(known, tokens) else ""
                found = f"{key}_token_id {token} is not in the vocabulary"
                yield Finding("ML217", found, place, f"below {sizes[key]}", effect_of=cause)
    if eos & set(given["pad"]) or set(given["pad"]) & set(given["eos"]):
        yield Finding("ML204", f"pad_token_id {given['pad'][0]} is an EOS", place, "another token")
    for token in row_markers(oracle).intersection(given["pad"]):
        found = f"pad_token_id {token} is {target.oracle.piece(token)}, which rows have"
        yield Finding("ML217", found, place, _PADS, fix=_PAD_FIX)
    # a model of another family may stop at several control tokens
    allowed = eos if oracle else eos | end_ids(target)
    other = [token for token in given["eos"] if token not in allowed]
    if eos and other:
        yield Finding("ML217", f"eos_token_id {other[0]} is not EOS", place, ", ".join(map(str, sorted(eos))))
    if bos is not None and given["bos"] and given["bos"] != [bos]:
        # transformers writes the ids of the tokenizer there
        cause = "ML203" if fast is not None and given["bos"] == [fast.bos_token_id] else ""
        yield Finding("ML217", f"bos_token_id {given['bos'][0]} is not BOS", place, str(bos), effect_of=cause)


def _embedding_findings(target: Target) -> Iterator[Finding]:
    """Compare the vocabulary with `vocab_size`, and `vocab_size` with the rows of the embeddings."""
    files = target.tokenizer.files
    declared = ModelFacts(files.json(MODEL_CONFIG)).vocabulary
    rows: dict[str, int] = {}
    for weights in files.weights:
        try:
            rows |= embedding_rows(target.weights_header(weights))
        except InputError:
            continue  # The check `file` reports it.
    if declared is not None:
        for name, count in rows.items():
            if count != declared:
                yield Finding("ML215", f"{name} has {count:,} rows", files.place(), f"vocab_size {declared}")
        rows = {"vocab_size": declared, **rows}
    tokens = len(target.tokenizer.fast) if target.tokenizer.has_fast else target.oracle.vocab_size
    for name, count in rows.items():
        if not isinstance(count, int) or count < tokens:
            found = f"{name} is {count!r}, and the tokenizer has {tokens:,} tokens"
            yield Finding("ML215", found, files.place(), "a row for each token")
            return
        if count > tokens and count % _ROUND:
            found = f"{name} is {count:,}, more than the {tokens:,} tokens"
            yield Finding("ML216", found, files.place(), f"{tokens:,}, or a multiple of {_ROUND}")
            return


def _difference(want: tuple[int, ...], have: tuple[int, ...], tokens: Any) -> str:
    piece = tokens.piece if hasattr(tokens, "piece") else lambda token: str(tokens.convert_ids_to_tokens(token))
    return TokenDiff.of((want, None), (have, None), piece).table()

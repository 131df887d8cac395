"""The tokenizer and the chat template in a GGUF file, compared with mistral-common.

src/llama-vocab.cpp of ggml-org/llama.cpp has the defaults of missing fields, conversion/ the writers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.checkpoint.recognition import spm_pieces
from pytest_mistral_lora.conformance.finding import Finding, first_findings
from pytest_mistral_lora.errors import OracleRejection, TokenizerError, shortened
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.records.gguf_file import GgufFile

MODELS = {"spm": "llama", "tekken": "gpt2"}
"""The value of `tokenizer.ggml.model` for each kind of tokenizer."""

_SPLITTER = "tekken"
"""The value of `tokenizer.ggml.pre` under which readers split text as Tekken does."""
_CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 3, 4, 5, 6
_TYPES = {
    1: "normal",
    2: "unknown",
    _CONTROL: "control",
    _USER_DEFINED: "user defined",
    _UNUSED: "unused",
    _BYTE: "byte",
}
_IDS = ("bos", "eos", "unk")
_FIELDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id"}
_DEFAULT_IDS: Mapping[str, Mapping[str, int | None]] = {
    "spm": {"bos": 1, "eos": 2, "unk": 0},
    "tekken": {"bos": 11, "eos": 11, "unk": None},
}
"""The ids that readers take if a field is missing."""
_SHOWN_ROWS = 5

_CONVERT = 'a conversion of a folder with tokenizer.model and "add_prefix_space": false in tokenizer_config.json'


def tokenizer_findings(file: GgufFile, oracle: Oracle) -> Iterator[Finding]:
    """Yield ML912 for each reason why a reader's ids of a text differ from mistral-common's."""
    place, model, expected = Place.of(file.path), file.setting("model"), MODELS[oracle.kind]
    if model != expected:
        found = f"tokenizer.ggml.model is {shortened(model)}"
        yield Finding("ML912", found, place, f"{expected!r}, the kind of {oracle.path.name}")
        return
    yield from _vocabulary_findings(file, oracle)
    yield from _type_findings(file, oracle)
    yield from _id_findings(file, oracle)
    if oracle.kind == "spm":
        yield from _score_findings(file, oracle)
        if file.setting("add_space_prefix") is not False:
            state = "missing, and readers take true" if file.setting("add_space_prefix") is None else "true"
            key = "tokenizer.ggml.add_space_prefix"
            found = f"{key} is {state}: each control token is followed by a second space"
            again = 'Convert again from a folder whose tokenizer_config.json has "add_prefix_space": false'
            fix = f"{again}; or serve this file with --override-kv {key}=bool:false."
            yield Finding("ML912", found, place, "false", fix=fix)
        return
    if file.setting("pre") != _SPLITTER:
        # a converter chooses it by the ids of one text, on which Tekken and the pattern of Llama 3 ("pixtral") agree
        found = f"tokenizer.ggml.pre is {shortened(file.setting('pre'))}: readers split text by another pattern"
        fix = f"Serve this file with --override-kv tokenizer.ggml.pre=str:{_SPLITTER}."
        yield Finding("ML912", found, place, repr(_SPLITTER), fix=fix)
    yield from _merge_findings(file, oracle)


def _vocabulary_findings(file: GgufFile, oracle: Oracle) -> Iterator[Finding]:
    """Yield a finding for ids with other bytes, and a finding for ids that the tokenizer lacks."""
    stored, place = file.vocabulary, Place.of(file.path)
    if stored is None:
        yield Finding("ML912", "has no list tokenizer.ggml.tokens", place, f"{oracle.vocab_size:,} tokens")
        return
    differs = stored.first_difference(oracle)
    if differs:
        count = oracle.vocab_size - stored.counts(oracle)[0]
        yield Finding("ML912", f"{count:,} ids stand for other bytes: {differs}", place, f"those of {oracle.path.name}")
    given = file.setting("token_type")
    types = given if isinstance(given, list) else []
    # a converter fills the rows of a larger embedding matrix with unused tokens
    added = [
        number for number in stored.tokens if number >= oracle.vocab_size and types[number : number + 1] != [_UNUSED]
    ]
    if added:
        text = stored.tokens[added[0]].decode(errors="backslashreplace")
        found = f"{len(added):,} tokens more than {oracle.path.name}, the first is {text!r} (id {added[0]})"
        yield Finding("ML912", found, place, f"{oracle.vocab_size:,} tokens")


def _type_findings(file: GgufFile, oracle: Oracle) -> Iterator[Finding]:
    """Yield a finding if a control token, a text token or a byte has the wrong type."""
    types, place = file.setting("token_type"), Place.of(file.path)
    if not isinstance(types, list) or len(types) < oracle.vocab_size:
        if types is None:
            found = "missing"
        elif isinstance(types, list):
            found = f"of {len(types):,} entries"
        else:
            found = shortened(types)
        yield Finding("ML912", f"tokenizer.ggml.token_type is {found}", place, f"{oracle.vocab_size:,} entries")
        return
    wrong: dict[str, list[int]] = {}
    for number in range(oracle.vocab_size):
        kind, control = types[number], number in oracle.control_tokens
        if control and kind != _CONTROL and number != oracle.unk_id:
            wrong.setdefault("control", []).append(number)
        elif not control and number != oracle.unk_id and kind in (_CONTROL, _USER_DEFINED):
            wrong.setdefault("normal", []).append(number)
        elif oracle.kind == "spm" and (kind == _BYTE) != _is_byte(oracle.piece(number)):
            wrong.setdefault("byte" if kind != _BYTE else "normal", []).append(number)
    for expected, numbers in wrong.items():
        first = numbers[0]
        kind = _TYPES.get(types[first], str(types[first]))
        found = f"{len(numbers):,} tokens have a wrong type, the first is {oracle.piece(first)} (id {first}): {kind}"
        yield Finding("ML912", found, place, expected)


def _is_list_of(values: Any, kind: type) -> bool:
    # all entries of a GGUF list have the same type
    return isinstance(values, list) and isinstance(next(iter(values), None), kind)


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _id_findings(file: GgufFile, oracle: Oracle) -> Iterator[Finding]:
    """Yield a finding for another id of BOS, EOS or the unknown token, and for flags that omit BOS or add EOS."""
    place = Place.of(file.path)
    for name in _IDS:
        given = file.setting(_FIELDS[name])
        used = _DEFAULT_IDS[oracle.kind][name] if given is None else given
        expected = getattr(oracle, f"{name}_id")
        if used != expected and not (name == "unk" and used is None):
            state = f"missing, and readers take {used}" if given is None else shortened(given)
            yield Finding("ML912", f"tokenizer.ggml.{_FIELDS[name]} is {state}", place, str(expected))
    if file.setting("add_bos_token") is False:
        found = "tokenizer.ggml.add_bos_token is false: a prompt that is sent as text has no <s>"
        yield Finding("ML912", found, place, "true")
    if file.setting("add_eos_token"):
        found = "tokenizer.ggml.add_eos_token is true: a prompt ends with </s>, and the model has nothing to answer"
        yield Finding("ML912", found, place, "false")


def default_end(file: GgufFile, oracle: Oracle) -> str:
    """Return the EOS that readers take for a missing field, in words, if the vocabulary has the tokenizer's there."""
    used = _DEFAULT_IDS[oracle.kind]["eos"]
    is_missing = file.setting(_FIELDS["eos"]) is None and file.setting("model") == MODELS[oracle.kind]
    # another token at its id is a finding of the vocabulary
    if not is_missing or used != oracle.eos_id or file.vocabulary is None:
        return ""
    return f"tokenizer.ggml.{_FIELDS['eos']} is missing, and readers take {used}, which is {oracle.piece(used)}"


def _score_findings(file: GgufFile, oracle: Oracle) -> Iterator[Finding]:
    """Yield a finding if a score is not the SentencePiece file's: the scores decide which pieces merge first."""
    scores, place = file.setting("scores"), Place.of(file.path)
    if not _is_list_of(scores, float) or len(scores) < oracle.vocab_size:
        yield Finding("ML912", "has no tokenizer.ggml.scores for each token", place, _CONVERT)
        return
    # as the file stores them, in float32
    expected = [struct.unpack("<f", struct.pack("<f", score))[0] for _, score in spm_pieces(oracle.path)]
    unmerged = {*oracle.control_tokens, oracle.unk_id}
    wrong = [
        number
        for number, score in enumerate(expected)
        # the text of a control token, of a byte and of <unk> is never merged
        if scores[number] != score and number not in unmerged and not _is_byte(oracle.piece(number))
    ]
    if not wrong:
        return
    first = wrong[0]
    alike = len({scores[number] for number in wrong}) == 1
    found = f"{len(wrong):,} scores are wrong, the first is that of {oracle.piece(first)!r} (id {first}): "
    found += f"{scores[first]:g}{', as all others' if alike and len(wrong) > 1 else ''}"
    yield Finding("ML912", found, place, f"{expected[first]:g}: {_CONVERT}")


def _merge_findings(file: GgufFile, oracle: Oracle) -> Iterator[Finding]:
    """Yield a finding if the merges make other tokens first than Tekken, which starts with the lowest id."""
    merges, place, stored = file.setting("merges"), Place.of(file.path), file.vocabulary
    tokens = file.setting("tokens")
    if not (_is_list_of(merges, str) and _is_list_of(tokens, str)) or stored is None:
        yield Finding("ML912", "has no list tokenizer.ggml.merges", place, "the merges of the tokenizer")
        return
    ranks = {token: number for number, token in enumerate(tokens) if number not in oracle.control_tokens}
    made, last = set(), -1
    for place_in_list, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        number = ranks.get(left + right)
        if number is None or number < last:
            text = "no token" if number is None else f"id {number}, after a merge to id {last}"
            found = f"merge {place_in_list} ({shortened(merge)}) gives {text}"
            yield Finding("ML912", found, place, "merges in the order of the ids that they give")
            return
        made.add(number)
        last = number
    missing = [number for token, number in ranks.items() if number not in made and len(token) > 1]
    if missing:
        found = f"no merge gives {len(missing):,} tokens, the first is {oracle.piece(missing[0])!r} (id {missing[0]})"
        yield Finding("ML912", found, place, "a merge for each token of several bytes")


def template_findings(file: GgufFile, judge: CheckpointTokenizer) -> Iterator[Finding]:
    """Yield ML913 for an invalid template, and for each packaged row that it renders differently."""
    from pytest_mistral_lora.chat.oracle import WRITES_TEMPLATES

    place, text = Place.of(file.path).within("tokenizer", "chat_template"), file.template
    if text is None:
        yield Finding("ML913", "is missing: readers take ChatML's", place, "the checkpoint's chat template")
        return
    if "{" not in text:
        found = f"is the name {shortened(text)}, not a template: each prompt is this text, and the user's is lost"
        yield Finding("ML913", found, place, "the text of the checkpoint's chat template")
        return
    oracle = judge.oracle
    if WRITES_TEMPLATES and text.rstrip("\n") == oracle.chat_template().rstrip("\n"):
        return
    yield from first_findings(list(_rendered_findings(text, judge, oracle, place)), _SHOWN_ROWS, place)


def _rendered_findings(text: str, judge: CheckpointTokenizer, oracle: Oracle, place: Place) -> Iterator[Finding]:
    from pytest_mistral_lora.chat.diff import TokenDiff
    from pytest_mistral_lora.chat.templates import ChatTemplate
    from pytest_mistral_lora.chat.templates.compare import compare
    from pytest_mistral_lora.conformance.template import own_prompt_finding
    from pytest_mistral_lora.records.goldens import packaged_cases

    try:
        template = ChatTemplate(judge.fast, text)
    except TokenizerError as error:
        yield Finding("ML913", error.found, place, error.expected)
        return
    own_prompt = own_prompt_finding(template, place)
    if own_prompt is not None:
        yield own_prompt
    for case in packaged_cases():
        try:
            comparison = compare(case.row, oracle, template)
        except OracleRejection:
            continue
        for difference in comparison.differences:
            sides = comparison.sides_of(difference)
            table = TokenDiff.of(*sides, oracle.piece).table() if sides else ""
            found, row = f"differs from mistral-common: {difference.found}", case.row.to_jsonl()
            shape, name = difference.shape, difference.fault
            yield Finding("ML913", found, place, "the ids of training", table, row, shape=shape, name=name)

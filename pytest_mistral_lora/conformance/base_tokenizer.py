"""The tokenizer and the chat template beside an adapter or a merged model, compared with the base's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.diff import TokenDiff, equal_beginning
from pytest_mistral_lora.chat.oracle import WRITES_TEMPLATES, Oracle
from pytest_mistral_lora.chat.oracle.tokenizer_file import TEKKEN
from pytest_mistral_lora.checkpoint.model_facts import ModelFacts
from pytest_mistral_lora.checkpoint.recognition import PROBES
from pytest_mistral_lora.checkpoint.tokenizer_folder import (
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    in_folder,
    loaded_place,
    own_template,
    template_places,
)
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.finding import Finding, Result, first_findings
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.tokenizer.folder import ends_agree
from pytest_mistral_lora.errors import NoTemplateError, OracleRejection, RowError, TokenizerError
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.rows import Row
    from pytest_mistral_lora.records.adapter_folder import AdapterFolder

GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Marks of generation blocks: trainers add them, and they do not change the rendered text."""

_SHOWN = 5
_LONGEST_SHOWN = 4000
_CHUNK = 64
_NAMES = ("bos", "eos", "unk")
_SETTINGS = ("padding_side", "truncation_side", "model_max_length", "chat_template", "processor_class")
"""Keys of `tokenizer_config.json` that trainers set, and that do not change a text's ids."""

_MARKS = ("truncation", "padding")


def tokenizer_result(folder: AdapterFolder, rows: int | None) -> Result:
    """Compare the tokenizer of a folder with its base's, and its files with each other: ML238, ML440 and ML441.

    Args:
        folder: The folder of an adapter or a merged model.
        rows: Rows of the folder's own embeddings; None if the base's are used.
    """
    saved, target, missing = _tokenizers(folder)
    if target is None:
        return Result(not_checked=missing)
    base = target.tokenizer
    if not saved.is_there:
        return Result(not_checked="no tokenizer in the folder: the base's is used")
    if not base.is_there:
        return Result(not_checked=f"no tokenizer in the base {base.path}")
    saved.files.refuse_hazards()
    base.files.refuse_hazards()
    if rows is None:
        rows = ModelFacts(base.files.json("config.json")).vocabulary
    stored = (*ends_agree(saved.files), *_stored_findings(saved, base))
    return Result((*stored, *_loaded_findings(saved, base, rows)))


def template_result(folder: AdapterFolder, *, is_model: bool = False) -> Result:
    """Compare the chat template of a folder with its base's: ML442.

    Args:
        folder: The folder of an adapter or a merged model.
        is_model: Whether the folder is loaded by itself, without its base's template.
    """
    saved, target, missing = _tokenizers(folder)
    if target is None:
        return Result(not_checked=missing)
    base = target.tokenizer
    texts = (
        template_places(tokenizer.files).get("default", {}).get(loaded_place(tokenizer.files))
        for tokenizer in (saved, base)
    )
    text, other = texts
    if is_model and text is None and other is not None and saved.is_there:
        expected = f"that of {base.path}"
        return Result((Finding("ML442", "there is a tokenizer, and no chat template", saved.place, expected),))
    if text is None or (other is None and not (base.is_there and base.has_oracle)):
        return Result(not_checked=f"no chat template in {(saved if text is None else base).path}")
    # a base without a template is used with the template that mistral-common generates
    generated = other is None
    other = base.oracle.chat_template() if other is None else other
    if _is_same_text(text, other):
        return Result()
    if not text.strip():
        return Result((Finding("ML442", "the chat template is empty", _template_place(saved), f"that of {base.path}"),))
    place = _template_place(saved)
    if generated:
        expected = f"the ids of mistral-common for {base.path}, which has no template of its own"
        return Result(tuple(_oracle_findings(place, base, text, expected)))
    return Result(tuple(_rendered_findings(place, base, text, other)))


def _is_same_text(text: str, other: str) -> bool:
    """Return whether two templates differ in nothing but the marks of generation blocks."""
    return GENERATION.sub("", text).strip() == GENERATION.sub("", other).strip()


def loaded_template_result(
    loaded: CheckpointTokenizer, text: str, base: CheckpointTokenizer | None, place: Place | None = None
) -> Result:
    """Compare the chat template of a loaded tokenizer with its base's and with mistral-common: ML442.

    A program may replace the template of its base by one that has mistral-common's ids: that is no fault.

    Args:
        loaded: The loaded tokenizer, with its oracle.
        text: Its template.
        base: The folder that it was loaded from; None if it is not on this machine.
        place: The place of the template; None for the tokenizer's key.

    Raises:
        NoOracleError: If no Mistral tokenizer applies, and the template is not the base's.
    """
    place = place or loaded.place / "chat_template"
    if not text.strip():
        return Result((Finding("ML442", "the chat template is empty", place, "a template that renders a row"),))
    if WRITES_TEMPLATES and _is_same_text(text, loaded.oracle.chat_template()):
        return Result(facts=(("template of", "the chat template is the one that mistral-common generates"),))
    if base is not None and _is_same_text(text, own_template(base.files) or ""):
        return Result(facts=(("template of", f"the chat template is that of {base.path}"),))
    expected = "the ids of mistral-common, or the template of the base"
    return Result(tuple(_oracle_findings(place, loaded, text, expected)))


def base_result(folder: AdapterFolder) -> Result:
    """Judge the properties of an adapter's base that change how it learns and when it stops: pad, EOS, vocabulary."""
    from pytest_mistral_lora.conformance.tokenizer.ids import model_config, pad

    _, base, missing = _tokenizers(folder)
    if base is None:
        return Result(not_checked=missing)
    if not base.tokenizer.is_there:
        return Result(not_checked=f"no tokenizer in the base {base.path}")
    return Result((*pad(base), *model_config(base)))


@lru_cache(maxsize=1)  # three checks of one folder load both tokenizers once
def _tokenizers(folder: AdapterFolder) -> tuple[CheckpointTokenizer, Target | None, str]:
    base = folder.located_base
    target = None if base.folder is None else Target(base.folder.path.name, base.folder.path, opened=base.folder)
    return folder.checkpoint.tokenizer(), target, base.missing


def _stored_findings(saved: CheckpointTokenizer, base: CheckpointTokenizer) -> Iterator[Finding]:
    """Yield ML440 for another Mistral tokenizer file, and for a length that a training run left in tokenizer.json."""
    files, others = saved.files, base.files
    for name in files.mistral_files:
        if name in others.digests:
            if files.digests.get(name) != others.digests[name]:
                expected = f"the bytes of {others.file(name)}"
                yield Finding("ML440", f"has SHA-256 {files.digests.get(name)}", files.place(name), expected)
        elif base.has_oracle and _tokens_of(Oracle(files.file(name))) != _tokens_of(base.oracle):
            # servers and transformers take such a file before tokenizer.json
            expected = f"no such file, as in the base, or {base.oracle.path.name} ({base.oracle.version})"
            yield Finding("ML440", "is another tokenizer than the base's", files.place(name), expected)
    for key in _MARKS:
        value = files.json(TOKENIZER_JSON).get(key)
        # padding to the longest row of a batch does not change a single text
        cuts = isinstance(value, dict) and (key == "truncation" or isinstance(value.get("strategy"), dict))
        if cuts and value != others.json(TOKENIZER_JSON).get(key):
            found = (
                f"{key} is {value}: every text is {'cut' if key == 'truncation' else 'padded'} to a length of training"
            )
            yield Finding("ML440", found, files.place(TOKENIZER_JSON), f'"{key}": null, as in the base')


def _tokens_of(oracle: Oracle) -> tuple[Any, ...]:
    return oracle.version, oracle.control_tokens, oracle.vocabulary


def _loaded_findings(saved: CheckpointTokenizer, base: CheckpointTokenizer, rows: Any) -> Iterator[Finding]:
    """Yield ML440 and ML441 for differences between the tokenizers that transformers loads from the two folders."""
    digests = saved.files.digests, base.files.digests
    settings = [
        {key: value for key, value in tokenizer.files.json(TOKENIZER_CONFIG).items() if key not in _SETTINGS}
        for tokenizer in (saved, base)
    ]
    names = (TOKENIZER_JSON, SPECIAL_TOKENS, "tokenizer.model", TEKKEN)
    same = settings[0] == settings[1] and all(digests[0].get(name) == digests[1].get(name) for name in names)
    if TOKENIZER_JSON in digests[0] and same:
        return  # both load as the same tokenizer; this saves seconds for a large vocabulary
    place, fast, others = saved.place, saved.fast, base.fast
    for name in _NAMES:
        found, expected = (getattr(tokenizer, f"{name}_token") for tokenizer in (fast, others))
        if found != expected and expected is not None:
            yield Finding("ML441", f"{name}_token is {found!r}", place, f"{expected!r}, as in the base")
    tokens = fast.added_tokens_decoder  # made anew at each access
    for token, added_token in sorted(others.added_tokens_decoder.items()):
        now = tokens.get(token)
        if now is not None and now.content == added_token.content and now.special != added_token.special:
            found = f"{added_token.content!r} (id {token}) is {'' if now.special else 'not '}special"
            yield Finding("ML441", found, place, f"{'' if added_token.special else 'not '}special, as in the base")
    vocabulary, known = fast.get_vocab(), others.get_vocab()
    moved = sorted((number, text) for text, number in known.items() if vocabulary.get(text) != number)
    if moved:
        number, text = moved[0]
        found = f"{len(moved):,} tokens have another id or are missing, the first is {text!r}: {vocabulary.get(text)}"
        yield Finding("ML440", found, place, f"{number}, as in the base")
        return
    # a pad token, or markers of a new template, need rows in the embeddings; the model fails on ids without a row
    added = sorted((number, text) for text, number in vocabulary.items() if text not in known)
    late = [(number, text) for number, text in added if not isinstance(rows, int) or number >= rows]
    if late and (isinstance(rows, int) or [text for _, text in late] != [fast.pad_token]):
        number, text = late[0]
        found = f"{len(late):,} tokens more than the base has, the first is {text!r} (id {number})"
        yield Finding("ML440", found, place, f"ids below {rows}: the embeddings have no row for others")
    if all(TOKENIZER_JSON in files for files in digests):
        # what transformers writes around a text of a tokenizer that it converts is no choice of the base's
        yield from _end_findings(fast, others, place)
    yield from first_findings(list(_text_findings(fast, others, place)), _SHOWN, place)


def _end_findings(fast: Any, others: Any, place: Place) -> Iterator[Finding]:
    """Yield ML440 if other control tokens are written around a text than by the base."""
    written = [tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"]) for tokenizer in (fast, others)]
    plain = [tokenizer.tokenize("a", add_special_tokens=False) for tokenizer in (fast, others)]
    if written[0] != written[1] and plain[0] == plain[1]:
        found = f"the text 'a' becomes {' '.join(written[0])}"
        yield Finding("ML440", found, place, f"{' '.join(written[1])}, as in the base")


def _text_findings(fast: Any, others: Any, place: Place) -> Iterator[Finding]:
    """Yield ML440 for each text whose ids differ: probes, and texts made of the whole vocabulary."""
    tokens = others.convert_ids_to_tokens(list(range(len(others))))
    plain = [text.replace("▁", " ").replace("Ġ", " ") for text in tokens if text and not text.startswith("<0x")]
    # a step that shares no factor with most sizes: neighbours in the vocabulary are not neighbours in the text
    step = 7919
    mixed = [plain[index * step % len(plain)] for index in range(len(plain))]
    texts = [*PROBES, *("".join(mixed[at : at + _CHUNK]) for at in range(0, len(mixed), _CHUNK))]
    marked = [f"{others.bos_token or ''}{text}" for text in texts]
    found, expected = (tokenizer(marked, add_special_tokens=False)["input_ids"] for tokenizer in (fast, others))
    for text, ids, wanted in zip(texts, found, expected, strict=True):
        if ids != wanted:
            shown = text if len(text) <= 40 else f"{text[:40]}…"
            difference = TokenDiff.of(
                (wanted, None), (ids, None), lambda token: str(others.convert_ids_to_tokens(token))
            )
            yield Finding(
                "ML440", f"{shown!r} gets other ids than the base's", place, "the base's ids", difference.table()
            )
            if text not in PROBES:
                return


def _oracle_findings(place: Place, base: CheckpointTokenizer, text: str, expected: str) -> Iterator[Finding]:
    """Yield ML442 for the first packaged row whose rendering differs from mistral-common's encoding."""
    from pytest_mistral_lora.chat.templates import ChatTemplate
    from pytest_mistral_lora.chat.templates.compare import compare

    template = ChatTemplate(base.fast, text)
    for row in _compared_rows():
        try:
            comparison = compare(row, base.oracle, template)
        except OracleRejection:
            continue
        if comparison.own_prompt or comparison.differences:
            differs = comparison.unexplained or "it writes a system prompt of its own"
            found = f"the chat template differs from mistral-common: {differs}"
            yield Finding("ML442", found, place, expected, row=_shown(row))
            return


def _compared_rows() -> list[Row]:
    """Return the rows for comparing two templates: the packaged ones, and some long ones."""
    from pytest_mistral_lora.conformance.tokenizer.template_traits import WHOLE
    from pytest_mistral_lora.records.goldens import packaged_cases

    return [*(case.row for case in packaged_cases()), *WHOLE.values()]


def _shown(row: Row) -> str:
    text = row.to_jsonl()
    return text if len(text) <= _LONGEST_SHOWN else ""


def _template_place(saved: CheckpointTokenizer) -> Place:
    return in_folder(saved.path, loaded_place(saved.files)).whole


def _rendered_findings(place: Place, base: CheckpointTokenizer, text: str, other: str) -> Iterator[Finding]:
    """Yield ML442 for the first packaged row that the two templates write differently."""
    from pytest_mistral_lora.chat.templates import ChatTemplate

    try:
        # one tokenizer for both: any difference comes from the template
        templates = [ChatTemplate(base.fast, source) for source in (text, other)]
    except (NoTemplateError, TokenizerError):
        yield Finding("ML442", "the chat template is not the base's", place, f"that of {base.path}")
        return
    rendered = False
    for row in _compared_rows():
        written = []
        for template in templates:
            try:
                written.append(template.render(row))
            except RowError as error:
                written.append(f"refused: {error.found}")
        if all(rendered.startswith("refused: ") for rendered in written):
            continue
        rendered = True
        if written[0] != written[1]:
            at = equal_beginning(written[0], written[1])
            shown = [rendered[max(0, at - 20) : at + 40] for rendered in written]
            found = f"the chat template writes {shown[0]!r} at character {at}"
            expected = f"{shown[1]!r}, as the template of {base.path}"
            yield Finding("ML442", found, place, expected, row=_shown(row))
            return
    if not rendered:
        found = "the chat template is not the base's, and neither of them renders a row"
        yield Finding("ML442", found, place, f"that of {base.path}")

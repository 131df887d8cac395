"""The files of a checkpoint folder: whether they load, and whether any two of them contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import in_utf8
from pytest_mistral_lora.checkpoint.hub_cache import check_file, kept_listing, snapshot_of
from pytest_mistral_lora.checkpoint.recognition import PROBES, Recognition, spm_pieces
from pytest_mistral_lora.checkpoint.tokenizer_folder import (
    ADDED_TOKENS,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    TokenizerFiles,
    in_folder,
    loaded_place,
    template_places,
)
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import InputError, PinError, TokenizerError
from pytest_mistral_lora.places import Place

MISTRAL_COMMON = ("MistralCommonBackend", "MistralCommonTokenizer")
"""The classes of transformers that pass a conversation to mistral-common and do not read the chat template."""

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")

Disagreement = tuple[str, str, str]
"""File name, found, expected."""


def _within_tokenizer_json(files: TokenizerFiles) -> Iterator[Disagreement]:
    vocabulary = _vocabulary(files)
    seen: dict[int, str] = {}
    for token in _added(files):
        literal, number = token["content"], token["id"]
        if vocabulary.get(literal, number) != number:
            found = f"added_tokens has {literal!r} as {number}, model.vocab as {vocabulary[literal]}"
            yield TOKENIZER_JSON, found, "one id for a token"
        if seen.setdefault(number, literal) != literal:
            yield TOKENIZER_JSON, f"id {number} is {seen[number]!r} and {literal!r}", "one token for an id"
    if len(set(vocabulary.values())) != len(vocabulary):
        yield TOKENIZER_JSON, "model.vocab gives one id to two tokens", "one token for an id"


def _named_tokens(files: TokenizerFiles) -> Iterator[Disagreement]:
    config, special = files.json(TOKENIZER_CONFIG), files.json(SPECIAL_TOKENS)
    known = {*_vocabulary(files), *(token["content"] for token in _added(files))}
    for name in _NAMES:
        main, other = _content(config.get(name)), _content(special.get(name))
        if main is not None and other is not None and main != other:
            yield SPECIAL_TOKENS, f"{name} is {other!r}", f"{main!r}, as in {TOKENIZER_CONFIG}"
        elif main is None and other is not None and name in config:
            yield SPECIAL_TOKENS, f"{name} is {other!r}", f"none, as in {TOKENIZER_CONFIG}"
        for file, literal in ((TOKENIZER_CONFIG, main), (SPECIAL_TOKENS, other)):
            if literal is not None and known and literal not in known:
                yield file, f"{name} {literal!r} is not a token of {TOKENIZER_JSON}", "a token that it has"


def _added_tokens(files: TokenizerFiles) -> Iterator[Disagreement]:
    """Compare the tables of added tokens with `tokenizer.json`, which transformers loads."""
    if TOKENIZER_JSON not in files.names or not files.json(TOKENIZER_JSON):
        return
    added = {token["content"]: token for token in _added(files)}
    vocabulary = _vocabulary(files)
    decoder = files.json(TOKENIZER_CONFIG).get("added_tokens_decoder")
    tables: list[tuple[str, str, int, dict[str, Any]]] = [
        (TOKENIZER_CONFIG, str(token.get("content")), int(number), token)
        for number, token in (decoder.items() if isinstance(decoder, dict) else ())
        if isinstance(token, dict) and str(number).isdigit()
    ]
    tables += [(ADDED_TOKENS, literal, number, {}) for literal, number in files.json(ADDED_TOKENS).items()]
    for file, literal, number, flags in tables:
        have = added.get(literal, {"id": vocabulary.get(literal)})
        if have["id"] != number:
            yield file, f"{literal!r} has the id {number}", f"{have['id']}, as in {TOKENIZER_JSON}"
        for flag in _FLAGS:
            if flag in flags and flag in have and flags[flag] != have[flag]:
                yield file, f"{literal!r} has {flag} {flags[flag]}", f"{have[flag]}, as in {TOKENIZER_JSON}"


def _ends_of_a_text(files: TokenizerFiles) -> Iterator[Disagreement]:
    """Compare `add_bos_token` and `add_eos_token` with the tokens that the post-processor writes around a text.

    transformers 5 removes both keys if there is a `tokenizer.json` (`PreTrainedTokenizerBase._from_pretrained`).
    `LlamaTokenizerFast` of transformers 4 wrote the post-processor again to obey them; its other fast classes ignored
    them, too.
    """
    config = files.json(TOKENIZER_CONFIG)
    if not files.json(TOKENIZER_JSON):
        return
    before, after = _written_around(files.json(TOKENIZER_JSON).get("post_processor"))
    for name, written, usual in (("bos", before, "<s>"), ("eos", after, "</s>")):
        key = f"add_{name}_token"
        literal = _content(config.get(f"{name}_token")) or usual
        is_written = literal in written
        if isinstance(config.get(key), bool) and config[key] != is_written:
            flags = {flag: str(flag).lower() for flag in (False, True)}
            state = "writes" if is_written else "does not write"
            found = f"{key} is {flags[not is_written]}, and the post-processor of {TOKENIZER_JSON} {state} {literal!r}"
            expected = f'"{key}": {flags[is_written]}, as transformers 5 does'
            yield TOKENIZER_CONFIG, found, expected


def _written_around(processor: Any) -> tuple[list[str], list[str]]:
    """Return the tokens that a post-processor writes before and after a single text."""
    before: list[str] = []
    after: list[str] = []
    kind = processor.get("type") if isinstance(processor, dict) else None
    if kind == "Sequence":
        for part in _entries(processor.get("processors")):
            outer_before, outer_after = _written_around(part)
            before, after = [*outer_before, *before], [*after, *outer_after]
    elif kind == "TemplateProcessing":
        side = before
        for item in _entries(processor.get("single")):
            if "Sequence" in item:
                side = after
            elif isinstance(item.get("SpecialToken"), dict):
                side.append(str(item["SpecialToken"].get("id")))
    elif kind in ("BertProcessing", "RobertaProcessing"):
        # each is a pair of a token and its id
        before, after = (_first_text(processor.get(key)) for key in ("cls", "sep"))
    return before, after


def _first_text(pair: Any) -> list[str]:
    return [text for text in (pair[:1] if isinstance(pair, list) else ()) if isinstance(text, str)]


def _entries(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in (value if isinstance(value, list) else ()) if isinstance(entry, dict)]


def _vocabulary(files: TokenizerFiles) -> dict[str, int]:
    model = files.json(TOKENIZER_JSON).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or not all(isinstance(number, int) for number in vocabulary.values()):
        return {}  # transformers does not load it either
    return vocabulary


def _added(files: TokenizerFiles) -> list[dict[str, Any]]:
    tokens = files.json(TOKENIZER_JSON).get("added_tokens")
    return [
        token
        for token in (tokens if isinstance(tokens, list) else ())
        if isinstance(token, dict) and isinstance(token.get("content"), str) and isinstance(token.get("id"), int)
    ]


def _content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


_FAULT_RULES = {"outside": "ML210", "hazard": "ML209", "form": "ML209"}


def file(target: Target) -> Result:
    """Judge the files one by one; the facts name the files that load."""
    files = target.tokenizer.files
    findings = [
        Finding(_FAULT_RULES[fault.kind], fault.found, files.place(name), "a file of the folder")
        for name, fault in files.faults.items()
    ]
    for weights in sorted(files.path.glob("*.safetensors")) if files.path.is_dir() else ():
        try:
            target.weights_header(weights)
        except InputError as error:
            findings.append(Finding("ML209", error.found, error.place, "a whole safetensors file"))
    if not target.tokenizer.is_there:
        found = "there is no tokenizer"
        findings.append(Finding("ML201", found, files.place(), "tekken.json, tokenizer.model.vN or tokenizer.json"))
    if target.path is None:
        from pytest_mistral_lora.records.goldens import shipped_hashes

        findings += shipped_bytes(target, shipped_hashes().get(target.name))
    return Result(tuple(findings), facts=tuple(_facts(files)))


def shipped_bytes(target: Target, recorded: str | None) -> Iterator[Finding]:
    """Yield ML207 if a shipped file does not have the recorded SHA-256, in hex."""
    shipped = target.oracle
    if recorded != shipped.sha256:
        yield Finding("ML207", f"SHA-256 {shipped.sha256}", Place.of(shipped.path), str(recorded))


def _facts(files: TokenizerFiles) -> Iterator[tuple[str, Any]]:
    """Yield the files that load, their hashes, the class, and the repository of a snapshot."""
    hashes = files.digests
    yield "files", hashes
    declared = files.oracle_file
    yield (
        "oracle_file",
        declared.relative_to(files.path).as_posix() if declared and declared != files.path else str(declared),
    )
    if not files.path.is_dir():
        return
    yield "tokenizer_file", TOKENIZER_JSON if TOKENIZER_JSON in hashes else "converted from the Mistral file"
    yield "template_place", str(loaded_place(files)) or "none"
    yield "tokenizer_class", files.json(TOKENIZER_CONFIG).get("tokenizer_class")
    if (snapshot := snapshot_of(files.path)) is not None:
        yield from zip(("repository", "revision"), snapshot, strict=True)


def nothing_cut_or_padded(target: Target) -> Iterator[Finding]:
    """Yield ML231 for a tokenizer.json that cuts texts or pads each of them, ML232 for one that pads batches."""
    files = target.tokenizer.files
    data, place = files.json(TOKENIZER_JSON), files.place(TOKENIZER_JSON)
    truncation, padding = data.get("truncation"), data.get("padding")
    if truncation is not None:
        most = truncation.get("max_length") if isinstance(truncation, dict) else truncation
        yield Finding("ML231", f"truncation is saved: every text is cut at {most} tokens", place, '"truncation": null')
    if padding is None:
        return
    strategy = padding.get("strategy") if isinstance(padding, dict) else padding
    multiple = padding.get("pad_to_multiple_of") if isinstance(padding, dict) else None
    if strategy == "BatchLongest" and not multiple:
        yield Finding("ML232", "padding to the longest text of a batch is saved", place, '"padding": null')
    else:
        length = f"a multiple of {multiple}" if strategy == "BatchLongest" else strategy
        yield Finding("ML231", f"padding is saved: every text is padded to {length}", place, '"padding": null')


def has_template(target: Target) -> Result:
    """Judge whether a folder that transformers loads lacks a chat template (ML233), or has an empty one (ML222)."""
    files = target.tokenizer.files
    if not target.tokenizer.loads_as_it_is or files.faults:
        return Result(not_checked="transformers does not load the folder as it is")
    places = template_places(files)
    if not places:
        return Result((Finding("ML233", "there is no chat template", files.place(), "chat_template.jinja"),))
    if (place := loaded_place(files)) and not places["default"][place].strip():
        return Result(
            (Finding("ML222", "the chat template is empty", in_folder(files.path, place), "a Jinja template"),)
        )
    return Result()


def other_pieces(file: Path, known: Recognition) -> Iterator[Finding]:
    """Yield ML211 if `tokenizer.model`, which other programs load, is not the recognised tokenizer."""
    expected, oracle = f"{known.name}, by which the folder is recognised", known.oracle
    if oracle is None or oracle.kind != "spm":
        yield Finding("ML211", f"{file.name} stands beside a byte-level tokenizer", Place.of(file), expected)
        return
    try:
        have, want = spm_pieces(file), spm_pieces(oracle.path)
    except TokenizerError as error:
        yield Finding("ML209", error.found, error.place, "a SentencePiece model")
        return
    differ = [number for number, (piece, other) in enumerate(zip(have, want, strict=False)) if piece != other]
    if differ or len(have) < len(want):
        first = differ[0] if differ else len(have)
        shown = have[first] if first < len(have) else "missing"
        found = f"{file.name} has other pieces or scores in {len(differ):,} places, the first is {first}: {shown}"
        yield Finding("ML211", found, Place.of(file), f"{want[first]}, as {expected}")


def one_tokenizer(target: Target) -> Iterator[Finding]:
    """Yield ML211 if a folder holds Mistral tokenizer files of several versions, or two that differ."""
    files = target.tokenizer.files
    chosen = files.oracle_file
    for name in files.mistral_files:
        if chosen is not None and name != chosen.name:
            found = f"{name} stands beside {chosen.name}, which is the one that loads"
            yield Finding("ML211", found, files.place(name), "one Mistral tokenizer file")
    plain, hashes = "tokenizer.model", files.digests
    spm = [name for name in files.mistral_files if name.startswith(f"{plain}.")]
    if plain in hashes and len(spm) == 1 and hashes.get(spm[0]) != hashes[plain]:
        yield Finding("ML211", f"{plain} and {spm[0]} differ", files.place(plain), "the same bytes")
    if plain in hashes and chosen is None and target.tokenizer.has_oracle:
        yield from other_pieces(files.file(plain), target.tokenizer.recognition)


def one_revision(target: Target) -> Result:
    """Judge files that are not of the snapshot's commit, or were fetched at different commits: ML212."""
    files, findings = target.tokenizer.files, list[Finding]()
    is_snapshot = snapshot_of(files.path) is not None
    if is_snapshot:
        listing = kept_listing(files.path)
        for name in files.digests:
            try:
                check_file(files.file(name), files.path, listing, content=True)
            except PinError as error:
                findings.append(Finding("ML212", error.found, error.place, error.expected))
    # huggingface_hub notes the commit of each file that it fetches into a local folder (`hf download --local-dir`).
    commits: dict[str, str] = {}
    for name in files.names:
        note = files.path / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        if note.is_file() and note.stat().st_size < 1024:
            lines = note.read_text(encoding="utf-8", errors="replace").splitlines()
            commits |= {name: lines[0]} if lines else {}
    if len(set(commits.values())) > 1:
        detail = "\n".join(f"{name}: {commit}" for name, commit in commits.items())
        found = f"files of {len(set(commits.values()))} commits"
        findings.append(Finding("ML212", found, files.place(), "one commit", detail))
    unknown = "" if is_snapshot or len(commits) > 1 else "the commits of the files are not known: no file names them"
    return Result(tuple(findings), unknown)


def ends_agree(files: TokenizerFiles) -> Iterator[Finding]:
    """Yield ML238 if `add_bos_token` or `add_eos_token` contradicts what `tokenizer.json` writes around a text."""
    for name, found, expected in _ends_of_a_text(files):
        yield Finding("ML238", found, files.place(name), expected)


def files_agree(target: Target) -> Iterator[Finding]:
    """Yield ML213 for each declaration that contradicts `tokenizer.json` or `tokenizer_config.json`, and ML238."""
    files = target.tokenizer.files
    for name, found, expected in (*_within_tokenizer_json(files), *_named_tokens(files), *_added_tokens(files)):
        yield Finding("ML213", found, files.place(name), expected)
    yield from ends_agree(files)


def tokenizer_class(target: Target) -> Iterator[Finding]:
    """Yield ML218 for a class that transformers lacks or that changes ids, ML228 for a class that only encodes."""
    import transformers
    from tokenizers import Tokenizer

    files = target.tokenizer.files
    place, config = files.place(TOKENIZER_CONFIG), files.json(TOKENIZER_CONFIG)
    name = config.get("tokenizer_class")
    if config.get("auto_map"):
        yield Finding("ML218", "auto_map asks for code from the repository", place, "a class of transformers")
    if name in MISTRAL_COMMON:
        found = f"tokenizer_class {name}: what its template renders, it encodes as letters"
        yield Finding("ML228", found, place, "a class that knows control tokens in a text")
    elif name is not None and not hasattr(transformers, str(name)):
        found = f"tokenizer_class {name!r} is not a class of transformers {transformers.__version__}"
        yield Finding("ML218", found, place, "LlamaTokenizer, PreTrainedTokenizerFast or TokenizersBackend")
    elif TOKENIZER_JSON in files.names:
        with in_utf8(files.file(TOKENIZER_JSON)) as named:
            fast, stored = target.tokenizer.fast, Tokenizer.from_file(str(named))
        # the check `nothing-cut-or-padded` reports these; the class does not matter
        stored.no_truncation()
        stored.no_padding()
        for text in PROBES:
            want = stored.encode(text, add_special_tokens=False).ids
            have = fast(text, add_special_tokens=False)["input_ids"]
            if want != have:
                found = f"tokenizer_class {name} ({type(fast).__name__}) gives {text!r} other ids than {TOKENIZER_JSON}"
                yield Finding("ML218", found, place, str(want), f"found: {have}")
                return


def one_template(target: Target) -> Result:
    """Judge whether the places of the chat template hold different templates, or no default: ML220."""
    files, findings = target.tokenizer.files, list[Finding]()
    places, home, loads = template_places(files), files.place(), loaded_place(files)
    if not places:
        return Result(not_checked="there is no chat template")
    if "default" not in places:
        findings.append(Finding("ML220", f"only {', '.join(sorted(places))}, no default", home, "a default template"))
    for name, texts in places.items():
        first = loads if loads in texts else next(iter(texts))
        for place, text in texts.items():
            if text != texts[first]:
                found = f"the template {name!r} of {place} is not that of {first}"
                findings.append(Finding("ML220", found, home, f"the same text ({first} is what transformers loads)"))
    return Result(tuple(findings))

"""The user's installation: versions and their support, extras, known faults of a combination."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pytest_mistral_lora.extras import EXTRAS, PACKAGE

OK, MISSING, UNSUPPORTED = "ok", "missing", "unsupported"


@dataclass(frozen=True, slots=True)
class LibraryState:
    """A library that this package uses.

    Attributes:
        name: Its name in pip.
        version: The installed version; empty if it is not installed.
        supported: The versions that this package supports, such as `>=1.13`.
        extra: The extra that installs it; empty for every install.
    """

    name: str
    version: str
    supported: str
    extra: str = ""

    @property
    def state(self) -> str:
        """`ok`, `missing` or `unsupported`."""
        if not self.version:
            return MISSING
        # judge a nightly or a release candidate by its number
        return OK if SpecifierSet(self.supported).contains(self.version, prereleases=True) else UNSUPPORTED

    @property
    def command(self) -> str:
        """The command that installs a supported version."""
        return f"pip install '{self.name}{self.supported}'"


@dataclass(frozen=True, slots=True)
class Symptom:
    """A finding that a known fault may explain.

    Attributes:
        rule: The rule that is broken.
        found: The value, tokens or text that break it.
        subject: The subject of the check that found it.
        case: The name of that check within its subject.
        server: The server that was judged, with its version; empty for everything else.
    """

    rule: str
    found: str
    subject: str = ""
    case: str = ""
    server: str = ""


@dataclass(frozen=True, slots=True)
class KnownFault:
    """A fault of one version, or of several together.

    Attributes:
        id: A stable name.
        versions: The versions that have the fault together, by library.
        found: The fault.
        change: The remedy.
        source: Its report, or the page that shows it.
        severity: `error`: it changes ids or stops a run; `note`: it only matters in the case that `found` names.
        rules: Ids of the rules that the user's files break for this reason.
        says: A pattern of the words of a finding that only this fault has, such as those of a server's error. The fault
            then belongs to a server's environment, not to this one: it is known if a server reports these words, and is
            a note if it is not installed here.
        server: The title of the server that has the fault, such as `llama.cpp`; empty for libraries. Its version is the
            only one in `versions`.
        answers: Checks of the subject `answer` whose findings the fault can cause.
        working: The versions, by library, that were seen to work.
    """

    id: str
    versions: Mapping[str, str]
    found: str
    change: str
    source: str
    severity: str = "error"
    rules: tuple[str, ...] = ()
    says: str = ""
    server: str = ""
    answers: tuple[str, ...] = ()
    working: Mapping[str, str] = field(default_factory=dict)

    def applies(self, installed: Mapping[str, str]) -> bool:
        """Return whether all versions of the fault are installed."""
        return all(
            name in installed and SpecifierSet(range_).contains(installed[name], prereleases=True)
            for name, range_ in self.versions.items()
        )

    def is_of_server(self, proof: str) -> bool:
        """Return whether a server can have the fault.

        Args:
            proof: The server as the summary names it: `llama.cpp b11549, model …`. One that reports no version can.
        """
        title, _, rest = proof.partition(",")[0].partition(" ")
        number = re.search(r"\d+(\.\d+)*", rest)
        return title == self.server and (
            number is None or all(SpecifierSet(range_).contains(number[0]) for range_ in self.versions.values())
        )

    def explains(self, symptom: Symptom) -> bool:
        """Return whether a finding of a server is one that the fault can cause."""
        is_of_answers = symptom.subject == "answer" and symptom.case in self.answers
        return (symptom.rule in self.rules or is_of_answers) and bool(re.search(self.says, symptom.found))


SERVED_GRAMMAR = KnownFault(
    "served-grammar",
    {"vllm": "==0.32.0", "mistral-common": ">=1.13,<1.14"},
    "vLLM with --tokenizer-mode mistral and --tool-call-parser mistral answers HTTP 400 to every chat request of a "
    "Tekken tokenizer from version 11 on: GrammarFactory.get_lark_from_jinja() misses the argument "
    "'force_tool_names'; seen with vLLM 0.32.0 beside mistral-common 1.13.1, and not beside 1.12.0",
    "in the environment of the server: pip install 'vllm==0.32.0' 'mistral-common==1.12.0'",
    "docs/serving.md",
    rules=("ML919",),
    says="force_tool_names",
    working={"vllm": "0.32.0", "mistral-common": "1.12.0"},
)
"""The fault of the versions that pip resolves for vLLM 0.32.0."""

COMBINED_RSLORA = KnownFault(
    "combined-rslora",
    {"peft": "<=0.21.2"},
    "add_weighted_adapter gives adapters of rsLoRA a sum that is √r times too strong, with r the rank of the sum: it "
    "leaves use_rslora on, though A and B have the scales of their sources already",
    'set "use_rslora": false in the adapter_config.json of the sum',
    "https://github.com/huggingface/peft/issues/3761",
    "note",
)
"""The fault of sums of adapters, which no folder shows by itself."""

_UPSTREAM = "docs/upstream/README.md"
_DECODE = "take the ids of the answer from the server, and decode them with mistral-common"

SERVER_FAULTS: tuple[KnownFault, ...] = (
    KnownFault(
        "served-arguments-replaced",
        {"llama.cpp": "==11549"},
        "its grammar fixes the order of a call's keys, refuses keys that the schema does not name, and ends an integer "
        "after 16 digits: a model that says another call gets other values, with HTTP 200",
        "train and prompt with arguments in the order of the schema, without further keys",
        _UPSTREAM,
        "note",
        says=r"^(thinking-|text-)?calls?\b",
        server="llama.cpp",
        answers=("decoding",),
    ),
    KnownFault(
        "served-call-ids-in-another-order",
        {"llama.cpp": "==11549"},
        "for a template of v11 it wants [ARGS] before [CALL_ID], in its grammar and in its parser: a call as "
        'mistral-common encodes it ends in HTTP 500 ("does not match the expected peg-native format"), or in another '
        "call",
        f"serve a base of v13 or later by it; for v11, {_DECODE}",
        _UPSTREAM,
        "note",
        rules=("ML919",),
        says=r"peg-native|\[TOOL_CALLS\]",
        server="llama.cpp",
        answers=("answered", "decoding", "calls"),
    ),
    KnownFault(
        "served-json-in-a-fence",
        {"llama.cpp": "==11549"},
        "under a response_format it makes a model of v13 or later write its JSON in a fence: one that was trained on "
        "bare JSON gets other values",
        "train the JSON in a fence (```json), or ask without response_format",
        _UPSTREAM,
        "note",
        says=r"^(thinking-)?json-(schema|object)",
        server="llama.cpp",
        answers=("decoding",),
    ),
    KnownFault(
        "served-template-without-an-argument",
        {"llama.cpp": "==11549"},
        "each round of tools ends in HTTP 500 with the templates that Mistral published for Small 4, Medium 3.5 and "
        "Leanstral 1.5 until 2026-07-27: they leave an argument of a macro out, which its engine refuses",
        "--jinja --chat-template-file with the generated template: mistral-lora template",
        _UPSTREAM,
        "note",
        rules=("ML919",),
        says="render_content",
        server="llama.cpp",
        answers=("answered",),
    ),
    KnownFault(
        "served-call-ids-in-names",
        {"vllm": "==0.32.0"},
        "it reads the id of a call of v11 as a part of the tool's name, unless its grammar masks the id: "
        "weatherabcdefgh1; the calls of a stream become one",
        f"serve a base of v13 or later by it; for v11, {_DECODE}",
        _UPSTREAM,
        "note",
        says=r"calls \w+answer\d{3}",
        server="vLLM",
        answers=("calls", "decoding"),
    ),
    KnownFault(
        "served-letters-as-markers",
        {"vllm": "==0.32.0"},
        "an answer that is not streamed is parsed by its letters: one that spells [TOOL_CALLS] becomes a call or is "
        "cut off, and one that spells [THINK] becomes a thought",
        "stream the answers: a stream is parsed by its ids",
        _UPSTREAM,
        "note",
        server="vLLM",
        answers=("spelled",),
    ),
    KnownFault(
        "served-format-not-enforced",
        {"vllm": "==0.32.0"},
        "with --reasoning-parser mistral it does not enforce structured_outputs unless the model thinks: the answer is "
        "free text, with HTTP 200",
        "start it without --reasoning-parser for a model that does not think, or set enable_in_reasoning",
        _UPSTREAM,
        "note",
        server="vLLM",
    ),
)
"""Faults of servers, which were seen with these versions."""

KNOWN_FAULTS: tuple[KnownFault, ...] = (
    SERVED_GRAMMAR,
    KnownFault(
        "merges-by-id",
        {"transformers": ">=5.0,<5.24"},
        "a SentencePiece file without a tokenizer.json is converted with its merges in the wrong order: runs of spaces "
        "and the words after them get other ids, without a warning",
        "pip install 'transformers>=5.24'",
        "docs/upgrades.md",
        rules=("ML004", "ML205"),
    ),
    KnownFault(
        "template-writes-html",
        {"mistral-common": "<1.13"},
        "the chat template that it generates writes the JSON of a tool call as HTML: &#34; for a quotation mark",
        "pip install 'mistral-common>=1.13'",
        "docs/upgrades.md",
        rules=("ML004",),
    ),
    KnownFault(
        "peft-imports-a-removed-class",
        {"peft": "<0.18", "transformers": ">=5.0"},
        "PEFT cannot be imported: it asks transformers for HybridCache, which version 5 has no more",
        "pip install 'peft>=0.18'",
        "https://github.com/huggingface/peft/issues/3333",
    ),
    KnownFault(
        "llama-tokenizer-merges",
        {"transformers": ">=5.24"},
        'a folder with tokenizer.model and "tokenizer_class": "LlamaTokenizer" still gets the merges in the wrong '
        "order, and save_pretrained writes them to tokenizer.json (ML205)",
        "keep the checkpoint's own tokenizer.json, and check the saved folder: mistral-lora check FOLDER",
        "docs/upgrades.md",
        "note",
        rules=("ML205",),
    ),
    KnownFault(
        "legacy-adds-a-space",
        {"transformers": ">=5.24"},
        "AutoTokenizer loads a folder with tokenizer.model alone as legacy=True, which puts a token of a space behind "
        "each control token",
        "AutoTokenizer.from_pretrained(folder, legacy=False), or a folder with tokenizer.json",
        "measured with transformers 5.24.0",
        "note",
        rules=("ML205",),
    ),
    KnownFault(
        "tekken-first",
        {"transformers": ">=5.15"},
        "AutoTokenizer takes MistralCommonBackend if tekken.json is in the folder, whatever template is beside it: it "
        "refuses a row that ends in an answer, ignores return_assistant_tokens_mask, and encodes the control tokens of "
        "a rendered text as text (ML235, ML236)",
        "PreTrainedTokenizerFast.from_pretrained(folder), or remove tekken.json beside a template of another layout",
        "https://github.com/huggingface/transformers/pull/47507",
        "note",
    ),
    KnownFault(
        "regex-warns-of-sound-files",
        {"transformers": ">=4.57.2"},
        "the warning about fix_mistral_regex also appears for tokenizers that are sound, among them saved ones, and "
        "the fix is not applied unless you ask for it",
        "decide by the ids: mistral-lora check FOLDER",
        "https://github.com/huggingface/transformers/issues/44031",
        "note",
    ),
    KnownFault(
        "regex-without-a-warning",
        {"transformers": "<4.57.2"},
        "a Tekken tokenizer.json with the wrong regular expression, as some on the Hub are, loads without a warning",
        "check the folder: mistral-lora check FOLDER",
        "https://github.com/huggingface/transformers/pull/42299",
        "note",
    ),
    KnownFault(
        "grammar-refuses-call-ids",
        {"mistral-common": ">=1.13,<1.14"},
        "its grammar of answers refuses [CALL_ID], which its encoder writes into each call of v11",
        "nothing in the rows; serve a base of v13 or later under a grammar",
        _UPSTREAM,
        "note",
        rules=("ML652",),
    ),
    COMBINED_RSLORA,
    *SERVER_FAULTS,
)
"""The known faults of every version that can be installed beside this package, errors first, and those of servers."""


@cache
def installed_versions() -> dict[str, str]:
    """Return the version of each installed distribution by its name: lower case, words joined by hyphens.

    Of two distributions with one name, it is the first on the path, which is the one that Python imports.
    """
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:
            versions.setdefault(re.sub(r"[-_.]+", "-", name.lower()), distribution.version)
    return versions


def library_states(installed: Mapping[str, str]) -> Iterator[LibraryState]:
    """Yield the libraries of this package's own metadata: first those of every install, then those of extras.

    Args:
        installed: The installed versions by name.
    """
    requirements = [Requirement(text) for text in metadata.requires(PACKAGE) or ()]
    for extra in ("", *(extra.name for extra in EXTRAS)):
        for requirement in requirements:
            # an extra that includes another extra names this package itself
            if requirement.name == PACKAGE or bool(extra) is not ("extra" in str(requirement.marker)):
                continue
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                yield LibraryState(
                    requirement.name, installed.get(requirement.name.lower(), ""), str(requirement.specifier), extra
                )


def present_faults(
    installed: Mapping[str, str], libraries: Iterable[LibraryState], torch_error: str = ""
) -> list[KnownFault]:
    """Return the faults of an installation, errors first.

    Args:
        installed: The installed versions by name.
        libraries: The result of `library_states`.
        torch_error: Why torch cannot be imported; empty if it can, or is not installed.
    """
    known = [fault for fault in KNOWN_FAULTS if fault.applies(installed)]
    # a server's environment is not known here
    of_servers = (fault for fault in KNOWN_FAULTS if fault.says or fault.server)
    known += [replace(fault, severity="note") for fault in of_servers if fault not in known]
    explained = {name for fault in known if fault.severity == "error" for name in fault.versions}
    found = []
    for library in libraries:
        if library.name in explained:
            continue
        # a library of an extra can only be wrong if it is installed
        if library.state == UNSUPPORTED or (library.state == MISSING and not library.extra):
            text = (
                f"{library.name} {library.version} is installed"
                if library.version
                else f"{library.name} is not installed"
            )
            found.append(
                KnownFault(
                    f"unsupported-{library.name}", {}, f"{text}; expected {library.supported}", library.command, ""
                )
            )
    if torch_error:
        change = (
            "install a torch that fits this machine and its other libraries: https://pytorch.org/get-started/locally"
        )
        found.append(KnownFault("torch-cannot-be-imported", {}, torch_error, change, ""))
    return sorted([*found, *known], key=lambda fault: fault.severity == "note")


def known_cause_lines(symptoms: Iterable[Symptom], installed: Mapping[str, str] | None = None) -> list[str]:
    """Return a line for each known fault of the installed versions that can cause a finding.

    Args:
        symptoms: The findings.
        installed: The installed versions by name; they are only looked up if there is a finding.
    """
    found = list(symptoms)
    rules = {symptom.rule for symptom in found}
    lines = []
    for fault in KNOWN_FAULTS if rules else ():
        installed = installed or installed_versions()
        broken = [rule for rule in fault.rules if rule in rules]
        versions = ", ".join(f"{name} {range_}" for name, range_ in fault.versions.items())
        if fault.says or fault.server:
            # the server's words or its version name the fault, whatever is installed here
            explained = (
                symptom.rule
                for symptom in found
                if fault.explains(symptom) and (not fault.server or fault.is_of_server(symptom.server))
            )
            broken = list(dict.fromkeys(explained))
        elif not fault.applies(installed):
            broken = []
        else:
            versions = ", ".join(f"{name} {installed.get(name, '')}" for name in fault.versions)
        if broken:
            lines.append(f"known of {versions} ({', '.join(broken)}): {fault.found}. Change: {fault.change}")
    return lines

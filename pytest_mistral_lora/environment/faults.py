"""The user's installation: versions and their support, extras, known faults of a combination."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

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
        says: Words of a server's error that only this fault has. The fault then belongs to a server's environment, not
            to this one: it is known if a server reports these words, and is a note if it is not installed here.
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
    working: Mapping[str, str] = field(default_factory=dict)

    def applies(self, installed: Mapping[str, str]) -> bool:
        """Return whether all versions of the fault are installed."""
        return all(
            name in installed and SpecifierSet(range_).contains(installed[name], prereleases=True)
            for name, range_ in self.versions.items()
        )


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
)
"""The known faults of every version that can be installed beside this package, errors first."""


def installed_versions() -> dict[str, str]:
    """Return the version of each installed distribution by its name: lower case, words joined by hyphens."""
    return {
        re.sub(r"[-_.]+", "-", name.lower()): distribution.version
        for distribution in metadata.distributions()
        if (name := distribution.metadata["Name"])
    }


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
    known += [replace(fault, severity="note") for fault in KNOWN_FAULTS if fault.says and fault not in known]
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


def known_cause_lines(records: Iterable[Mapping[str, Any]], installed: Mapping[str, str] | None = None) -> list[str]:
    """Return a line for each known fault of the installed versions that can cause a finding.

    Args:
        records: One record for each check that ran.
        installed: The installed versions by name; they are only looked up if there is a finding.
    """
    findings = [finding for record in records for finding in record["findings"]]
    rules = {finding["rule"] for finding in findings}
    lines = []
    for fault in KNOWN_FAULTS if rules else ():
        installed = installed or installed_versions()
        broken = [rule for rule in fault.rules if rule in rules]
        if fault.says:
            # the server's words name the fault, whatever is installed here
            is_cause = any(fault.says in finding["found"] for finding in findings if finding["rule"] in broken)
            versions = ", ".join(f"{name} {range_}" for name, range_ in fault.versions.items())
        else:
            is_cause = bool(broken) and fault.applies(installed)
            versions = ", ".join(f"{name} {installed.get(name, '')}" for name in fault.versions)
        if is_cause:
            lines.append(f"known of {versions} ({', '.join(broken)}): {fault.found}. Change: {fault.change}")
    return lines

"""Rules, read from `rules/<subject>.toml`, and the findings of checks. From 0.1.0 on, an id never changes its meaning.

Rules about programs, such as a default of a trainer, are read from the files beside the programs.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pytest_mistral_lora.chat.diff import TokenDiff
from pytest_mistral_lora.chat.token_rows import TokenRow
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.escaping import in_block, printable
from pytest_mistral_lora.places import NOWHERE, Place

__all__ = ["RULES", "Rule", "Severity"]

Severity = Literal["error", "note"]
Proof = Literal["oracle", "declaration", "contradiction", "sign"]

PROOFS: dict[Proof, str] = {
    "oracle": "mistral-common, or the program that uses the artifact, was asked, and gives something else.",
    "declaration": "A file declares it (a schema, a configuration, a manifest, a recipe), and the artifact differs.",
    "contradiction": "Two parts of the artifact cannot both be right, or a value cannot mean anything.",
    "sign": "Statistics of texts or numbers look like a known fault. Nothing proves it: it is a note.",
}
"""What a rule takes as proof of a finding."""

_SUBJECTS = (
    "template",
    "mask",
    "tokenizer",
    "train",
    "adapter",
    "encoded",
    "dataset",
    "manifest",
    "transcript",
    "server",
)
"""The subjects in the order of the first digit of their rules' ids: ML0xx to ML9xx."""

_WITHIN = {
    "merged": ("adapter", {421, *range(430, 444)}),
    "gguf": ("server", {*range(912, 919), 920, *range(934, 939)}),
    "answer": ("server", set(range(921, 932))),
}
"""Subjects whose rules have ids in the range of another subject: that subject, and the numbers."""


EXAMPLE_PATHS = {
    "checkpoint": "checkpoints/my-mistral",
    "folder": "checkpoints/my-mistral",
    "template": "checkpoints/my-mistral/chat_template.jinja",
    "own_template": "checkpoints/my-mistral/chat_template.jinja",
    "adapter": "lora-out",
}
"""The paths that a fix can name by a placeholder, such as `{checkpoint}`, and the paths of the documentation.

checkpoint: a tokenizer, as `--tokenizer` takes it.
folder: the checkpoint's folder, in which a fix may write.
template: the file for a template that a fix writes.
own_template: the file of the checkpoint's own template.
adapter: the folder of an adapter or of a merged model.
"""

_PLACEHOLDER = re.compile(rf"\{{({'|'.join(EXAMPLE_PATHS)})(!r)?\}}")


def with_paths(fix: str, paths: Mapping[str, str] = EXAMPLE_PATHS) -> str:
    """Return a fix with paths in place of its placeholders.

    A path is quoted for a shell, or for Python if the placeholder is `{checkpoint!r}`.

    Args:
        fix: The fix.
        paths: A path for each placeholder; the paths of the documentation stand for those that are missing.
    """

    def path(found: re.Match[str]) -> str:
        # a name of several lines would begin a line of its own in the output
        text = printable(paths.get(found[1], EXAMPLE_PATHS[found[1]]), lines=False)
        return repr(text) if found[2] else shlex.quote(text)

    return _PLACEHOLDER.sub(path, fix)


@dataclass(frozen=True, slots=True)
class RuleExample:
    """An artifact that breaks the rule, and its finding, as recorded from a mutant of the tests.

    Attributes:
        fault: The mistake, in one sentence.
        command: The command that fixes the artifact, or shows the tokens.
        sound: The same artifact without the mistake, in one sentence.
        finding: The finding without its row, its table and the text of its rule; empty for a new rule.
        excerpt: The lines of a file or of a script with the mistake, if the row does not have it.
        row: The row that breaks the rule, as one line of JSON; empty if the subject is not a row.
        table: Tokens and labels around the first difference, marked with `>`; empty without a difference.
    """

    fault: str
    command: str
    sound: str
    finding: str = ""
    excerpt: str = ""
    row: str = ""
    table: str = ""

    @property
    def report(self) -> str:
        """The finding with its table, as in the report."""
        return "\n".join([self.finding, *(f"  {line}" for line in self.table.splitlines())])


@dataclass(frozen=True, slots=True)
class Rule:
    """One requirement on an artifact.

    Attributes:
        id: `ML` and three digits; the first digit stands for the subject.
        title: The requirement, in one sentence.
        fault: What breaks it, in at most 60 characters and without values: the title of a finding in one line.
        subject: The subject of the suite that checks it.
        cases: The checks of this subject that report it, the main one first; `*` if each check of the subject can, for
            example because each row has its own check. `case` in the file is a name or a list of names.
        why: The consequence of breaking it.
        fix_text: The way to mend the artifact, with placeholders for its paths; `fix` in the file.
        source: The thread, specification or reference code that the rule comes from.
        severity: `error` fails a check; `note` is shown, and fails only with `--fail-on note`.
        since: The first version of this package that has it, such as `0.1`.
        error_since: The first version in which it is an error, if it was a note before; else empty.
        proof: What proves a finding. A rule that is a note may have two: of its notes, and of its errors.
        example: A broken artifact with its finding.
        fault_class: The name of the fault in the reports of `audit`, for a rule on encoded rows; `class` in the file.
        by_program: Whether its fix is a setting of the program that made the artifact. If that is not known, the fix in
            each known program stands below the general one.
        symptoms: What you see if it is broken, in your words: `rules --search` looks here first.
        names: The parts of a rule that says one thing of several, each with the id that it had as a rule of its own.
            `ML107.encoding` is what a finding, a list of known deviations and a known fault may name.
    """

    id: str
    title: str
    fault: str
    subject: str
    cases: tuple[str, ...]
    why: str
    fix_text: str
    source: str
    example: RuleExample
    proof: tuple[Proof, ...]
    since: str
    severity: Severity = "error"
    error_since: str = ""
    fault_class: str = ""
    by_program: bool = False
    symptoms: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def fix(self) -> str:
        """The way to mend the artifact, with the paths of the documentation."""
        return with_paths(self.fix_text)

    @property
    def case(self) -> str:
        """The main check of its subject that reports it."""
        return self.cases[0]

    @property
    def program_fixes(self) -> dict[str, str]:
        """The way to mend the artifact in each known program, by its name, if that is a setting of it."""
        from pytest_mistral_lora.conformance.known_programs import fixes_of_programs

        return {name: with_paths(fix) for name, fix in fixes_of_programs(self.id)} if self.by_program else {}

    def text(self) -> str:
        """Return the rule, its reason and its example for a terminal."""
        values = {
            "fault": self.fault,
            "subject": self.subject,
            "severity": self.severity,
            **{name: f"{kind}. {PROOFS[kind]}" for name, kind in zip(("proof", "of error"), self.proof, strict=False)},
            "since": f"{self.since}; an error since {self.error_since}" if self.error_since else self.since,
            "why": self.why,
            "fix": self.fix,
            **({"names": ", ".join(f"{self.id}.{name}" for name in self.names)} if self.names else {}),
            **self.program_fixes,
            "source": self.source,
            "example": self.example.fault,
        }
        lines = [f"{self.id} {self.title}", *(f"  {name + ':':<9} {text}" for name, text in values.items())]
        for part in (self.example.excerpt, self.example.row, self.example.report, f"$ {self.example.command}"):
            lines += ["", *(f"    {line}" for line in part.splitlines())] if part else []
        return "\n".join([*lines, "", f"  {'sound:':<9} {self.example.sound}"])


_VERSION = re.compile(r"\d+\.\d+")

_DIGITS = 3
"""The digits of a rule's id after `ML`."""


class RuleTable(Mapping[str, Rule]):
    """Every rule by id. A lookup reads the file of one subject; iteration reads them all."""

    def __getitem__(self, rule_id: str) -> Rule:
        # most runs have findings of at most one subject, and parsing all files takes 0.1 s
        number = rule_id[2:]
        # also text of a user, such as that of thousands of digits, which Python does not read as a number
        if len(number) != _DIGITS or not number.isdecimal() or int(number) // 100 >= len(_SUBJECTS):
            raise KeyError(rule_id)
        within = (subject for subject, (_, numbers) in _WITHIN.items() if int(number) in numbers)
        return _read_rules(next(within, _SUBJECTS[int(number) // 100]))[rule_id]

    def __iter__(self) -> Iterator[str]:
        for subject in _SUBJECTS:
            files = (subject, *(inner for inner, (other, _) in _WITHIN.items() if other == subject))
            yield from sorted(rule_id for file in files for rule_id in _read_rules(file))

    def has_name(self, name: str) -> bool:
        """Return whether a text is a name within a rule, such as `ML107.encoding`."""
        rule_id, _, part = name.partition(".")
        return rule_id in self and part in self[rule_id].names

    def new_name(self, rule_id: str) -> str:
        """Return the name that has taken the place of an id, such as `ML107.encoding` of `ML119`; empty if none has."""
        names = ((rule.id, name, old) for rule in self.values() for name, old in rule.names.items())
        return next((f"{new}.{name}" for new, name, old in names if old == rule_id != new), "")

    def of(self, subject: str, case: str = "") -> list[Rule]:
        """Return the rules of a subject in the order of their ids; with a case, only those that this check reports."""
        rules = sorted(_read_rules(subject).values(), key=lambda rule: rule.id)
        return [rule for rule in rules if not case or case in rule.cases]

    def __len__(self) -> int:
        return sum(len(_read_rules(subject)) for subject in (*_SUBJECTS, *_WITHIN))


RULES = RuleTable()
"""Every rule, by id, in the order of the ids."""


@cache
def _read_rules(subject: str) -> dict[str, Rule]:
    """Return the rules of a subject: those of all artifacts, then those about programs.

    Raises:
        ValueError: If two files have a rule of one id, or a rule has no proof that it can have, or no version.
    """
    from pytest_mistral_lora.programs.rules import rule_files

    rules: dict[str, Rule] = {}
    for path in (Path(__file__).parent / "rules" / f"{subject}.toml", *rule_files(subject)):
        read = _rules_in(path, subject)
        if twice := rules.keys() & read:
            raise ValueError(f"{path}: {min(twice)} is in two files; expected an id for each rule")
        rules |= read
    return rules


def _rules_in(path: Path, subject: str) -> dict[str, Rule]:
    with path.open("rb") as file:
        tables = tomllib.load(file)
    rules = {}
    for rule_id, table in tables.items():
        example, fault_class, case = RuleExample(**table.pop("example")), table.pop("class", ""), table.pop("case")
        proof = _read_proof(
            table.pop("proof", None), table.get("severity", "error"), f"{subject}.toml, {rule_id}.proof"
        )
        _require_versions(table, f"{path}: {rule_id}")
        cases = (case,) if isinstance(case, str) else tuple(case)
        rules[rule_id] = Rule(
            id=rule_id,
            subject=subject,
            cases=cases,
            fix_text=table.pop("fix"),
            example=example,
            proof=proof,
            fault_class=fault_class,
            symptoms=tuple(table.pop("symptoms", ())),
            **table,
        )
    return rules


def _require_versions(table: Mapping[str, Any], place: str) -> None:
    """Refuse a rule that does not say since which version it exists: a run by older rules would count it.

    Raises:
        ValueError: If a version is missing or is not `MAJOR.MINOR`.
    """
    for name in ("since", *({"error_since"} & table.keys())):
        value = table.get(name)
        if not isinstance(value, str) or not _VERSION.fullmatch(value):
            raise ValueError(f'{place}.{name}: {value!r}; expected the first version that has it, such as "0.2"')


def _read_proof(value: Any, severity: str, place: str) -> tuple[Proof, ...]:
    """Return what a rule takes as proof, as its table has it: a kind, or that of its notes and that of its errors.

    Raises:
        ValueError: If a kind is unknown, or a sign proves an error.
    """
    kinds = (value,) if isinstance(value, str) else tuple(value or ())
    if not kinds or not all(kind in PROOFS for kind in kinds):
        raise ValueError(f"{place}: {value!r}; expected {', '.join(PROOFS)}")
    if severity == "error" and "sign" in kinds:
        raise ValueError(f"{place}: a sign proves no error; expected another kind, or the severity note")
    if len(kinds) > 1 and (severity == "error" or "sign" in kinds[1:]):
        raise ValueError(f"{place}: {value!r}; expected the proof of a note, then that of an error")
    return kinds


_OF_RULE: Any = ""
"""The severity of a finding that is made without one: that of its rule."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken rule at a place.

    Attributes:
        rule: Id of the rule.
        found: The value, tokens or text that break the rule.
        place: File, row, message, field or token.
        expected: The value that satisfies it; empty if the rule's title is enough.
        detail: Lines with more, such as the tokens around the first difference.
        row: The chat row as one line of JSON that you can paste into a dataset, or empty.
        shape: The shape of the first difference, such as `after [INST]: ␣ → nothing`; empty if no tokens are compared.
        more: How many further findings this one stands for; 0 if none.
        fix: The way to mend it in the tool that made it, perhaps with placeholders for paths; empty for the rule's own
            fix.
        tokens: The tokens around the first difference, or None.
        name: The name of its cause, or its name within its rule, such as `ML107.encoding`, by which a list of known
            deviations accepts it alone; may be empty.
        severity: `error` fails the check; `note` only with `--fail-on note`. It is its rule's, unless a note is
            raised to an error, for example because the fault is in every row, or the run is by older rules.
        error_from: The version from which it is an error, if it is a note because the run is by older rules; else
            empty.
        is_newer: Whether the rules of the run are older than its rule: then it never fails.
        effect_of: The rule of the finding that was shown to explain it, or its cause if only findings of that one do;
            empty if it stands for itself. Beside that finding, it is only counted.
        covers: The number of findings that this one explains, by their rules.
        others: Places of other rows that it is about, such as the first of equal rows.
        fixes: The fix in each known program, by the program's name, if the program that made the artifact is not known.
            Of the findings of a check, the first of a rule has them.
    """

    rule: str
    found: str
    place: Place = NOWHERE
    expected: str = ""
    detail: str = ""
    row: str = ""
    shape: str = ""
    more: int = 0
    fix: str = ""
    tokens: TokenRow | None = None
    name: str = ""
    severity: Severity = _OF_RULE
    error_from: str = ""
    is_newer: bool = False
    effect_of: str = ""
    covers: tuple[tuple[str, int], ...] = ()
    others: tuple[Place, ...] = ()
    fixes: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Take the severity of the rule, if none is given."""
        if not self.severity:
            object.__setattr__(self, "severity", RULES[self.rule].severity)

    @property
    def is_raised(self) -> bool:
        """Whether it is an error although its rule is a note, at least by the rules of its version."""
        return RULES[self.rule].severity == "note" and (self.severity == "error" or bool(self.error_from))

    @property
    def proof(self) -> Proof:
        """What proves it."""
        kinds = RULES[self.rule].proof
        return kinds[-1] if self.is_raised else kinds[0]

    def under(self, rule: str, **values: Any) -> Finding:
        """Return the finding as one of another rule, with that rule's severity unless it is raised.

        Args:
            rule: The other rule.
            values: Further attributes that change.
        """
        severity = self.severity if self.is_raised else RULES[rule].severity
        return replace(self, rule=rule, severity=severity, **values)

    @property
    def is_sign(self) -> bool:
        """Whether nothing proves it: it is to be looked at."""
        return self.severity == "note" and self.proof == "sign"

    @property
    def from_version(self) -> str:
        """The version from which it counts, in words, if the run is by older rules; else empty."""
        if self.error_from:
            return f"an error from {self.error_from} on"
        return f"a note from {RULES[self.rule].since} on" if self.is_newer else ""

    @property
    def next_step(self) -> str:
        """The way to mend the artifact: in the tool that made it, or else the rule's."""
        return with_paths(self._fix_text)

    @property
    def _fix_text(self) -> str:
        return self.fix or RULES[self.rule].fix_text

    @property
    def names_paths(self) -> bool:
        """Whether a fix has placeholders for the paths of the judged artifact."""
        return any(map(_PLACEHOLDER.search, (self._fix_text, *(fix for _, fix in self.fixes))))

    def with_paths(self, paths: Mapping[str, str]) -> Finding:
        """Return the finding with real paths in its fixes.

        Args:
            paths: A path for each placeholder, with the keys of `EXAMPLE_PATHS`.
        """
        if not self.names_paths:
            return self
        fixes = tuple((name, with_paths(fix, paths)) for name, fix in self.fixes)
        return replace(self, fix=with_paths(self._fix_text, paths), fixes=fixes)

    @property
    def words(self) -> str:
        """What was found, with the places of other rows that it is about."""
        return f"{self.found}: {', '.join(map(str, self.others))}" if self.others else self.found

    @property
    def cause(self) -> str:
        """A key that is the same for every finding of one cause: it contains neither the row nor its place."""
        if self.shape:
            return f"{self.rule} {self.shape}"
        # each file must be mended separately; a line, a layer or an index is only a place
        name = "" if self.row else self.place.kind
        # in rows, quotes are texts of this row; elsewhere, such as in a configuration, they may name the fault
        quoted = (
            r"'[^']*'|\"[^\"]*\"" if self.row or self.place.record is not None else r"'[^']*\s[^']*'|\"[^\"]*\s[^\"]*\""
        )
        found = re.sub(r"[0-9]+", "#", re.sub(quoted, "'…'", self.found))
        found = re.sub(r"'…' and [#,]+ more characters?", "'…'", found)
        found = re.sub(r"[\w.#]*\blayers\.#\.[\w.#]+", "layers.#", found)
        return f"{self.rule} {name}: {re.sub(r'#(, #)+', '#', found)}"

    def line(self) -> str:
        """Return the finding as one line that begins with its file and line, or its row or tensor, as editors read it.

        A record that is not a line of its file is named by its number.
        """
        place, rule = self.place, RULES[self.rule]
        where, part = str(place.row), str(place)[len(str(place.row)) :].lstrip(", ")
        if place.record is not None and place.line is not None:
            where = f"{place.source.name}: row {place.record}"
        words = " ".join(f"{part}: {self.words}".split()) if part else " ".join(self.words.split())
        return printable(f"{where + ': ' if where else ''}{self.rule} {rule.fault}: {words}", lines=False)

    def text(self) -> str:
        """Return the finding for a terminal; the first line starts with the rule's id."""
        rule = RULES[self.rule]
        # a name may contain a line that looks like one of ours
        place = f"{self.place}: " if self.place else ""
        lines = [in_block(f"{self.rule} {place}{self.words}")]
        if self.expected:
            lines.append(in_block(f"  expected: {self.expected}"))
        lines += [f"  {line}" for line in self.detail.splitlines()]
        # one line to paste into a rows file, which reproduces the finding
        if self.row:
            lines.append(f"  row:      {self.row}")
        if self.covers:
            explained = ", ".join(f"{rule} ({count})" for rule, count in self.covers)
            lines.append(f"  explains: {counted(sum(dict(self.covers).values()), 'more finding')}: {explained}")
        lines += [f"  rules:    {self.from_version}"] if self.from_version else []
        lines += [f"  rule:     {rule.title}", f"  why:      {rule.why}", f"  fix:      {self.next_step}"]
        lines += [f"  {name + ':':<9} {with_paths(fix)}" for name, fix in self.fixes]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the finding as plain JSON data, with the text of its rule but without the rule's example."""
        rule = RULES[self.rule]
        of_rule = {name: getattr(rule, name) for name in ("since", "title", "fault", "why", "source")}
        of_rule["proof"] = self.proof
        values = {
            attribute.name: getattr(self, attribute.name) for attribute in fields(self) if attribute.name != "others"
        }
        return {
            **values,
            **of_rule,
            # as text for readers of all kinds, and as values for `from_json`
            "found": self.words,
            "place": str(self.place),
            "structured": {
                "found": self.found,
                "place": self.place.to_json(),
                "others": [place.to_json() for place in self.others],
            },
            "fix": self.next_step,
            "fixes": {name: with_paths(fix) for name, fix in self.fixes},
            "tokens": None if self.tokens is None else self.tokens.to_json(),
            "covers": [*map(list, self.covers)],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Finding:
        """Return the finding of the result of `to_json`."""
        values = {attribute.name: data[attribute.name] for attribute in fields(cls) if attribute.name in data}
        structured, tokens = data["structured"], values.get("tokens")
        values["found"] = structured["found"]
        values["place"] = Place.from_json(structured["place"])
        values["others"] = tuple(map(Place.from_json, structured["others"]))
        values["tokens"] = None if tokens is None else TokenRow.from_json(tokens)
        values["covers"] = tuple((rule, count) for rule, count in values.get("covers", ()))
        values["fixes"] = tuple(values.get("fixes", {}).items())
        # drop the fix of the rule
        rule = RULES[values["rule"]]
        values["fix"] = "" if values.get("fix") == rule.fix else values.get("fix", "")
        # no finding is weaker than its rule, unless the run is by older rules
        if values.get("severity") != "error" and not values.get("error_from"):
            values["severity"] = rule.severity
        return cls(**values)


def version_key(version: str) -> tuple[int, ...]:
    """Return a key that sorts versions such as `0.9` and `0.10`."""
    return tuple(map(int, version.split(".")))


def in_words(findings: Iterable[Finding], fixes: Mapping[str, str] | None) -> tuple[Finding, ...]:
    """Return findings with the ways to mend them in the program that made the artifact.

    One with a fix for its cause keeps it.

    Args:
        findings: The findings of a check.
        fixes: A fix for each rule that the program has words for. None if the program is not known: then the first
            finding of a rule that is mended by a setting has the fix in each known program.
    """
    if fixes is None:
        return _in_words_of_each(findings)
    return tuple(
        replace(finding, fix=fixes[finding.rule]) if finding.rule in fixes and not finding.fix else finding
        for finding in findings
    )


def _in_words_of_each(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    from pytest_mistral_lora.chat.kinds.registry import KINDS
    from pytest_mistral_lora.conformance.known_programs import fixes_of_programs

    sides = {side for kind in KINDS.values() for side in kind.sides}
    found, seen = [], set[str]()
    for finding in findings:
        if RULES[finding.rule].by_program and not finding.fix and finding.rule not in seen:
            seen.add(finding.rule)
            is_side = not sides.isdisjoint(finding.place.part[:1])
            finding = replace(finding, fixes=fixes_of_programs(finding.rule, of_preferences=is_side))
        found.append(finding)
    return tuple(found)


def first_findings(findings: Sequence[Finding], most: int, place: Place) -> list[Finding]:
    """Return the first findings of a rule; if there are more than `most`, add a finding with their number."""
    if len(findings) <= most:
        return list(findings)
    return [*findings[:most], rest_of_findings(findings[0].rule, len(findings) - most, place)]


def first_of_each_cause(findings: Iterable[Finding], most: int, place: Place) -> list[Finding]:
    """Return the first findings of each cause, so that a cause with many rows does not hide another."""
    causes: dict[str, list[Finding]] = {}
    for finding in findings:
        causes.setdefault(finding.cause, []).append(finding)
    return [kept for of_cause in causes.values() for kept in first_findings(of_cause, most, place)]


def shown_difference(diff: TokenDiff, place: Place) -> dict[str, Any]:
    """Return table, shape and tokens of the first difference, as arguments of a finding.

    Args:
        diff: The two encodings.
        place: The place of the row.
    """
    return {"detail": diff.table(), "shape": diff.shape(), "tokens": TokenRow.around_difference(str(place), diff)}


def rest_of_findings(rule: str, more: int, place: Place = NOWHERE) -> Finding:
    """Return a finding that stands for the counted findings of a rule."""
    return Finding(rule, f"… and {more} more", place, more=more)


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one check.

    Attributes:
        findings: The broken rules; may be empty.
        not_checked: The reason why something could not be checked: a separate state, never a pass.
        facts: Figures worth keeping in a report, such as which named deviations were seen.
    """

    findings: tuple[Finding, ...] = ()
    not_checked: str = ""
    facts: tuple[tuple[str, Any], ...] = ()


def findings_of(
    judges: Mapping[str, Callable[[], Result]], not_checked: dict[str, str] | None = None
) -> Iterator[Finding]:
    """Yield the findings of checks.

    Args:
        judges: The checks by name.
        not_checked: Filled with the reason of each check that could not judge, by name; None if you do not need them.

    Raises:
        ImportError: If a check needs a library that is not installed; after the findings of all other checks.
    """
    missing: ImportError | None = None
    for name, judge in judges.items():
        try:
            result = judge()
            yield from result.findings
            if result.not_checked and not_checked is not None:
                not_checked[name] = result.not_checked
        except ImportError as error:
            # last: judge everything that does not need the library first
            missing = missing or error
    if missing is not None:
        raise missing

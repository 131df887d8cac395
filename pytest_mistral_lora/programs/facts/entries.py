"""The form of a fact: a fault of a program at a version, or versions that work, each with its day and its proof.

Two things look alike and are not the same: a *known fault*, as here, explains a finding; a *known deviation*
(`conformance.known`, `chat.templates.deviations`) accepts one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Annotated, ClassVar, Literal, Self

from packaging.version import InvalidVersion, Version
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    Strict,
    StringConstraints,
    model_validator,
)

State = Literal["absent", "present", "unchecked", "ended"]


@dataclass(frozen=True, slots=True)
class Standing:
    """What a fact says about the versions of a machine.

    Attributes:
        state: `present`: these versions have the fault. `unchecked`: a program is newer than the one it was seen with.
            `ended`: a program has reached the version that mended it. `absent`: a program is older than the fault, or
            is not there.
        remark: The versions that decide, for `unchecked` and `ended`; else empty.
    """

    state: State
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Symptom:
    """A finding that a known fault may explain.

    Attributes:
        rule: The rule that is broken.
        found: The value, tokens or text that break it.
        subject: The subject of the check that found it.
        case: The name of that check within its subject.
        server: The server that was judged, as a summary names it: `TITLE VERSION, model NAME`. Empty if it is none.
        name: The name of the finding within its rule, such as `ML107.encoding`; may be empty.
    """

    rule: str
    found: str
    subject: str = ""
    case: str = ""
    server: str = ""
    name: str = ""


def release_of(version: str) -> Version | None:
    """Return the release of a version: a nightly or a build of your own is judged by its number.

    Args:
        version: A version, as pip or a server reports it: `5.24.0.dev0`, `2.13.0+cpu`, `b11549-8b3f1c2`.

    Returns:
        None if it names no release.
    """
    try:
        return Version(Version(version).base_version)
    except InvalidVersion:
        number = re.search(r"\d+(\.\d+)*", version)
        return Version(number[0]) if number else None


_PRINTED = re.compile(r"^version: (\S+) (\S+)$", re.MULTILINE)


def printed_versions(output: str) -> dict[str, str]:
    """Return the versions of programs that the output of a reproduction names: those that pip does not know."""
    return dict(_PRINTED.findall(output))


def _version(text: str) -> str:
    try:
        Version(text)
    except InvalidVersion:
        raise ValueError("expected a version, such as 5.24.0") from None
    return text


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"expected a regular expression: {error}") from None
    return text


def _end(value: object) -> object:
    if value == "open":
        return {}
    if not isinstance(value, dict) or not value:
        raise ValueError("expected open, or a version of a program, such as { transformers = '5.24' }")
    return value


_Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
_Id = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
_Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+([.-][a-z0-9]+)*$")]
_Rule = Annotated[str, StringConstraints(pattern=r"^ML\d{3}(\.[a-z]+)?$")]
_Versions = Mapping[_Name, Annotated[str, AfterValidator(_version)]]
_Day = Annotated[date, Strict()]
Proof = Literal["run", "read", "reported"]
"""`run`: this repository ran it. `read`: it was read in the program's source. `reported`: a thread says so."""


class _Table(BaseModel):
    """A table of a file of facts: frozen, without unknown keys."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)


class Reproduction(_Table):
    """How a machine can see a fault, or why none can.

    Attributes:
        script: A script of the folder `reproductions` beside the file. Its last line is `still true: …` or
            `no longer true: …`, with what it saw. If pip does not know the program, the line before is
            `version: PROGRAM VERSION`.
        needs: What pip installs for it beside the newest release of the program; the package that has the program if
            pip does not know it by its name.
        not_run: Why no machine can run one that installs in a minute; empty if there is a script.
    """

    script: str = ""
    needs: tuple[_Text, ...] = ()
    not_run: str = ""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if bool(self.script) is bool(self.not_run):
            raise ValueError("expected either script or not_run")
        if self.script and not re.fullmatch(r"\w+\.py", self.script):
            raise ValueError(f"script is {self.script!r}; expected the name of a file in reproductions, such as x.py")
        return self


class Entry(_Table):
    """What facts and working versions have in common.

    Attributes:
        id: A stable name.
        seen_on: The day on which it was seen, or found in its source.
        proof: How it is known.
        source: Its report, or the page or the record that shows it.
    """

    id: _Id
    seen_on: _Day
    proof: Proof
    source: _Text


class Works(Entry):
    """Versions that were seen to work, together if there are several.

    Attributes:
        versions: The versions, by program.
        use: What works.
    """

    versions: Annotated[_Versions, Field(min_length=1)]
    use: _Text

    @property
    def pinned(self) -> tuple[str, ...]:
        """The versions as pip takes them: `peft==0.18.1`."""
        return tuple(f"{name}=={version}" for name, version in self.versions.items())


class Fact(Entry):
    """A fault of one program, or of several together, at a version. Its id can stand in a list of known deviations.

    Attributes:
        severity: `error`: it changes ids or stops a run. `note`: it only matters in the case that the symptom names.
        seen_with: The newest version of each program that has it. A newer one is *not checked*.
        since: The oldest version of a program that has it; without one, every older version has it.
        until: The first version of a program that has it no more: in a file `open`, here empty, if none is known.
        symptom: What a user sees.
        words: A pattern of the words of a finding that this fault causes; empty for any.
        is_named_by_words: Whether only this fault has these words, so that they name it whatever server reports them.
        rules: Ids of the rules that are broken for this reason, or names within them, such as `ML107.encoding`.
        checks: Checks of the subject `answer` whose findings the fault can cause.
        way_out: What a user can do.
        works: The id of versions of the same file that do not have it; may be empty.
        reproduction: How a machine can see it.
    """

    severity: Literal["error", "note"] = "note"
    seen_with: Annotated[_Versions, Field(min_length=1)]
    since: _Versions = Field(default_factory=dict)
    until: Annotated[_Versions, BeforeValidator(_end)]
    symptom: _Text
    words: Annotated[str, AfterValidator(_pattern)] = ""
    is_named_by_words: bool = False
    rules: tuple[_Rule, ...] = ()
    checks: tuple[_Id, ...] = ()
    way_out: _Text
    works: str = ""
    reproduction: Reproduction
    _program: Program = PrivateAttr()

    @model_validator(mode="after")
    def _is_in_order(self) -> Self:
        for key, versions in (("since", self.since), ("until", self.until)):
            for name, version in versions.items():
                seen = self.seen_with.get(name)
                if seen is None:
                    raise ValueError(f"{key} names {name}, and seen_with does not")
                found = f"{key} of {name} is {version}, and it was seen with {seen}"
                if key == "since" and Version(version) > Version(seen):
                    raise ValueError(f"{found}; expected at most {seen}")
                if key == "until" and Version(version) <= Version(seen):
                    raise ValueError(f"{found}; expected more than {seen}")
        if self.is_named_by_words and not self.words:
            raise ValueError("is_named_by_words is true, and there are no words")
        return self

    @property
    def program(self) -> Program:
        """The program of its file."""
        return self._program

    @property
    def ranges(self) -> Mapping[str, str]:
        """The versions that have it, as pip writes them: `>=5.0,<5.24`; an open fault has no upper end but this."""
        found = {}
        for name, seen in self.seen_with.items():
            since, until = self.since.get(name), self.until.get(name)
            if since and not until:
                found[name] = f"=={seen}" if since == seen else f">={since}"
            else:
                found[name] = ",".join(filter(None, (since and f">={since}", f"<{until}" if until else f"<={seen}")))
        return found

    @property
    def can_explain(self) -> bool:
        """Whether a finding can show it."""
        return bool(self.rules or self.checks)

    def standing(self, versions: Mapping[str, str]) -> Standing:
        """Return what the fact says about installed versions.

        Args:
            versions: The installed versions by name, as pip has them.
        """
        missing = [name for name in self.seen_with if name not in versions]
        return Standing("absent") if missing else self._of({name: versions[name] for name in self.seen_with})

    def standing_of_server(self, server: str) -> Standing:
        """Return what the fact says about a server.

        Args:
            server: The server as a summary names it: `TITLE VERSION, model NAME`. One that reports no version can have
                every fault of its program; one of another name has none.
        """
        title, head = self.program.title, server.partition(",")[0]
        if head != title and not head.startswith(f"{title} "):
            return Standing("absent")
        version = head.removeprefix(title).strip()
        return self._of({self.program.program: version}) if release_of(version) is not None else Standing("present")

    def _of(self, versions: Mapping[str, str]) -> Standing:
        newer, ended = [], []
        for name, version in versions.items():
            running, seen, until = release_of(version), self.seen_with[name], self.until.get(name)
            if running is not None and name in self.since and running < Version(self.since[name]):
                return Standing("absent")
            if running is not None and until and running >= Version(until):
                ended.append(f"until {name} {until}, you run {version}: ended")
            elif running is None or (not until and running > Version(seen)):
                about = f"{name}: " if len(versions) > 1 else ""
                newer.append(f"{about}seen with {seen}, you run {version}: not checked")
        if ended:
            return Standing("ended", "; ".join(ended))
        return Standing("unchecked", "; ".join(newer)) if newer else Standing("present")

    def explains(self, symptom: Symptom) -> bool:
        """Return whether the fault can cause a finding, whatever the versions are."""
        is_of_answers = symptom.subject == "answer" and symptom.case in self.checks
        is_of_rules = not {symptom.rule, symptom.name}.isdisjoint(self.rules)
        return (is_of_rules or is_of_answers) and bool(re.search(self.words, symptom.found))

    def standing_for(self, symptom: Symptom, versions: Mapping[str, str]) -> Standing:
        """Return what the fact says about a finding: `absent` if the fault cannot cause it.

        Args:
            symptom: The finding.
            versions: The installed versions by name, which decide unless the program is a server.
        """
        if not self.explains(symptom):
            return Standing("absent")
        if self.program.kind != "server":
            return self.standing(versions)
        # a server has an environment of its own
        standing = self.standing_of_server(symptom.server)
        # and may stand behind one of another name
        return Standing("present") if standing.state == "absent" and self.is_named_by_words else standing


class Program(_Table):
    """A file of facts: those about one program.

    Attributes:
        program: The name in pip, or the usual one in lower case.
        title: The name as people write it.
        in_pip: Whether pip installs it by its name.
        kind: What it is to a user. The versions of a server are those of the server that is judged, and not those
            installed here.
        faults: Its known faults.
        works: Versions that were seen to work.
    """

    program: _Name
    title: _Text
    in_pip: bool = True
    kind: Literal["library", "trainer", "evaluator", "server", "converter"]
    faults: tuple[Fact, ...] = Field(default=(), alias="fault")
    works: tuple[Works, ...] = ()

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        pairs = {pair.id for pair in self.works}
        for fault in self.faults:
            if self.program not in fault.seen_with:
                raise ValueError(f"{fault.id}: seen_with lacks {self.program}, the program of the file")
            if fault.works and fault.works not in pairs:
                raise ValueError(f"{fault.id}: works is {fault.works!r}; expected one of {', '.join(pairs) or 'none'}")
            fault._program = self
        return self

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Its faults and its working versions."""
        return (*self.faults, *self.works)

    @property
    def newest_seen(self) -> str:
        """The newest version of the program that an open fault or a working combination was seen with; may be empty."""
        seen = [fault.seen_with[self.program] for fault in self.faults if self.program not in fault.until]
        seen += [pair.versions[self.program] for pair in self.works if self.program in pair.versions]
        return max(seen, key=Version, default="")

    def remark_on(self, version: str) -> str:
        """Return the remark on a version that is newer than every fact about the program; empty if it is not.

        Args:
            version: A version, as pip or a server reports it; may be empty.
        """
        running = release_of(version)
        if running is None or not self.newest_seen or running <= Version(self.newest_seen):
            return ""
        return f"seen with {self.newest_seen}, you run {version}: not checked"

"""Signs that the texts of every row of a file have: white space of a template, and a system prompt in a user's text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

from pytest_mistral_lora.chat.rows import has_more_than_text, text_of
from pytest_mistral_lora.conformance.dataset.row_texts import is_log_or_source
from pytest_mistral_lora.conformance.dataset.whole_file_sign import FEWEST, WholeFileSign
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.row_pass import JudgedRecord
from pytest_mistral_lora.places import Place

End = Literal["in front of", "behind"]

_WHITE = " \t\r\n"
"""White space that a template or a file has between its parts; a paragraph may begin with an ideographic space."""
_MOST_WHITE = 8
"""Characters of white space that are looked at."""
_ROLES = {"user": "text of the user", "assistant": "answer"}
_WORDS_OF_A_SENTENCE = 5


@dataclass
class _TextEdge:
    """The white space at one end of the texts of one role.

    Attributes:
        texts: Number of texts.
        lines: Number of these that are a sentence of one line, which neither a file nor a terminal ends with a break.
        common: What all of them have there, up to the text.
    """

    texts: int = 0
    lines: int = 0
    common: str = ""

    def add(self, white: str, end: End, *, texts: int = 1, lines: int = 0) -> None:
        """Add texts with some white space at their end."""
        if not self.texts:
            self.common = white
        elif self.common and white != self.common:
            turn = 1 if end == "in front of" else -1
            # a template writes next to its marker, and the text may go on with white space
            pairs = zip(self.common[::turn], white[::turn], strict=False)
            self.common = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))[::turn]
        self.texts += texts
        self.lines += lines

    @property
    def is_bare(self) -> bool:
        """Whether some text has nothing there, so that no further one counts."""
        return self.texts > 0 and not self.common

    def is_of_a_template(self, end: End) -> bool:
        """Return whether no text of a person or a program has it: indentation, and the end of a file, are theirs."""
        if not self.common or self.texts < FEWEST or "\t" in self.common or "  " in self.common:
            return False
        return end == "in front of" or "\n" not in self.common or 2 * self.lines >= self.texts


def _is_sentence(text: str) -> bool:
    """Return whether a text is one line of prose, and no command, program or output of one."""
    if "\n" in text or not text[0].isalpha() or text[0].islower() or is_log_or_source(text):
        return False
    return text[-1] in ".!?\u2026\u3002\uff01\uff1f" or len(text.split()) >= _WORDS_OF_A_SENTENCE


@dataclass
class EdgesOfTexts:
    """White space at an end of each text of a role."""

    edges: dict[tuple[str, End], _TextEdge] = field(default_factory=dict)

    def note(self, record: JudgedRecord) -> None:
        """Add the texts of a record; its prompt once."""
        for index, row in enumerate(record.rows):
            for message in (row.kind.answer_part(row) if index else row).messages:
                content, role = message.get("content"), message["role"]
                # a thought ends with a line break of its own
                if role not in _ROLES or has_more_than_text(content):
                    continue
                text = text_of(content)
                before, behind = self._edge(role, "in front of"), self._edge(role, "behind")
                if (before.is_bare and behind.is_bare) or not (inner := text.strip(_WHITE)):
                    continue
                if role == "assistant":
                    # no tokenizer encodes spaces there: ML648
                    text = text.rstrip(" ")
                start = text.index(inner[0])
                before.add(text[: min(start, _MOST_WHITE)], "in front of")
                # a call follows the text, and no EOS
                if not message.get("tool_calls"):
                    white = text[start + len(inner) :][-_MOST_WHITE:]
                    # the prompt of a completion: "Answer: "
                    white = "" if role == "user" and inner[-1] in ":\uff1a" else white
                    behind.add(white, "behind", lines=_is_sentence(inner))

    def _edge(self, role: str, end: End) -> _TextEdge:
        edge = self.edges.get((role, end))
        if edge is None:
            edge = self.edges[role, end] = _TextEdge()
        return edge

    def extend(self, other: EdgesOfTexts) -> None:
        """Add the texts of other rows."""
        for (role, end), edge in other.edges.items():
            self._edge(role, end).add(edge.common, end, texts=edge.texts, lines=edge.lines)

    def findings(self, file: Place) -> Iterator[Finding]:
        """Yield one finding: a template that writes white space at one marker often does so at each."""
        found = [
            f"{edge.common!r} {end} each {_ROLES[role]} ({edge.texts:,})"
            for (role, end), edge in sorted(self.edges.items(), reverse=True)
            if edge.is_of_a_template(end)
        ]
        if found:
            yield Finding("ML661", ", ".join(found), file, "texts that begin and end with their own words")


EDGES = WholeFileSign(EdgesOfTexts)
"""The same white space at one end of every text."""


_LONGEST_OPENING = 1000
# who the model is, how it thinks, what day it is
_SETTING = re.compile(
    r"\A\s*(?:you(?:'re| are)(?! given| provided| asked)\b|your (?:name|role) is|act as\b|detailed thinking (?:on|off)"
    r"|reasoning(?: effort)?\s*:|today\b|current date|knowledge cutoff|cutting knowledge|du bist\b|sie sind ein|tu es\b"
    r"|vous êtes\b|eres\b|usted es\b|sei un|tu sei\b|você é\b|és um|je bent\b|jesteś\b|ты\b|вы \u2014|ти\b|你是|您是"
    r"|あなたは|당신은|너는|أنت\b|אתה\b|sen bir|du är\b|kamu adalah|anda adalah|bạn là|आप एक)",
    re.IGNORECASE,
)
# how to answer, but not which of some labels
_STYLE = re.compile(
    r"\b(?:(?:answer|respond|reply)(?! (?:only |just )?(?:with|yes|no|true|false|by|as|a|b)\b)|be \w+|always|never"
    r"|do not|don't|speak|keep (?:it|your)|use (?:simple|short|plain|formal)|think|antworte\w*|sei\b|sprich|nie|immer"
    r"|réponds|répondez|sois|soyez|toujours|jamais|responde|respóndame|sé|siempre|nunca|rispondi|sii|sempre|mai"
    r"|responda|seja|antwoord|wees|odpowiadaj|svara|svar)\b|отвечай|будь|всегда|回答|回复|答えて|대답",
    re.IGNORECASE,
)
# a task that names the text behind it
_OF_THE_REST = re.compile(
    r"\b(?:follow(?:s|ing)|below|above|this|these|given|provided|next|input|the (?:text|question|sentence|passage"
    r"|problem|paragraph|document|article|review|message|e-?mail|code|function|word|phrase|statement|context|story"
    r"|title|claim|query|request|task|user)|folgende\w*|unten|diese[mnrs]?|gegeben\w*|d(?:er|ie|as|en|em) (?:text|satz"
    r"|frage|absatz|aufgabe)|suivant\w*|ci-dessous|cet?(?:te)?|(?:le|la) (?:texte|phrase|question)|siguientes?|est[ea]"
    r"|(?:el|la) (?:texto|frase|pregunta|oración)|seguent[ei]|quest[oaie]|il testo|la (?:frase|domanda)|seguintes?"
    r"|o texto|a (?:frase|pergunta)|volgende|onderstaande|deze|następując\w+|poniższ\w+)\b"
    r"|следующ|этот|эту|текст|вопрос|以下|下面|下列|这|文章|句子|文本|问题|次の|この|다음|아래|التالي|הבא",
    re.IGNORECASE,
)
_REQUEST = re.compile(
    r"[?\uff1f؟]"
    r"|\A\W*(?:(?:please|could|can|would|will|do|does|did|is|are|was|were|have|has|should|may|what|how|why|who|when|where"
    r"|which|write|explain|give|list|tell|describe|name|make|create|show|find|compare|help|suggest|recommend|say|plan"
    r"|draft|compose|define|summari[sz]e|translate|calculate|compute|solve|convert|i(?:'d| would| need| want)|bitte|was"
    r"|wie|warum|wer|wann|wo|welche\w*|schreib\w*|erklär\w*|nenne|gib|zeig\w*|erzähl\w*|übersetz\w*|quel\w*|comment"
    r"|pourquoi|qui|quand|où|écri\w+|expli\w+|donne\w*|décri\w+|cite\w*|escrib\w+|escrev\w+|dame|describ\w*|nombra\w*"
    r"|scriv\w+|spieg\w+|dammi|elenc\w+|descriv\w+)\b|напиши|объясни|расскажи|назови|опиши|写|请|解释|列出|介绍)",
    re.IGNORECASE,
)


@dataclass
class _Openings:
    """What the first, or the last, texts of the user have in front of their first blank line.

    Attributes:
        texts: Number of texts.
        common: What all of them have; empty if they differ.
        rest: What follows it in one of them.
        requests: Number of texts whose rest is a question or a request.
        differ: Whether there are two rests that differ.
    """

    texts: int = 0
    common: str = ""
    rest: str = ""
    requests: int = 0
    differ: bool = False

    def add(self, opening: str, rest: str, *, texts: int = 1, requests: int = 0, differ: bool = False) -> None:
        """Add texts with an opening."""
        if not self.texts:
            self.common, self.rest = opening, rest
        elif opening != self.common:
            self.common = ""
        self.texts += texts
        self.requests += requests
        self.differ = self.differ or differ or rest != self.rest

    def is_system_prompt(self, *, beside: bool) -> bool:
        """Return whether it is one: it says how to answer, and what follows it stands for itself.

        Args:
            beside: Whether some rows have a system prompt.
        """
        if not self.common or self.texts < FEWEST or not self.differ:
            return False
        if self.common[-1] in ":\uff1a" or _OF_THE_REST.search(self.common):
            return False
        is_style = _STYLE.search(self.common) is not None and not beside and 2 * self.requests >= self.texts
        return is_style or _SETTING.match(self.common) is not None


@dataclass
class OpeningsOfRequests:
    """The sentence and the blank line that begin each request, as a converter joins a system prompt to it.

    Before v7, the system prompt stands in the first or the last text of the user.
    """

    rows: int = 0
    systems: int = 0
    openings: dict[str, _Openings] = field(default_factory=dict)

    def note(self, record: JudgedRecord) -> None:
        """Add the requests of a record, unless mistral-common itself writes the system prompt there."""
        if record.origin == "read back" and record.joins_system:
            return
        row = record.rows[0]
        texts = [text_of(message.get("content")) for message in row.messages if message["role"] == "user"]
        if not texts:
            return
        self.rows += 1
        self.systems += row.messages[0]["role"] == "system"
        for name, text in (("first", texts[0]), ("last", texts[-1])):
            known = self.openings.setdefault(name, _Openings())
            if known.texts and not known.common:
                known.texts += 1
                continue
            opening, blank, rest = text[:_LONGEST_OPENING].partition("\n\n")
            is_opening = bool(blank and rest.strip())
            is_request = _REQUEST.search(rest) is not None
            known.add(opening.strip() if is_opening else "", rest[:80], requests=is_request)

    def extend(self, other: OpeningsOfRequests) -> None:
        """Add the requests of other rows."""
        self.rows += other.rows
        self.systems += other.systems
        for name, more in other.openings.items():
            known = self.openings.setdefault(name, _Openings())
            known.add(more.common, more.rest, texts=more.texts, requests=more.requests, differ=more.differ)

    def findings(self, file: Place) -> Iterator[Finding]:
        """Yield one finding, of the first texts if both show it."""
        for name, opening in self.openings.items():
            if opening.is_system_prompt(beside=self.systems > 0):
                found = f"{opening.common[:80]!r} and a blank line begin the user's {name} text in each of "
                yield Finding("ML663", f"{found}{self.rows:,} rows", file, "a system prompt in a message of its own")
                return


OPENINGS = WholeFileSign(OpeningsOfRequests)
"""The same sentence and blank line at the beginning of every request."""

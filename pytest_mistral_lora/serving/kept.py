"""The answers that a server gave, kept in a file, so that a check that was stopped goes on where it ended.

A file has a line of JSON for what was asked, and one for each answer, as it came:

    {"asked": {"url": "http://127.0.0.1:8080", "server": "…", "version": "…", "models": ["…"]}}
    {"request": "<sha256>", "status": 200, "data": …, "text": "…", "is_whole": true}
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import scan_jsonl
from pytest_mistral_lora.errors import InputError, RowError
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.records.secrets import redacted
from pytest_mistral_lora.serving.client import Answer

_STEP = "Name another file, or remove this one to ask for everything again."


@dataclass
class KeptAnswers:
    """The answers in a file, and those that are added to it.

    Attributes:
        file: The file.
        found: The number of answers that were read and not asked for again.
    """

    file: Path
    found: int = 0
    _answers: dict[str, deque[Answer]] = field(default_factory=lambda: defaultdict(deque), repr=False)

    def open(self, server: Mapping[str, Any]) -> None:
        """Read the file, or begin it.

        Args:
            server: What identifies the server: its address, kind, version and models.

        Raises:
            InputError: If the file is of another server, or has another form.
        """
        self._answers.clear()
        lines = list(scan_jsonl(self.file, encoded=True)) if self.file.is_file() else []
        if not lines:
            self._write({"asked": dict(server)}, mode="w")
            return
        for number, item in enumerate(lines):
            # the last line may have been cut as the run was stopped
            if isinstance(item, RowError) and number == len(lines) - 1 and number > 0:
                whole = (json.dumps(known[1]) for known in lines[:-1] if not isinstance(known, RowError))
                write_text(self.file, "".join(f"{line}\n" for line in whole))
                break
            data = None if isinstance(item, RowError) else item[1]
            if number == 0:
                self._require_server(data, server)
                continue
            try:
                assert isinstance(data, dict)
                answer = Answer(data["status"], data["data"], data["text"], is_whole=data["is_whole"])
                self._answers[data["request"]].append(answer)
            except (AssertionError, KeyError, TypeError):
                raise InputError(f"line {number + 1} is no answer", place=str(self.file), next_step=_STEP) from None

    def _require_server(self, data: Any, server: Mapping[str, Any]) -> None:
        asked = data.get("asked") if isinstance(data, dict) else None
        if asked != json.loads(json.dumps(server)):
            found = "the answers of another server" if isinstance(asked, dict) else "not a file of kept answers"
            raise InputError(found, place=str(self.file), expected=f"those of {server}", next_step=_STEP)

    def find(self, path: str, data: Any) -> Answer | None:
        """Return the answer to a request, and at its second time the second one; None if it was not answered before."""
        answers = self._answers.get(_digest(path, data))
        if not answers:
            return None
        self.found += 1
        return answers.popleft()

    def add(self, path: str, data: Any, answer: Answer) -> None:
        """Keep the answer to a request, unless the request failed, or the server has sent the key back."""
        text = json.dumps(answer.data)
        if not answer.is_ok or redacted(text) != text:
            return
        kept = {"status": answer.status, "data": answer.data, "text": answer.text, "is_whole": answer.is_whole}
        self._write({"request": _digest(path, data), **kept}, mode="a")

    def _write(self, line: Mapping[str, Any], mode: str) -> None:
        try:
            with self.file.open(mode, encoding="utf-8") as out:
                out.write(f"{json.dumps(line)}\n")
        except OSError as error:
            raise InputError(f"it cannot be written: {error.strerror}", place=str(self.file)) from error


def _digest(path: str, data: Any) -> str:
    return hashlib.sha256(json.dumps([path, data], ensure_ascii=True).encode()).hexdigest()

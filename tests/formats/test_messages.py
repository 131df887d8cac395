"""The message of every reader for ten broken files of each format, beside this file in `messages.txt`.

After a change: `python tests/formats/test_messages.py`, and read what is new in `git diff`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from broken_files import BROKEN

from pytest_mistral_lora.cli import main

RECORD = Path(__file__).with_name("messages.txt")


def _messages(folder: Path) -> Iterator[str]:
    """Yield a part for each format, with the message for each of its broken files."""
    # messages name files as they are given
    before = Path.cwd()
    os.chdir(folder)
    try:
        for title, (verb, suffix, contents) in BROKEN.items():
            yield f"## {title}: mistral-lora {verb}"
            for number, content in enumerate(contents, start=1):
                path = Path(f"{number}.{suffix}")
                if callable(content):
                    content(path)
                else:
                    path.write_bytes(content if isinstance(content, bytes) else content.encode())
                yield _message_for(verb, path)
                path.rename(f"{title}-{path}")
    finally:
        os.chdir(before)


def _message_for(verb: str, path: Path) -> str:
    options = ["--to", "out.jsonl"] if verb == "import" else ["--tokenizer", "spm-v3"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        code = main([verb, str(path), *options])
    Path("out.jsonl").unlink(missing_ok=True)
    # the words of pyarrow and zlib are their own, and change with their versions
    text = re.sub(r"(cannot be read as [^:]+|data is damaged): .*?\. Fetch", r"\1: ... Fetch", err.getvalue().strip())
    if code == 1:
        # `check` reports an encoded row that it cannot read as a finding: here without the lines of its rule
        text = "".join(re.findall(r"^ML501 \S.*\n(?:  (?!rule: ).*\n)*", out.getvalue(), re.MULTILINE)).strip()
    # `render` converts a sound row of another format, as `check` does
    return f"{code} {text}" if code else "0"


def test_the_message_for_each_broken_file_is_the_one_that_was_read(tmp_path: Path) -> None:
    found = list(_messages(tmp_path))
    assert all(len(contents) == 10 for _, _, contents in BROKEN.values())
    assert not [line for line in found if line != "0" and not line.startswith(("## ", "2 error: ", "1 ML501 "))]
    assert "\n".join(found).splitlines() == RECORD.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        RECORD.write_text("\n".join(_messages(Path(folder))) + "\n", encoding="utf-8")

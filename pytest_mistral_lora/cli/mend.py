"""`mistral-lora check --fix` and `--diff`: Mistral's own chat template, put into a local checkpoint folder."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from difflib import unified_diff
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.cli.verb import PROGRAM, shown_path
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.escaping import own_stream, printable

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.session import Session
    from pytest_mistral_lora.conformance.targets import Target


def mend_templates(session: Session, *, writes: bool) -> None:
    """Write Mistral's own template over each one that a finding says to replace by it, or print the differences.

    A file that is not to be changed is named with the reason: a link, a snapshot of the Hub's cache, a folder with a
    manifest, a folder with the template at a second place, and the template of `backend: chat-template`, which is the
    user's own. Nothing else of a finding is mended: rows are never changed in place.

    Args:
        session: The session, which has run.
        writes: Whether to write; if not, the differences are printed.
    """
    from pytest_mistral_lora.checkpoint.tokenizer_folder import TEMPLATE
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer, training_template
    from pytest_mistral_lora.records.files import write_text

    stdout = own_stream(sys.stdout)
    for folder, target in dict(_folders(session)).items():
        file = folder / TEMPLATE
        reason = _reason_to_leave(folder, target)
        if reason:
            stdout.write(f"not mended: {shown_path(file)}: {reason}\n")
            continue
        tokenizer = CheckpointTokenizer(folder)
        text = training_template(tokenizer)
        if writes:
            write_text(file, text)
            stdout.write(f"mended: {shown_path(file)} is Mistral's own template now: judge it again\n")
            continue
        before = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
        lines = unified_diff(before, text.splitlines(), str(file), str(file), lineterm="")
        stdout.write("".join(f"{printable(line, lines=False)}\n" for line in lines))


def _folders(session: Session) -> Iterator[tuple[Path, Target]]:
    """Yield each folder whose template a failing cause says to write, with the target of its check."""
    from pytest_mistral_lora.report import commands_in

    targets = {target.name: target for target in session.targets}
    for cause in session.causes():
        for command in commands_in(cause.simplest.next_step):
            words = shlex.split(command)
            if words[:3] != [PROGRAM, "template", "--tokenizer"] or "--system-prompt" in words:
                continue
            target = targets.get(cause.check.partition("::")[0])
            if target is not None and Path(words[3]).is_dir():
                yield Path(words[3]), target


def _reason_to_leave(folder: Path, target: Target) -> str:
    """Return why a template is not written into a folder; empty if it is."""
    from pytest_mistral_lora.checkpoint.hub_cache import snapshot_of
    from pytest_mistral_lora.checkpoint.tokenizer_folder import TEMPLATE, TokenizerFiles, template_places
    from pytest_mistral_lora.conformance.targets import RecipeTarget
    from pytest_mistral_lora.records.manifest import MANIFEST

    if isinstance(target, RecipeTarget) and target.backend == "chat-template":
        return "the recipe trains by its own template (backend: chat-template)"
    if snapshot_of(folder) is not None:
        return "the folder is a snapshot in the Hub's cache"
    if folder.absolute() != folder.resolve() or (folder / TEMPLATE).is_symlink():
        return "it is reached by a link"
    if (folder / MANIFEST).exists():
        return f"{MANIFEST} has the hash of the run's own"
    with suppress(MistralLoraError):
        others = {place.source.name for place in template_places(TokenizerFiles(folder)).get("default", {})} - {
            TEMPLATE
        }
        if others:
            return f"{min(others)} has a template, too: remove it there first"
    return ""

"""Write the pages of docs/ that are made from the code: `python scripts/write_docs.py [--check]`.

The pages of the rules, of the incidents, of the published templates, of the recordings and of the command line are made
when the site is built, and are not in the repository. To read them in a clone:
`python scripts/write_docs.py --site FOLDER`.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT / "tests" / "mutants"), str(ROOT / "tests" / "support")]

import yaml  # noqa: E402
from command_line_page import command_line_page  # noqa: E402
from gallery import Mutant, benches, mutants  # noqa: E402
from guard_faults_page import tables_of_guarded_runs  # noqa: E402
from incidents import INCIDENTS  # noqa: E402
from known_faults_page import known_faults_page  # noqa: E402
from page_blocks import with_block  # noqa: E402
from published_page import published_page  # noqa: E402
from pydantic.fields import FieldInfo  # noqa: E402
from recordings_page import recordings_page  # noqa: E402
from sound_rows_page import sound_rows  # noqa: E402

from pytest_mistral_lora.chat.oracle.versions import VERSIONS  # noqa: E402
from pytest_mistral_lora.chat.templates.deviations import DEVIATIONS, Deviation  # noqa: E402
from pytest_mistral_lora.conformance.finding import PROOFS, RULES, Rule, with_paths  # noqa: E402
from pytest_mistral_lora.records.files import write_text  # noqa: E402
from pytest_mistral_lora.runners import TRAINERS, Trainer  # noqa: E402
from pytest_mistral_lora.serving.deviations import READ_DEVIATIONS, ReadDeviation  # noqa: E402
from pytest_mistral_lora.serving.servers import SERVERS  # noqa: E402
from pytest_mistral_lora.training.recipe import Recipe  # noqa: E402
from pytest_mistral_lora.training.recipe.data import DataSource, SourceLayout  # noqa: E402
from pytest_mistral_lora.training.recipe.declared import Deployment, DeploymentServer, UserCommand  # noqa: E402
from pytest_mistral_lora.training.recipe.sections import Section  # noqa: E402
from pytest_mistral_lora.training.recipe.settings import Retention  # noqa: E402

Gallery = list[tuple[str, Mutant]]
_MADE = "This page is made by `scripts/write_docs.py`"
THREAD = re.compile(r"[\w.-]+/[\w.-]+#\d+(, [\w.-]+/[\w.-]+#\d+)*")


def deviations_page() -> str:
    """Return the page on named deviations."""
    lines = [
        "# Named deviations",
        "",
        "If you train or serve through the chat template, check your rows against this list: here the template gives",
        "other ids than mistral-common.",
        "",
        "mistral-common generates a Jinja chat template for every tokenizer that it has, and the two are not the same",
        "function. A difference on one of your rows must be one of these, or the suite fails (ML004). Each deviation",
        "is predicted, not just tolerated: the table in the code has the text that the template writes, or the change",
        "of the row that removes the difference. A refusal is excused only if your row has what it is about,",
        "and the template is right about the row without it. Prompts are held to the same list: of each packaged row,",
        "the messages before each answer to a question or to the result of a tool; of your rows, one prompt of each",
        "shape (roles, settings, tools, calls, thinking), the longest first, up to 8,000 tokens or a 24th of those",
        "of the rows.",
        "",
        "Other checks read whole conversations, and not the prompts within them: the templates beside an adapter or a",
        "merged model (ML442) and in a GGUF file (ML913), lost messages (ML225), and the generated rows of the subject",
        "`mask`. A template that is wrong in prompts alone passes them: give its folder to `--mistral-tokenizer`, or",
        "ask its server with `mistral-lora serve-check`.",
        "",
        "A server that renders the template has them, too. `mistral-lora serve-check` accepts one of the servers that",
        "are listed here, from the version on (llama.cpp: from the build on): others were not run, and fail (ML902).",
        "`control-literal` is ML906. It is accepted of llama.cpp alone, which has no setting that prevents it; vLLM",
        "has one, `--tokenizer-mode mistral`. Those without tokenizer versions are of servers alone, which change",
        "messages before they render the template.",
        "",
        "A `derived-…` tokenizer is a file that the tests derive from a shipped vocabulary, with the special tokens of",
        "that version: mistral-common ships none of it.",
        "",
        f"{_MADE} from that table, and the tests run each example.",
    ]
    named = (*DEVIATIONS, *READ_DEVIATIONS)
    return _page([*lines, *(line for deviation in named for line in _deviation(deviation))])


def _deviation(deviation: Deviation | ReadDeviation) -> Iterator[str]:
    yield from ("", f"## {deviation.id}", "", f"{deviation.title} {deviation.why}", "")
    if isinstance(deviation, Deviation):
        versions = ", ".join(facts.name for facts in VERSIONS if facts in deviation.versions)
        yield f"- tokenizer versions: {versions}; kinds: {', '.join(sorted(deviation.kinds))}"
        yield f"- mistral-common: {deviation.mistral_common}"
    known = ((server.title, server.known_deviations("prompts")) for server in SERVERS.of_this_package())
    seen = [f"{title} {versions[deviation.id]}" for title, versions in known if deviation.id in versions]
    if seen:
        yield f"- servers: {', '.join(seen)}"
    yield f"- smallest example (on `{deviation.tokenizer}`):"
    yield from ("", "```json", json.dumps(deviation.example, ensure_ascii=False), "```")


def rules_page(*, words: bool = False) -> str:
    """Return the index of the rules.

    Args:
        words: Whether each rule has its reason and its fix, too, as words for the filter of the site.
    """
    lines = [
        "# Rules",
        "",
        "To look up a finding, search this page for its rule id, or run `mistral-lora rules ML004`: it prints the",
        "reason, the fix and an example, a broken row or file with its finding, and the command that fixes it or shows",
        "you the tokens. On the site, each id links to a page that has the same.",
        "",
        "Every finding starts with the id of a rule. From 0.1.0 on, an id never changes its meaning. An error fails",
        "its check. A note is shown, and fails only if you add `--fail-on note` (pytest: `--mistral-fail-on`).",
        "",
        "An error needs a proof. The column *proof* has what a rule takes as proof:",
        "",
        *(f"- **{kind}**: {sentence}" for kind, sentence in PROOFS.items()),
        "",
        "A rule with two has notes by the first, and errors by the second. The summary lists signs last, under *look",
        "at these*, with one row each.",
        "",
        f"{_MADE} from the tables in `conformance/rules/` and `field/rules/` of the package.",
        "",
        '<div class="filter" data-of="rules"></div>',
    ]
    for subject in dict.fromkeys(rule.subject for rule in RULES.values()):
        lines += ["", f"## {subject}", "", "| rule | severity | proof | requirement |", "|---|---|---|---|"]
        lines += [_rule_row(rule, words=words) for rule in RULES.values() if rule.subject == subject]
    return _page(lines)


def _rule_row(rule: Rule, *, words: bool) -> str:
    more = _words(rule) if words else ""
    anchor, proof = f'<a id="{rule.id.lower()}"></a>', ", ".join(rule.proof)
    return f"| {anchor}{rule.id} | {rule.severity} | {proof} | {_cell(rule.title)}{more} |"


def _words(rule: Rule) -> str:
    """Return the words by which a rule is found, which the page does not show."""
    text = f"{rule.why} {rule.fix} {rule.fault_class}".replace("`", "")
    return f" <span hidden>{_cell(html.escape(text))}</span>"


def symptoms_page() -> str:
    """Return the page of symptoms, with the settings of each trainer between its marks."""
    return _between_marks("symptoms.md", "trainers", _tables_of_fixes(TRAINERS.of_this_package()))


def _between_marks(page: str, name: str, lines: Iterable[str]) -> str:
    """Return a page with the lines between the marks of a name: the rest is written by hand."""
    return with_block((DOCS / page).read_text(encoding="utf-8"), name, "\n".join(lines))


def _tables_of_fixes(trainers: Iterable[Trainer]) -> Iterator[str]:
    """Yield a table for each trainer that has fixes: the rules, their classes or titles, and what to set."""
    for trainer in trainers:
        rules: dict[str, list[str]] = {}
        for rule, fix in trainer.fixes().items():
            rules.setdefault(fix, []).append(rule)
        if not rules:
            continue
        yield from ("", f"### {trainer.title}", "", "| rule | what is wrong | what to set |", "|---|---|---|")
        for fix, ids in rules.items():
            links = ", ".join(f"[{rule}](rules.md#{rule.lower()})" for rule in ids)
            titles = ", ".join(RULES[rule].fault_class or RULES[rule].title for rule in ids)
            yield f"| {links} | {_cell(titles)} | {_cell(with_paths(fix))} |"
        yield ""


def rule_page(rule: Rule, gallery: Gallery) -> str:
    """Return the page of one rule."""
    example = rule.example
    lines = [
        f"# {rule.id}",
        "",
        f"**{rule.title}**",
        "",
        f"- subject: {rule.subject}",
        f"- severity: {rule.severity}",
        *(
            f"- {name}: {kind}. {PROOFS[kind]}"
            for name, kind in zip(("proof", "proof of an error"), rule.proof, strict=False)
        ),
        f"- since: {rule.since}" + (f"; an error since {rule.error_since}" if rule.error_since else ""),
        f"- why: {rule.why}",
        f"- fix: {rule.fix}",
        *(f"- fix in {name}: {fix}" for name, fix in rule.program_fixes.items()),
        f"- source: {_linked(rule.source) if THREAD.fullmatch(rule.source) else rule.source}",
        "",
        "## Example",
        "",
        example.fault,
    ]
    blocks = (("text", example.excerpt), ("json", example.row), ("text", example.report))
    for language, block in (*blocks, ("console", f"$ {example.command}")):
        lines += ["", f"```{language}", block, "```"] if block else []
    lines += ["", example.sound, "", "## Known to catch", ""]
    lines += [f"- {_described(mutant)}{_of_incidents(mutant)}" for _, mutant in gallery if rule.id in mutant.rules]
    return _page([*lines, "", f"{_MADE}; the tests make the example again."])


def _described(mutant: Mutant) -> str:
    return " ".join((mutant.change.__doc__ or "").split())


def _of_incidents(mutant: Mutant) -> str:
    links = [f"[{name}](../incidents.md#{name.lower()})" for name in mutant.incidents]
    return f" ({', '.join(links)})" if links else ""


def incidents_page(gallery: Gallery) -> str:
    """Return the page of incidents: what went wrong, which rule catches it, and the mutant that shows it."""
    lines = [
        "# Incidents",
        "",
        "To find the rule for a failure that you have seen or read about, search this page. Each incident comes from",
        "public threads about LoRA fine-tunes of Mistral models. Its table has the rules that catch it in your files,",
        "and the mutants: artifacts that the tests break in the same way, to prove that the rules fire.",
        "",
        "Ids are stable, and not all numbers are taken.",
        "",
        f"{_MADE} from `tests/mutants/`.",
    ]
    for incident in INCIDENTS:
        lines += ["", f"## {incident.id}", "", f"{incident.title} ({_linked(incident.threads)}).", ""]
        shown = [(subject, one) for subject, one in gallery if incident.id in one.incidents]
        if shown:
            lines += ["| rules | subject | mutant |", "|---|---|---|"]
            lines += [f"| {_rule_links(one)} | {subject} | {_cell(_described(one))} |" for subject, one in shown]
        if incident.out_of_reach:
            lines += [f"Out of reach here: {incident.out_of_reach}"]
    return _page(lines)


_SMALLEST_RECIPE = """\
base: {repo: mistralai/Mistral-7B-Instruct-v0.3, revision: c170c708c41dac9275d15a8fff4eca08d52bab71}
data: {train: [rows.jsonl]}
training: {epochs: 2}
output: lora-out
"""


_PARTS: dict[str, dict[str, type[Section]]] = {
    "data": {"An entry of `train` or `eval`": DataSource, "`layout` of an entry": SourceLayout},
    "evaluation": {"`retention`": Retention, "An entry of `commands`": UserCommand},
    "deployment": {"deployment": Deployment, "`server` of a deployment": DeploymentServer},
}
"""Parts of sections that have a table of their own."""


def recipe_page() -> str:
    """Return the page of a recipe's keys."""
    lines = [
        "# Recipe",
        "",
        "To write a recipe, start from the example and look up the keys that you need:",
        "",
        *("```yaml", _SMALLEST_RECIPE.rstrip(), "```"),
        "",
        "Paths are relative to your `recipe.yaml`. An unknown key, or a value that cannot be used, is an error before",
        "anything is loaded. For your editor, [init](init.md) writes the JSON Schema, which is `Recipe.json_schema`.",
        "[The page on training](training.md) explains the settings in context.",
        "",
        f"{_MADE} from the models in `pytest_mistral_lora/training/recipe/`.",
    ]
    top = [(name, field) for name, field in Recipe.model_fields.items() if not _section(field)]
    lines += ["", "| key | default | meaning |", "|---|---|---|", *(_key(name, field) for name, field in top)]
    for name, field in Recipe.model_fields.items():
        if section := _section(field):
            keys = [_key(key, one) for key, one in section.model_fields.items()]
            doc = " ".join((section.__doc__ or "").split())
            lines += ["", f"## {name}", "", doc, "", "| key | default | meaning |", "|---|---|---|", *keys]
        for title, part in _PARTS.get(name, {}).items():
            keys = [_key(one.alias or key, one) for key, one in part.model_fields.items()]
            doc = " ".join((part.__doc__ or "").split())
            level = "##" if title == name else "###"  # a section that may be left out has no other heading
            lines += [
                "",
                f"{level} {title}",
                "",
                doc,
                "",
                "| key | default | meaning |",
                "|---|---|---|",
                *keys,
            ]
    return _page(lines)


def _section(field: FieldInfo) -> type[Section] | None:
    found = field.annotation
    return found if isinstance(found, type) and issubclass(found, Section) else None


def _key(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
    given = [one for one in (field.annotation, *get_args(field.annotation)) if get_origin(one) is Literal]
    choices = f" One of {', '.join(f'`{one}`' for one in get_args(given[0]))}." if given else ""
    return f"| `{name}` | {default} | {_cell(field.description or '')}{choices} |"


def _yaml(value: object) -> str:
    # a value of a class of ours, such as an objective, is written as its words
    plain = json.loads(json.dumps(value, default=str))
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _rule_links(mutant: Mutant) -> str:
    return ", ".join(f"[{rule}](rules/{rule}.md)" for rule in sorted(mutant.rules))


def _linked(threads: str) -> str:
    return ", ".join(_thread(thread) for thread in threads.split(", "))


def _thread(thread: str) -> str:
    repository, _, number = thread.partition("#")
    return f"[{thread}](https://github.com/{repository}/issues/{number})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _page(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"


def committed_pages() -> dict[str, str]:
    """Return the pages that are in the repository, by their paths in docs/."""
    made = {"deviations.md": deviations_page(), "rules.md": rules_page(), "recipe.md": recipe_page()}
    made |= {"symptoms.md": symptoms_page(), "known-faults.md": known_faults_page()}
    made["guard.md"] = _between_marks("guard.md", "guarded runs", tables_of_guarded_runs())
    return made | {"stats.md": _between_marks("stats.md", "sound rows", sound_rows())}


def site_pages() -> dict[str, str]:
    """Return the pages that only the site has, by their paths in docs/."""
    modules: dict[str, ModuleType] = benches()
    gallery = [(subject, mutant) for subject, module in modules.items() for mutant in mutants(module)]
    made = {"incidents.md": incidents_page(gallery), "cli.md": command_line_page(), "published.md": published_page()}
    made |= {"recordings.md": recordings_page(), "rules.md": rules_page(words=True)}
    return made | {f"rules/{rule.id}.md": rule_page(rule, gallery) for rule in RULES.values()}


def main() -> int:
    """Write the pages, or with --check say which are not up to date (exit code 1)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is not up to date")
    parser.add_argument(
        "--site", type=Path, metavar="FOLDER", help="write the pages that only the site has, into FOLDER"
    )
    given = parser.parse_args()
    folder, made = (given.site, site_pages()) if given.site else (DOCS, committed_pages())
    stale = [name for name, text in made.items() if not _is_current(folder / name, text)]
    for name in stale:
        if not given.check:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder / name, made[name])
        print(f"{name} {'is not up to date' if given.check else 'written'}")
    return int(given.check and bool(stale))


def _is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())

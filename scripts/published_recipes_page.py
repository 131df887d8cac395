"""The page of the recipes that trainers publish, made offline from the facts in docs/recipes/.

    python scripts/published_recipes_page.py            # write the page
    python scripts/published_recipes_page.py --check    # compare it: exit code 1 if it differs
    python scripts/published_recipes_page.py record OWNER/NAME=CHECKOUT … --date 2026-11-30
    python scripts/published_recipes_page.py run axolotl-ai-cloud/axolotl=CHECKOUT --date 2026-11-30

`record` reads the facts again from checkouts of the repositories. `run` gives plain rows to the trainer itself, which
`mistral-lora runner setup` has installed: Axolotl or LLaMA-Factory. Both write the page.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from recipes_of_trainers.judging import Fault, Judged, judged, record_rows
from recipes_of_trainers.layers import title_of
from recipes_of_trainers.recordings import read, record
from recipes_of_trainers.sources import NOT_JUDGED
from recipes_of_trainers.trainers import HOW

from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.records.files import write_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recipes" / "README.md"
_HEAD = """\
# Published recipes, judged

To see what your copy of a published recipe does, find its file below, and open the line that a finding names. If you
changed the recipe, check what your run makes: `mistral-lora check ADAPTER` judges the layers of an adapter, and
`mistral-lora audit --runner axolotl --config axolotl.yaml --tokenizer CHECKPOINT` the rows
([runners](../runners.md), [prepared folders](../prepared.md), [a guard](../guard.md) for scripts).
"""
_METHOD = """
## How they are judged

Each recipe is judged by its configuration and its data code, without weights and without a training run:

- **Layers**: a tiny model of the base's class ([checkpoints](../checkpoints.md)) gets an adapter by the recipe's own
  target. PEFT makes and saves it, and `check` judges the folder. Numbers of tensors are those of the tiny model: two
  layers, and a vision tower of one. Nothing is trained: the layers of the model of images are left at zero if the
  recipe's rows are text, which gives them no gradient.
- **Rows**: four plain conversations (`single`, `multi-turn`, `system`, `system-multi-turn` of the packaged rows) get
  the ids of the recipe's layout and its labels, which are compared with mistral-common's, as `audit` does. *Made by …
  itself*: the installed trainer was run with the recipe's own file, on rows with a tool and with thinking, too. *By the
  scoreboard*: the verdict is that of the [scoreboard](../scoreboard/README.md). Odd characters are not judged here.

*Sound* means that nothing was found in what was checked; the cells say what was not. A `derived-…` tokenizer is a file
that the tests derive from a shipped vocabulary, with the special tokens of that version. The class of a base is the
publicly known one; a copy under another name can differ.

A recipe names its data, and a template does not: of a recipe that Axolotl was run with, a fault of rows with a system
prompt, a tool or thinking is a note, unless its data has them.

No text of the recipes is stored here. The files beside this page, in `docs/recipes/`, have the facts that each verdict
needs: keys and values, with path, line and commit. The page is made from them, offline:

```console
$ python scripts/published_recipes_page.py --check
$ python scripts/published_recipes_page.py record axolotl-ai-cloud/axolotl=../axolotl --date 2026-12-31
```
"""


def page(recipes: Iterable[Judged]) -> str:
    """Return the page, as Markdown.

    Args:
        recipes: Each recipe with its verdict.
    """
    known = list(recipes)
    red = [recipe for recipe in known if recipe.errors]
    lines = [*_HEAD.splitlines(), "", *_summary(known), "", "## Findings", ""]
    lines += _findings(red, "error")
    lines += ["", "## Notes", ""]
    lines += _findings([recipe for recipe in known if len(recipe.errors) < len(recipe.faults)], "note")
    lines += _METHOD.splitlines()
    lines += ["", "## Each recipe", ""]
    for _source, facts in read():
        lines += _table([recipe for recipe in known if recipe.facts["repository"] == facts["repository"]])
    lines += ["## Not judged", "", "| repository | why |", "|---|---|"]
    lines += [f"| {name} | {why} |" for name, why in NOT_JUDGED]
    return "\n".join(lines) + "\n"


def _summary(recipes: Sequence[Judged]) -> Iterator[str]:
    yield "| trainer | repository, commit | recipes | finding | sound | not checked |"
    yield "|---|---|---|---|---|---|"
    for source, facts in read():
        own = [recipe for recipe in recipes if recipe.source is source]
        count = Counter(recipe.verdict for recipe in own)
        commit = f"[{facts['repository']}](https://github.com/{facts['repository']}/tree/{facts['commit']})"
        cells = (source.title, f"{commit}, {facts['committed']}", len(own))
        numbers = (count["finding"], count["sound"], count["not checked"])
        yield f"| {' | '.join(map(str, (*cells, *numbers)))} |"
    yield ""
    versions = ", ".join(f"{name} {version(name)}" for name in ("mistral-common", "transformers", "peft"))
    day = " and ".join(sorted({facts["recorded"] for _, facts in read()}))
    count = Counter(recipe.verdict for recipe in recipes)
    red, sound, rest = (count[verdict] for verdict in ("finding", "sound", "not checked"))
    yield f"Of {len(recipes)} recipes, {red} have a finding, {sound} are sound in what was checked, and {rest} could"
    yield "not be checked. A template that is registered for models counts once for each of their tokenizers."
    yield ""
    yield f"Read on {day}, at the newest commit that could be had on that day; a recipe may have changed since."
    yield f"Judged with {versions}."


def _findings(recipes: Sequence[Judged], severity: str) -> Iterator[str]:
    """Yield each cause once, with the recipes that have it."""
    causes: dict[tuple[str, str, str], list[str]] = {}
    for recipe in recipes:
        for fault in recipe.faults:
            if fault.severity == severity:
                cause = (recipe.source.title, fault.rule, _found(recipe, fault))
                causes.setdefault(cause, []).append(_place(recipe, fault) + _case(recipe, fault))
    yield "| trainer | rule | found | at |"
    yield "|---|---|---|---|"
    for (trainer, rule, found), places in causes.items():
        at = "<br>".join(dict.fromkeys(places))
        title = f"[{rule}](../rules.md#{rule.lower()}) {_plain(RULES[rule].title)}"
        yield f"| {trainer} | {title} | {_plain(found)} | {at} |"


def _found(recipe: Judged, fault: Fault) -> str:
    """Return what was found, without the names of tensors of the tiny model."""
    known, made = recipe.meaning.known, recipe.meaning.rows
    if known is None or fault.is_of_rows:
        return "; ".join(filter(None, (HOW.get(type(made), ""), recipe.meaning.remark)))
    return f"{re.split(r'; the first is|: base_model', fault.found)[0]}, in a tiny {title_of(known.label)}"


def _case(recipe: Judged, fault: Fault) -> str:
    """Return the template, its tokenizer, and the rows with a fault."""
    known, base = recipe.meaning.known, recipe.meaning.base
    template = f"`{base['value']}` with {known.tokenizer}, " if recipe.meaning.models and known and base else ""
    return f": {template}{fault.found}" if fault.is_of_rows else ""


def _place(recipe: Judged, fault: Fault) -> str:
    path, line = fault.key.get("path", recipe.path), fault.key["line"]
    commit = recipe.facts["commit"]
    quoted = path.replace(" ", "%20").replace("(", "%28").replace(")", "%29")
    form = "?plain=1" if path.endswith(".ipynb") else ""
    address = f"https://github.com/{recipe.facts['repository']}/blob/{commit}/{quoted}{form}#L{line}"
    return f"[{_plain(path)}:{line}]({address})"


def _table(recipes: Sequence[Judged]) -> Iterator[str]:
    facts = recipes[0].facts
    yield f"### {recipes[0].source.title}"
    yield ""
    yield f"`{facts['repository']}` at `{facts['commit']}`:"
    yield ""
    yield "| recipe | base | layers | rows | verdict |"
    yield "|---|---|---|---|---|"
    for recipe in recipes:
        rules = ", ".join(dict.fromkeys(fault.rule for fault in recipe.errors))
        verdict = f"**finding**: {rules}" if rules else recipe.verdict
        yield f"| {' | '.join((_named(recipe), _base(recipe), _plain(recipe.layers), _plain(recipe.rows), verdict))} |"
    yield ""


def _named(recipe: Judged) -> str:
    base = recipe.meaning.base
    return _place(recipe, Fault("", "", "", base)) if base else _plain(recipe.path)


def _base(recipe: Judged) -> str:
    base = recipe.meaning.base
    if recipe.meaning.models:
        return f"template `{base['value'] if base else ''}` of {', '.join(recipe.meaning.models)}"
    value = str(base["value"] or "not named") if base else "not named"
    if "models--" in value:
        value = value.partition("models--")[2].partition("/")[0].replace("--", "/")
    return _plain(value)


def _plain(text: str) -> str:
    """Return a text for a cell of a table that shows it letter by letter, but for what stands in backquotes."""
    parts = text.split("`")
    plain = [re.sub(r"([\\*_<>\[\]])", r"\\\1", part) if index % 2 == 0 else part for index, part in enumerate(parts)]
    return "`".join(plain).replace("|", "\\|")


def main(words: Sequence[str] | None = None) -> int:
    """Write, compare or record, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the page with the facts, and write nothing")
    verbs = parser.add_subparsers(dest="verb")
    for verb, about in (("record", "record the facts again"), ("run", "take rows out of the installed trainer")):
        recorder = verbs.add_parser(verb, help=about)
        recorder.add_argument("checkouts", nargs="+", metavar="OWNER/NAME=CHECKOUT")
        recorder.add_argument("--date", required=True, help="the day, as 2026-11-30")
    given = parser.parse_args(words)
    for word in given.checkouts if given.verb else ():
        repository, _, checkout = word.partition("=")
        (record if given.verb == "record" else record_rows)(repository, Path(checkout), given.date)
    text = page(judged())
    if not given.check:
        write_text(PAGE, text)
        return 0
    is_same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
    if not is_same:
        print(f"{PAGE.relative_to(ROOT)}: differs from the facts. Run: python scripts/published_recipes_page.py")
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())

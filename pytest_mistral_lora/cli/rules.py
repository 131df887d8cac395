"""`mistral-lora rules`: the rules of the suite."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from pytest_mistral_lora.cli.verb import Verb, add_json_option, print_json
from pytest_mistral_lora.errors import EXIT_OK, InputError

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.finding import Rule

_WORD = re.compile(r"[\w<>/\[\]]+")
_ENDINGS = ("ings", "ing", "ies", "ed", "es", "s", "e", "y")
_SHORTEST_STEM = 3

_DESCRIPTION = """\
List every rule: its id, its subject, its severity and its title. With ids, explain these rules: the reason for the
rule, its source, examples, and how to fix a finding. To find the rule for a symptom, search for words."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="*", metavar="ID", help="rule to explain, such as ML204")
    parser.add_argument(
        "--search", metavar="WORDS", help="list the rules whose text has all of these words, in any form: masked eos"
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the rules.

    Raises:
        InputError: If no rule has a given id, or all words of a search.
    """
    from pytest_mistral_lora.conformance.finding import RULES

    ids = [name.upper() for name in args.ids]
    unknown = [name for name in ids if name not in RULES]
    if unknown:
        new_name = RULES.new_name(unknown[0])
        step = (
            f"Read it: mistral-lora rules {new_name.partition('.')[0]}."
            if new_name
            else "List them: mistral-lora rules."
        )
        raise InputError(
            f"there is no rule {unknown[0]!r}",
            expected=new_name or "an id such as ML204",
            next_step=step,
        )
    chosen = [RULES[rule] for rule in dict.fromkeys(ids or RULES)]
    if args.search is not None:
        chosen = _with_words(chosen, args.search)
        if not chosen:
            raise InputError(
                f"no rule has all of the words {args.search!r}",
                expected="fewer words, or other ones, such as padding or system prompt",
            )
    if args.json:
        print_json([asdict(rule) for rule in chosen])
    elif args.ids:
        sys.stdout.write("\n\n".join(rule.text() for rule in chosen) + "\n")
    else:
        table = (f"{rule.id}  {rule.subject:<10}  {rule.severity:<5}  {rule.title}\n" for rule in chosen)
        sys.stdout.writelines(table)
    return EXIT_OK


def _with_words(rules: Iterable[Rule], words: str) -> list[Rule]:
    """Return the rules whose sentences have all words in any form, those with more of them in the title first."""
    wanted = [_stem(word) for word in _WORD.findall(words.casefold())]

    def count_in(*texts: str) -> int:
        stems = {_stem(word) for word in _WORD.findall(" ".join(texts).casefold())}
        # a word may be the beginning of a longer one
        return sum(any(stem.startswith(word) for stem in stems) for word in wanted)

    found = [
        rule
        for rule in rules
        if count_in(rule.title, rule.fault, rule.why, rule.fix, rule.example.fault) == len(wanted)
    ]
    return sorted(found, key=lambda rule: -count_in(rule.title, rule.fault))


def _stem(word: str) -> str:
    """Return a word without an ending of English: `masked`, `masks` and `masking` are one word."""
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= _SHORTEST_STEM:
            return word.removesuffix(ending)
    return word


VERB = Verb(
    "rules",
    "list the rules of the suite, or explain one",
    _add_options,
    run,
    description=_DESCRIPTION,
    examples=("mistral-lora rules", "mistral-lora rules ML204", "mistral-lora rules --search padding"),
)

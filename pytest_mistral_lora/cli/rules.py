"""`mistral-lora rules`: the rules of the suite."""

from __future__ import annotations

import argparse
import re
import sqlite3
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING

from pytest_mistral_lora.cli.verb import Verb, add_json_option, print_json
from pytest_mistral_lora.errors import EXIT_OK, InputError

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.finding import Rule

_WORD = re.compile(r"\w+")
_COLUMNS = "symptoms, fault, why, fix"
_WEIGHTS = "0, 20, 5, 1, 1"  # of the id, which is not searched, and of each column
_MOST_LISTED = 10

_DESCRIPTION = """\
List every rule: its id, its subject, its severity and its title. With ids, explain these rules: the reason for the
rule, its source, examples, and how to fix a finding. To find the rule for a symptom, search for words."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="*", metavar="ID", help="rule to explain, such as ML204")
    parser.add_argument("--search", metavar="WORDS", help="list the rules that fit these words best: model never stops")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the rules.

    Raises:
        InputError: If no rule has a given id, or a word of a search.
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
                f"no rule has a word of {args.search!r}",
                expected="words of what you see, such as: model never stops",
            )
    if args.json:
        print_json([asdict(rule) for rule in chosen])
    elif args.ids:
        sys.stdout.write("\n\n".join(rule.text() for rule in chosen) + "\n")
    else:
        listed = chosen[:_MOST_LISTED] if args.search is not None else chosen
        table = (f"{rule.id}  {rule.subject:<10}  {rule.severity:<5}  {rule.title}\n" for rule in listed)
        sys.stdout.writelines(table)
        if more := len(chosen) - len(listed):
            sys.stderr.write(f"{more} more rules have one of these words; all of them: --json\n")
    return EXIT_OK


def _with_words(rules: Iterable[Rule], words: str) -> list[Rule]:
    """Return the rules that have some of the words in any form, the best by BM25 first; symptoms weigh most."""
    by_id = {rule.id: rule for rule in rules}
    # quoted, because the index has a language of its own
    query = " OR ".join(f'"{word}"' for word in _WORD.findall(words))
    if not query:
        return []
    with closing(sqlite3.connect(":memory:")) as index:
        index.execute(f"CREATE VIRTUAL TABLE rules USING fts5(id UNINDEXED, {_COLUMNS}, tokenize = 'porter unicode61')")
        index.executemany(
            "INSERT INTO rules VALUES (?, ?, ?, ?, ?)",
            (
                (
                    rule.id,
                    "; ".join(rule.symptoms),
                    f"{rule.fault}. {rule.title}",
                    rule.why,
                    f"{rule.fix} {rule.example.fault}",
                )
                for rule in by_id.values()
            ),
        )
        found = index.execute(
            f"SELECT id FROM rules WHERE rules MATCH ? ORDER BY bm25(rules, {_WEIGHTS}), id", (query,)
        )
        return [by_id[rule_id] for (rule_id,) in found]


VERB = Verb(
    "rules",
    "list the rules of the suite, or explain one",
    _add_options,
    run,
    description=_DESCRIPTION,
    examples=("mistral-lora rules", "mistral-lora rules ML204", 'mistral-lora rules --search "model never stops"'),
)

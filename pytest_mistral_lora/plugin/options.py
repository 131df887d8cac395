"""Options and their ini twins.

PYTEST_DONT_REWRITE: pytest need not look for assertions in this table, which every run reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from typing import Literal

    IniType = Literal["paths", "linelist", "string", "bool", "int"]


# A plain class: every pytest run of every project builds this table, and a dataclass takes ten times as long.
class Option:
    """An option of the command line and its twin in the ini file.

    Attributes:
        flag: The option.
        help: What it does.
        ini: Name of the twin, or empty if there is none.
        ini_type: The twin's type.
        metavar: Name of the value; empty for a switch.
        repeatable: Whether it may be given several times.
        dest: Name of the parsed value.
    """

    __slots__ = ("dest", "flag", "help", "ini", "ini_type", "metavar", "repeatable")

    def __init__(
        self,
        flag: str,
        help_text: str,
        ini: str = "",
        ini_type: IniType = "string",
        metavar: str = "",
        *,
        repeatable: bool = False,
    ) -> None:
        self.flag = flag
        self.help = help_text
        self.ini = ini
        self.ini_type: IniType = ini_type
        self.metavar = metavar
        self.repeatable = repeatable
        self.dest = flag[2:].replace("-", "_")


GOLDEN = Option(
    "--mistral-golden",
    "Collect and run the Mistral conformance suite, beside whatever else was asked for. With no path given and no "
    "testpaths, only the suite. Names no target: every tokenizer that mistral-common ships, and a tiny LoRA train.",
)
TOKENIZER = Option(
    "--mistral-tokenizer",
    "Judge this tokenizer or checkpoint folder, or single tokenizer file (*.model.vN, tekken.json). Repeatable. "
    "Replaces the embedded default.",
    "mistral_tokenizers",
    "paths",
    "PATH",
    repeatable=True,
)
RECIPE = Option(
    "--mistral-recipe",
    "Judge this recipe (recipe.yaml): its pinned base's tokenizer, every row of its data, and the tiny train with "
    "that tokenizer. Repeatable. Replaces the embedded default.",
    "mistral_recipes",
    "paths",
    "PATH",
    repeatable=True,
)
ADAPTER = Option(
    "--mistral-adapter",
    "Judge this adapter folder: tensors, configuration, manifest. Repeatable. Replaces the embedded default.",
    "mistral_adapters",
    "paths",
    "PATH",
    repeatable=True,
)
BASE = Option(
    "--mistral-base",
    "The base checkpoint's folder of --mistral-adapter; without it, the Hub's cache is asked for the recorded one.",
    "mistral_base",
    "string",
    "PATH",
)
ENCODED = Option(
    "--mistral-encoded",
    "Judge these rows as a trainer encoded them (JSONL with messages, input_ids, labels), by the tokenizer of "
    "--mistral-tokenizer or --mistral-recipe. Repeatable. Replaces the embedded default.",
    "mistral_encoded",
    "paths",
    "PATH",
    repeatable=True,
)
RUNNER = Option(
    "--mistral-runner",
    "Judge what another trainer would train on: trl, axolotl, llamafactory, or the path of a script (*.py); "
    "NAME=FILE names its own configuration, else the stock one is used. It gets the rows of each --mistral-recipe, or "
    "the packaged rows with each --mistral-tokenizer. Repeatable. Replaces the embedded default.",
    "mistral_runners",
    "linelist",
    "NAME[=FILE]",
    repeatable=True,
)
GOLDEN_DIR = Option(
    "--mistral-golden-dir",
    "Your own goldens: rows in *.jsonl, how tokenizers render them under templates/<target>/, and what adapters answer "
    "under transcripts/<target>/. Repeatable.",
    "mistral_golden_dirs",
    "paths",
    "PATH",
    repeatable=True,
)
UPDATE = Option(
    "--mistral-golden-update",
    "Record or rewrite the goldens of --mistral-golden-dir from its rows: renderings, and with --mistral-adapter or "
    "--mistral-recipe transcripts. Lists each file. Refused where CI is set and with pytest-xdist.",
)
SKIP_TRAINING = Option("--mistral-golden-skip-training", "Leave out the end-to-end train.")
DEVICE = Option(
    "--mistral-device", "Where models run: auto (default), cpu or cuda.", "mistral_device", "string", "DEVICE"
)
EXAMPLES = Option(
    "--mistral-examples", "Hypothesis examples for each law (default 20).", "mistral_examples", "int", "N"
)
SEED = Option("--mistral-seed", "Explore other Hypothesis examples than the usual ones.", metavar="N")
STRICT = Option("--mistral-strict", "Notes and things that could not be checked fail too.", "mistral_strict", "bool")
XFAILS = Option(
    "--mistral-xfails",
    "Known deviations that do not fail: a file with a rule id or a node id a line, each with '# reason'. One that "
    "matches nothing in a full run is an error.",
    "mistral_xfails",
    "string",
    "PATH",
)
REPORT = Option("--mistral-report", "Write every check and finding to this file: .json or .html.", metavar="PATH")

OPTIONS = (
    GOLDEN,
    TOKENIZER,
    RECIPE,
    ADAPTER,
    BASE,
    ENCODED,
    RUNNER,
    GOLDEN_DIR,
    UPDATE,
    SKIP_TRAINING,
    DEVICE,
    EXAMPLES,
    SEED,
    STRICT,
    XFAILS,
    REPORT,
)
"""Every option; the help text is made from this table."""

PATH_FLAGS = tuple(option.flag for option in OPTIONS if option.metavar == "PATH")
"""The options that take a path."""

REQUIRE_MANIFEST = "mistral_require_manifest"
"""The one setting without an option."""


def add(parser: pytest.Parser) -> None:
    """Add every option and ini twin to pytest's parser."""
    group = parser.getgroup("mistral", "Mistral LoRA conformance")
    for option in OPTIONS:
        # without dest, pytest compares each new option with every option that it has
        if option.metavar:
            action = "append" if option.repeatable else "store"
            group.addoption(option.flag, dest=option.dest, action=action, metavar=option.metavar, help=option.help)
        else:
            group.addoption(option.flag, dest=option.dest, action="store_true", default=None, help=option.help)
        if option.ini:
            parser.addini(option.ini, f"{option.help} (as {option.flag})", type=option.ini_type, default=None)
    parser.addini(
        REQUIRE_MANIFEST, "An adapter folder without manifest.json fails, and is not just not checked.", type="bool"
    )


def asked_for(config: pytest.Config) -> bool:
    """Say whether this run asks for the suite.

    Raises:
        pytest.UsageError: If it does not, and yet gives one of the suite's options.
    """
    if getattr(config.option, GOLDEN.dest):
        return True
    given = [option.flag for option in OPTIONS if getattr(config.option, option.dest)]
    if given:
        raise pytest.UsageError(f"{given[0]} has no effect without {GOLDEN.flag}; add it, or leave {given[0]} out")
    return False

"""Options and their ini twins.

PYTEST_DONT_REWRITE: every run reads this table, which has no assertions.
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
        help: Its help text.
        ini: Name of the twin; empty without one.
        ini_type: The twin's type.
        metavar: Name of the value; empty for a switch.
        repeatable: Whether it may appear several times.
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
        self.flag: str = flag
        self.help: str = help_text
        self.ini: str = ini
        self.ini_type: IniType = ini_type
        self.metavar: str = metavar
        self.repeatable: bool = repeatable
        self.dest: str = flag[2:].replace("-", "_")


GOLDEN = Option(
    "--mistral-golden",
    "Run the Mistral conformance suite, beside the tests that you ask for; alone if there is no path and no testpaths. "
    "With no target named, tests every tokenizer that mistral-common ships and trains a tiny LoRA.",
)
TOKENIZER = Option(
    "--mistral-tokenizer",
    "Check this tokenizer folder, checkpoint folder, tokenizer file (*.model.vN, tekken.json) or shipped tokenizer "
    "(spm-v3). With --mistral-dataset, it encodes the rows and is not checked itself. Repeatable. Replaces the default "
    "targets.",
    "mistral_tokenizers",
    "paths",
    "PATH",
    repeatable=True,
)
RECIPE = Option(
    "--mistral-recipe",
    "Check this recipe (recipe.yaml): the tokenizer of its base, every row of its data, the adapter that it made, and "
    "a tiny train with that tokenizer. Repeatable. Replaces the default targets.",
    "mistral_recipes",
    "paths",
    "PATH",
    repeatable=True,
)
DATASET = Option(
    "--mistral-dataset",
    "Check every row of this file (JSON Lines with messages) with the tokenizer of --mistral-tokenizer, for example "
    "--mistral-dataset=rows.jsonl --mistral-tokenizer=spm-v3, or else of --mistral-recipe; no weights are needed. "
    "Repeatable. Replaces the default targets.",
    "mistral_datasets",
    "paths",
    "PATH",
    repeatable=True,
)
ADAPTER = Option(
    "--mistral-adapter",
    "Check this folder of an adapter or merged model: tensors, configuration, manifest, transcripts. Repeatable. "
    "Replaces the default targets.",
    "mistral_adapters",
    "paths",
    "PATH",
    repeatable=True,
)
BASE = Option(
    "--mistral-base",
    "Folder of the base checkpoint for --mistral-adapter. Default: the base that the adapter records.",
    "mistral_base",
    "string",
    "PATH",
)
ORACLE = Option(
    "--mistral-oracle",
    "The Mistral tokenizer of folders without tekken.json and tokenizer.model.vN: a name such as spm-v3, the path of a "
    "file, or none. Default: recognised by the vocabulary.",
    "mistral_oracle",
    "string",
    "NAME|PATH",
)
ENCODED = Option(
    "--mistral-encoded",
    "Check rows that a trainer encoded (input_ids, labels or a mask, with or without messages: JSONL, a table, a "
    "folder of save_to_disk) against the tokenizer of --mistral-tokenizer or --mistral-recipe. Repeatable. Replaces "
    "the default targets.",
    "mistral_encoded",
    "paths",
    "PATH",
    repeatable=True,
)
GGUF = Option(
    "--mistral-gguf",
    "Check this GGUF file of a model or an adapter: its tokenizer and template against --mistral-tokenizer, or the "
    "tokenizer that it is recognised by; its weights against --mistral-base or --mistral-adapter. Repeatable. Replaces "
    "the default targets.",
    "mistral_ggufs",
    "paths",
    "PATH",
    repeatable=True,
)
SERVER = Option(
    "--mistral-server",
    "Check the prompts that this running server feeds its model, such as --mistral-server=http://127.0.0.1:8080, "
    "against --mistral-tokenizer or --mistral-recipe, and its answers, against the transcripts of each "
    "--mistral-adapter. Its kind is recognised, or you name it (mistral-lora serve-check --help lists the kinds). "
    "Its key is read from MISTRAL_SERVER_KEY. Repeatable. Replaces the default targets.",
    "mistral_servers",
    "linelist",
    "[NAME=]URL",
    repeatable=True,
)
SERVER_ROWS = Option(
    "--mistral-server-rows",
    "Ask each --mistral-server for the prompts of the rows in this file (JSON Lines), in place of the packaged rows. "
    "Repeatable.",
    "mistral_server_rows",
    "paths",
    "FILE",
    repeatable=True,
)
SERVER_ANSWERS = Option(
    "--mistral-server-answers",
    "Ask each --mistral-server for answers whose ids are known, too, whole and as a stream, and check what a client "
    "gets of them.",
    "mistral_server_answers",
    "bool",
)
SERVER_SECONDS = Option(
    "--mistral-server-request-seconds",
    "Limit of each request to a --mistral-server, in seconds, such as 600 for one that loads its model at the first "
    "(default: 60 a row, 600 an answer).",
    "mistral_server_request_seconds",
    "int",
    "S",
)
RUNNER = Option(
    "--mistral-runner",
    "Check the ids and labels of another trainer by its name (`mistral-lora runner list` prints them), or of a script "
    "(*.py). It encodes the rows of each --mistral-recipe and --mistral-dataset, or else the packaged rows with each "
    "--mistral-tokenizer; if it takes preference pairs, these, too. NAME=FILE gives it a configuration; without one, "
    "it uses its own defaults. Repeatable. Replaces the default targets.",
    "mistral_runners",
    "linelist",
    "NAME[=FILE]",
    repeatable=True,
)
ALLOW_CODE = Option(
    "--mistral-allow-code",
    "Give each --mistral-runner its configuration unchanged, with the code, networks and uploads that it names. By "
    "default, such keys are left out and listed, or refused.",
    "mistral_allow_code",
    "bool",
)
GOLDEN_DIR = Option(
    "--mistral-golden-dir",
    "Folder of your own goldens: rows in *.jsonl, their ids and labels in templates/<target>/, and answers of adapters "
    "in transcripts/<target>/. Repeatable.",
    "mistral_golden_dirs",
    "paths",
    "PATH",
    repeatable=True,
)
UPDATE = Option(
    "--mistral-golden-update",
    "Record the goldens of --mistral-golden-dir from its rows again: ids and labels, and with --mistral-adapter or "
    "--mistral-recipe transcripts. Lists each file. Refused in CI (if CI is set) and with pytest-xdist.",
)
NO_TRAIN = Option("--mistral-no-train", "Leave out the tiny LoRA train.")
DEVICE = Option(
    "--mistral-device", "Device of the models: auto (default), cpu or cuda.", "mistral_device", "string", "DEVICE"
)
EXAMPLES = Option(
    "--mistral-examples",
    "Number of rows that Hypothesis generates for each law (default: 20).",
    "mistral_examples",
    "int",
    "N",
)
SEED = Option("--mistral-seed", "Generate other rows than the usual ones, by this seed.", metavar="N")
FAIL_ON = Option(
    "--mistral-fail-on",
    "What fails beside errors: note, not-checked (a check that could not run), or both, joined by a comma.",
    "mistral_fail_on",
    "string",
    "WHAT",
)
XFAILS = Option(
    "--mistral-xfails",
    "File of known deviations, which do not fail: a rule id, a node id, or the name of a cause or of a known fault a "
    "line, each with '# reason'. A line that matches no finding of a full run is an error.",
    "mistral_xfails",
    "string",
    "PATH",
)
OBJECTIVE = Option(
    "--mistral-objective",
    "The objective by which rows and labels of --mistral-dataset, --mistral-encoded and --mistral-runner are judged: "
    "answers, last-answer, last-round or everything, and no-thinking, no-calls, joined by commas. Default: answers.",
    "mistral_objective",
    "string",
    "WORDS",
)
RULES = Option(
    "--mistral-rules",
    "Judge by the rules of this version of the package, such as 0.1: what later rules or bounds find is a note that "
    "names their version, and fails no run.",
    "mistral_rules",
    "string",
    "VERSION",
)
WRITE_XFAILS = Option(
    "--mistral-write-xfails",
    "Write what this run finds to this new file, with empty reasons to fill in, as --mistral-xfails reads it.",
    metavar="PATH",
)
OUTPUT_FORMAT = Option(
    "--mistral-output-format",
    "text, or github for annotations beside the lines at fault and a summary of the job, too. Default: github if "
    "GITHUB_ACTIONS is true, otherwise text.",
    "mistral_output_format",
    "string",
    "FORMAT",
)
REPORT = Option(
    "--mistral-report", "Write every check and finding to this file (*.json, *.html or *.md).", metavar="PATH"
)

OPTIONS = (
    GOLDEN,
    TOKENIZER,
    RECIPE,
    DATASET,
    ADAPTER,
    BASE,
    ORACLE,
    OBJECTIVE,
    ENCODED,
    GGUF,
    SERVER,
    SERVER_ROWS,
    SERVER_ANSWERS,
    SERVER_SECONDS,
    RUNNER,
    ALLOW_CODE,
    GOLDEN_DIR,
    UPDATE,
    NO_TRAIN,
    DEVICE,
    EXAMPLES,
    SEED,
    FAIL_ON,
    XFAILS,
    RULES,
    WRITE_XFAILS,
    OUTPUT_FORMAT,
    REPORT,
)
"""Every option; the help text is made from this table."""

WRITTEN = (WRITE_XFAILS, REPORT)
"""The options of files that a run writes; all other options with paths are read."""

PATH_FLAGS = tuple(option.flag for option in OPTIONS if option.metavar == "PATH")
"""The options that take a path."""

REQUIRE_MANIFEST = "mistral_require_manifest"
"""The only setting without an option."""


def add(parser: pytest.Parser) -> None:
    """Add every option and ini twin to pytest's parser."""
    group = parser.getgroup("mistral", "Mistral LoRA conformance")
    for option in OPTIONS:
        # without dest, pytest compares each new option with every earlier option
        if option.metavar:
            action = "append" if option.repeatable else "store"
            group.addoption(option.flag, dest=option.dest, action=action, metavar=option.metavar, help=option.help)
        else:
            group.addoption(option.flag, dest=option.dest, action="store_true", default=None, help=option.help)
        if option.ini:
            parser.addini(option.ini, f"{option.help} (as {option.flag})", type=option.ini_type, default=None)
    parser.addini(
        REQUIRE_MANIFEST,
        "Fail an adapter folder without manifest.json, instead of reporting it as not checked.",
        type="bool",
    )


def asked_for(config: pytest.Config) -> bool:
    """Return whether this run asks for the suite.

    Raises:
        pytest.UsageError: If the run does not ask for the suite, but sets one of its options.
    """
    if getattr(config.option, GOLDEN.dest):
        return True
    given = [option.flag for option in OPTIONS if getattr(config.option, option.dest)]
    if given:
        raise pytest.UsageError(f"{given[0]} has no effect without {GOLDEN.flag}; add it, or leave {given[0]} out")
    return False

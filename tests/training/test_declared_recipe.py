"""A recipe declares what production serves, and the user's own commands; a run records both, and a merge takes both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from cut_sentencepiece import cut_v3
from local_server import Behaviour, serving
from tiny_runs import MakeRecipe, recipe_data, write_rows

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import InputError, RecipeError
from pytest_mistral_lora.records import notes
from pytest_mistral_lora.records.manifest import load, violations
from pytest_mistral_lora.records.notes import declare_again
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, load_folder
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.merge import MergedModel, merge
from pytest_mistral_lora.training.prepare import prepare
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe
from pytest_mistral_lora.training.recipe.declared import Deployment
from pytest_mistral_lora.training.run import RunResult, train

SUPPORT = {"as": "adapter", "name": "support"}
URL = "https://models.example.org"


@pytest.mark.parametrize(
    ("deployment", "field", "says"),
    [
        ({"name": "support"}, "as", "is missing"),
        ({"as": "merge", "name": "support"}, "as", "did you mean 'merged'"),
        ({"as": "adapter", "name": ""}, "name", "at least 1"),
        ({"as": "adapter", "name": "my model"}, "name", "without white space"),
        ({"as": "adapter", "name": "-rf"}, "name", "without white space"),
        ({**SUPPORT, "server": {"url": f"{URL}?key=abc"}}, "server", "more than an address"),
        ({**SUPPORT, "server": {"url": "ftp://models.example.org"}}, "server", "no address"),
        ({**SUPPORT, "server": {"url": "http://models.example.org"}}, "server", "https, or http to 127.0.0.1"),
        ({**SUPPORT, "server": {"url": URL, "kind": "vlm"}}, "server.kind", "did you mean 'vllm'"),
        ({**SUPPORT, "server": {"url": URL, "kind": "vllm:f8"}}, "server.kind", "unknown precision"),
        ({**SUPPORT, "server": {"url": URL, "kind": "vllm@a b"}}, "server.kind", "text that matches"),
        ({**SUPPORT, "server": {"url": URL, "key_env": "HF_TOKEN"}}, "server.key_env", "MISTRAL_SERVER_KEY"),
        ({**SUPPORT, "server": {"url": URL, "key": "abc"}}, "server.key", "no such key"),
    ],
)
def test_a_fault_of_a_deployment_is_named(deployment: dict[str, Any], field: str, says: str, base: Path) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        parse_recipe(recipe_data(base) | {"deployment": deployment})
    assert str(caught.value.place) == f"recipe, deployment.{field}"


@pytest.mark.parametrize(
    "server",
    [
        {"url": "http://127.0.0.1:8080/"},
        {"url": URL, "kind": "llamacpp@b11549-8b3f1c2:bf16", "key_env": "MISTRAL_SERVER_KEY_A"},
        {"url": f"{URL}/v1", "kind": "openai"},
    ],
)
def test_a_manifest_takes_each_deployment_that_a_recipe_takes(server: dict[str, str], run: RunResult) -> None:
    data = {"as": "merged", "name": "owner/modèle-3:v2", "server": server}
    recorded = Deployment.model_validate(data).to_json()
    assert recorded == {**data, "server": {"kind": "auto", **server}}
    assert violations({**run.manifest, "deployment": recorded}) == []


def test_a_password_in_an_address_is_refused_and_not_shown(base: Path) -> None:
    server = {"url": "https://ann:hunter2@models.example.org"}
    with pytest.raises(RecipeError, match="a password in the address") as caught:
        parse_recipe(recipe_data(base) | {"deployment": {**SUPPORT, "server": server}})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "field", "says"),
    [
        ({"command": "a", "files": ["../b"]}, "0.files", "below the recipe's folder"),
        ({"command": "a", "files": ["/etc/passwd"]}, "0.files", "below the recipe's folder"),
        ({"command": "a", "files": ["C:\\b"]}, "0.files", "below the recipe's folder"),
        ({"command": "a", "files": ["b", "./b"]}, "0.files", "twice"),
        ({"command": "a\nb"}, "0.command", "one line"),
        ({"comand": "a"}, "0.comand", "did you mean 'command'"),
        (3, "0", "expected a mapping"),
    ],
)
def test_a_fault_of_a_command_is_named(command: Any, field: str, says: str, make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        make_recipe(evaluation={"commands": [command]})
    assert f"evaluation.commands.{field}" in str(caught.value)


COMMANDS = ["lm_eval --tasks gsm8k", {"command": "judge", "files": ["results/a.json"]}]


def declaring(base: Path, folder: Path, **more: Any) -> Recipe:
    data = recipe_data(base, evaluation={"generations": 1, "max_new_tokens": 8, "commands": COMMANDS}, **more)
    write_rows(folder / "rows.jsonl")
    return parse_recipe(data | {"deployment": SUPPORT}, folder=folder)


@pytest.fixture(scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunResult:
    """A run whose recipe declares a deployment and two commands."""
    folder = tmp_path_factory.mktemp("declared")
    # left by another run: it says nothing of this one
    (folder / "results").mkdir()
    (folder / "results" / "a.json").write_text("{}")
    return train(declaring(base, folder, training={"seed": 1}))


@pytest.fixture(scope="module")
def declared_merge(declared: RunResult) -> MergedModel:
    return merge(declared.output, declared.output.parent / "merged", declared.base_folder)


def test_a_declaration_decides_no_step_and_is_not_in_the_recorded_recipe(base: Path, tmp_path: Path) -> None:
    recipe = declaring(base, tmp_path)
    plain = recipe.model_copy(
        update={"deployment": None, "evaluation": recipe.evaluation.model_copy(update={"commands": ()})}
    )
    assert recipe.as_written() == plain.as_written()
    assert "deployment" not in recipe.as_written()
    assert prepare(recipe).identity == prepare(plain).identity


def test_a_run_records_what_its_recipe_declares(declared: RunResult) -> None:
    data = load(declared.output).data
    assert data["deployment"] == SUPPORT
    assert [entry.get("files") for entry in data["evaluation"]][-2:] == [{}, {"results/a.json": None}]
    assert "Production serves this adapter as `support`." in (declared.output / "README.md").read_text()
    note = (declared.output / "DECISION.md").read_text()
    assert "Yours: `lm_eval --tasks gsm8k`" in note
    states = {fact.name: fact.state for fact in verify(declared.output)}
    assert "mismatch" not in states.values()
    assert states["evaluation.yours[1].files.results/a.json"] == "not available"


def test_a_merge_takes_it_over_and_knows_its_parent_whatever_is_declared_later(
    declared: RunResult, declared_merge: MergedModel
) -> None:
    assert declared_merge.manifest["deployment"] == SUPPORT
    assert "This folder is a by-product" in (declared_merge.output / "DECISION.md").read_text()
    for deployment in ({"deployment": None}, {}, {"deployment": SUPPORT}):
        declare_again(declared.output, {**deployment, "evaluation": []})
        declare_again(declared_merge.output, {**deployment, "evaluation": []})
        facts = verify(declared_merge.output, base=declared.base_folder, parent=declared.output)
        states = {fact.name: fact.state for fact in facts}
        assert states["parent.manifest_sha256"] == states["seal"] == "match"
        assert "mismatch" not in states.values()


@pytest.fixture
def written(adapter: Path, tmp_path: Path) -> Path:
    """The recipe of a run, beside a copy of its folder."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(dict(load(adapter).data["recipe"])))
    return file


def declare_in(file: Path, **declared: Any) -> None:
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **declared}))


def test_note_records_the_recipe_of_the_run_as_it_is_now(
    adapter: Path, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file.name: file.read_bytes() for file in adapter.iterdir() if file.is_file()}
    declare_in(written, deployment=SUPPORT)
    words = ["note", str(adapter), "--recipe", str(written)]
    assert main(words) == 0
    assert "Production serves this adapter as `support`." in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert [Path(file).name for file in json.loads(capsys.readouterr().out)] == ["DECISION.md", "README.md"]
    assert main(["note", str(adapter), "--withdraw"]) == 0
    assert load(adapter).data["deployment"] is None
    assert main(["verify", str(adapter)]) == 0
    # a recipe that declares nothing leaves nothing
    file = yaml.safe_load(written.read_text())
    written.write_text(yaml.safe_dump({key: value for key, value in file.items() if key != "deployment"}))
    assert main(words) == 0
    assert {file.name: file.read_bytes() for file in adapter.iterdir() if file.is_file()} == before


def test_note_takes_the_hashes_of_what_the_commands_left(
    adapter: Path, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load(written.read_text())
    commands = [{"command": "judge", "files": ["results.json"]}]
    declare_in(written, evaluation={**recipe["evaluation"], "commands": commands})
    assert main(["note", str(adapter), "--recipe", str(written)]) == 0
    assert load(adapter).data["evaluation"][-1]["files"] == {"results.json": None}
    (tmp_path / "results.json").write_text("{}")
    assert main(["note", str(adapter)]) == 0
    assert load(adapter).data["evaluation"][-1]["files"]["results.json"]["size"] == 2
    assert main(["verify", str(adapter)]) == 0
    (tmp_path / "results.json").write_text("{} ")
    capsys.readouterr()
    assert main(["verify", str(adapter)]) == 1
    assert "evaluation.yours[0].files.results.json" in capsys.readouterr().out


def test_note_refuses_the_recipe_of_another_run(
    adapter: Path, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, before = yaml.safe_load(written.read_text()), (adapter / "manifest.json").read_bytes()
    declare_in(written, deployment=SUPPORT, training={**recipe["training"], "learning_rate": 0.5})
    assert main(["note", str(adapter), "--recipe", str(written)]) == 2
    assert "training.learning_rate is 0.5, and was 0.01" in capsys.readouterr().err
    assert (adapter / "manifest.json").read_bytes() == before
    # another place of the output is no other run
    declare_in(written, training=recipe["training"], output="elsewhere")
    assert main(["note", str(adapter), "--recipe", str(written)]) == 0


def test_note_names_a_folder_beside_it_that_claims_the_name(
    adapter: Path, written: Path, declared: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(declared.output, tmp_path / "lora-b")
    declare_again(tmp_path / "lora-b", {"deployment": SUPPORT, "evaluation": []})
    declare_in(written, deployment=SUPPORT)
    capsys.readouterr()
    assert main(["note", str(adapter), "--recipe", str(written)]) == 0
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(found) == 1
    assert "lora-b claims this name, too, and they are of different adapters" in found[0]
    assert "lora-b --withdraw" in found[0]


@pytest.fixture
def behaviour(adapter: Path) -> Behaviour:
    """A server that answers as the run recorded, under the name `support`."""
    golden = load_folder(adapter / TRANSCRIPTS)
    return Behaviour(Oracle(cut_v3()), golden=golden, models=({"id": "support"},))


def check_server(adapter: Path, behaviour: Behaviour, *words: str, **more: Any) -> int:
    with serving(behaviour) as url:
        # as OpenAI's clients have it
        deployment = {**SUPPORT, "server": {"kind": "llamacpp:fp32", "url": f"{url}/v1", **more}}
        declare_again(adapter, {"deployment": deployment, "evaluation": []})
        return main(["serve-check", str(adapter), *words])


def test_serve_check_asks_the_server_that_a_folder_declares(
    adapter: Path, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MISTRAL_SERVER_KEY_SUPPORT", "a-key-of-the-team")
    monkeypatch.setenv("MISTRAL_SERVER_KEY", "a-key-of-somebody-else")
    code = check_server(adapter, behaviour, key_env="MISTRAL_SERVER_KEY_SUPPORT")
    out = capsys.readouterr().out
    assert "support is served as an adapter, as " in out, out
    assert code == 0, out
    assert out.splitlines()[0].startswith(f"{adapter} declares: support at http://127.0.0.1:")
    assert "asked with the key of MISTRAL_SERVER_KEY_SUPPORT" in out.splitlines()[0]
    assert "a-key-of" not in out
    sent = {headers.get("Authorization") for _, headers, _ in behaviour.seen}
    assert sent == {"Bearer a-key-of-the-team"}
    assert {data["model"] for path, _, data in behaviour.seen if path == "/v1/chat/completions"} == {"support"}
    # without a declared variable, no key is sent
    behaviour.seen.clear()
    check_server(adapter, behaviour)
    assert {headers.get("Authorization") for _, headers, _ in behaviour.seen} == {None}


def test_a_server_without_the_declared_name_is_one_finding(
    adapter: Path, behaviour: Behaviour, capsys: pytest.CaptureFixture[str]
) -> None:
    behaviour.models = ({"id": "tiny"}, {"id": "other"})
    assert check_server(adapter, behaviour) == 1
    out = capsys.readouterr().out
    assert [line[:5] for line in out.splitlines() if line.startswith("ML")] == ["ML933"], out
    assert "serves tiny, other" in out
    assert "the declared name is not served" in out


def test_another_server_than_the_declared_one_is_not_compared(
    adapter: Path, behaviour: Behaviour, capsys: pytest.CaptureFixture[str]
) -> None:
    declare_again(adapter, {"deployment": {**SUPPORT, "server": {"kind": "auto", "url": URL}}, "evaluation": []})
    behaviour.models = ({"id": "staging"},)
    with serving(behaviour) as url:
        main(["serve-check", url, "--tokenizer", "spm-v3", "--adapter", str(adapter)])
    out = capsys.readouterr().out
    assert "ML933" not in out
    assert "declares another server than this one" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "declares no deployment.server"),
        (["--adapter", "x"], "declares no deployment.server"),
    ],
)
def test_a_folder_without_a_server_is_refused(
    words: list[str], says: str, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve-check", str(adapter), *words]) == 2
    assert says in capsys.readouterr().err
    assert main(["serve-check", "no-such-folder"]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["x@evil.py", "vllm-parsers"])
def test_a_folder_names_no_program_to_run(
    kind: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x@evil.py").write_text("open('was-run', 'w')")
    declare_again(adapter, {"deployment": {**SUPPORT, "server": {"kind": kind, "url": URL}}, "evaluation": []})
    assert main(["serve-check", str(adapter), "--tokenizer", "spm-v3"]) == 2
    assert not Path("was-run").exists()
    assert capsys.readouterr().err
    server = {"kind": "./evil.py", "url": URL}
    with pytest.raises(InputError, match=r"deployment\.server\.kind"):
        declare_again(adapter, {"deployment": {**SUPPORT, "server": server}, "evaluation": []})


def test_note_of_another_version_refuses_to_write_without_a_change(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (adapter / "manifest.json").read_bytes()
    monkeypatch.setattr(notes, "UNDECLARED", "Another sentence.")
    assert main(["note", str(adapter)]) == 2
    assert "another text than the manifest lists" in capsys.readouterr().err
    assert (adapter / "manifest.json").read_bytes() == before


def test_without_a_folder_a_tokenizer_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve-check", "http://127.0.0.1:1"]) == 2
    assert "no tokenizer is named" in capsys.readouterr().err


def test_the_snippet_of_the_model_card_loads_a_merged_model_and_answers(
    declared_merge: MergedModel, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(declared_merge.output)
    code = Path("README.md").read_text().partition("```python\n")[2].partition("```")[0]
    # 200 tokens of a tiny model would be a minute of the test
    exec(compile(code.replace("max_new_tokens=200", "max_new_tokens=2"), "README.md", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")

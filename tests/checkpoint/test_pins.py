"""Pins, against a Hub on 127.0.0.1: huggingface_hub reads its environment once, so each call is its own process."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hub import Hub, Repository, git_sha1, serve, sha256

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.hub_cache import check_file
from pytest_mistral_lora.checkpoint.pins import check_revision
from pytest_mistral_lora.errors import PinError

REPO = "tiny/mistral"
TOKENIZER = "tokenizer.model.v3"
COMMIT = hashlib.sha1(b"some commit").hexdigest()
CALL = """
import json, sys
from pytest_mistral_lora.checkpoint.pins import resolve
from pytest_mistral_lora.errors import PinError
try:
    print(json.dumps({"folder": str(resolve(*sys.argv[1:3], **json.loads(sys.argv[3])))}))
except PinError as error:
    print(json.dumps({"error": str(error), "found": error.found, "place": error.place, "next_step": error.next_step}))
"""


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32768,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return files | {TOKENIZER: shipped_tokenizer("spm-v3").read_bytes()}


@dataclass
class Place:
    """A hub with one repository of two commits, and a cache."""

    hub: Hub
    home: Path
    repository: Repository
    old: str
    new: str
    environment: dict[str, str] = field(default_factory=dict)

    def resolve(
        self, revision: str, *, repo: str = REPO, offline: bool = False, endpoint: str = "", **options: Any
    ) -> dict[str, str]:
        done = self.run(
            [sys.executable, "-c", CALL, repo, revision, json.dumps({"weights": False} | options)], offline, endpoint
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def fetch(self, revision: str, **options: Any) -> Path:
        answer = self.resolve(revision, **options)
        assert "folder" in answer, answer["error"]
        return Path(answer["folder"])

    def run(self, command: list[str], offline: bool = False, endpoint: str = "") -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        environment |= {
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.home),
            "HF_HOME": str(self.home),
            "HF_ENDPOINT": endpoint or self.hub.url,
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    @property
    def cache(self) -> Path:
        return self.home / "hub" / "models--tiny--mistral"

    def snapshot(self, commit: str) -> Path:
        return self.cache / "snapshots" / commit


@pytest.fixture
def place(tmp_path: Path, model_files: dict[str, bytes]) -> Iterator[Place]:
    repository = Repository()
    old = repository.commit(
        {
            **model_files,
            "consolidated.safetensors": model_files["model.safetensors"],
            "modeling_mistral.py": b"raise SystemExit('this code ran')\n",
            "pytorch_model.bin": pickle.dumps({"weight": 1}),
            "checkpoint-1/model.safetensors": b"another model",
        }
    )
    new = repository.commit({**model_files, TOKENIZER: shipped_tokenizer("spm-v2").read_bytes()})
    hub = Hub({REPO: repository})
    with serve(hub):
        yield Place(hub, tmp_path, repository, old, new)


def relink(link: Path, target: Path) -> None:
    link.unlink()
    link.symlink_to(target)


def test_a_full_lower_case_commit_is_a_pin() -> None:
    assert check_revision(COMMIT) == COMMIT


@pytest.mark.parametrize(
    "revision",
    ["main", "v0.3", "", "refs/pr/1", COMMIT[:7], COMMIT[:39], COMMIT + "0", COMMIT.upper(), COMMIT + "\n"],
)
def test_anything_that_can_move_or_be_misread_is_not_a_pin(revision: str) -> None:
    with pytest.raises(PinError) as caught:
        check_revision(revision, place="recipe.yaml, base.revision")
    assert repr(revision) in caught.value.found
    assert caught.value.place == "recipe.yaml, base.revision"
    assert caught.value.next_step == "Print the newest: mistral-lora pin owner/name"


@pytest.mark.parametrize(
    "revision", ["0" * 40, "f" * 40, "deadbeef" * 5, "0123456789" * 4, "0123456789abcdef" * 2 + "01234567"]
)
def test_a_made_up_commit_is_not_a_pin(revision: str) -> None:
    with pytest.raises(PinError, match=f"'{revision}' is a placeholder"):
        check_revision(revision)


def test_without_weights_only_configuration_and_tokenizer_are_fetched(
    place: Place, model_files: dict[str, bytes]
) -> None:
    folder = place.fetch(place.old)
    assert folder == place.snapshot(place.old)
    wanted = {name for name in model_files if not name.endswith(".safetensors")}
    assert {file.name for file in folder.iterdir()} == wanted
    assert {name: (folder / name).read_bytes() for name in wanted} == {name: model_files[name] for name in wanted}
    assert place.hub.requested(TOKENIZER), "the log of requests is what the next line reads"
    assert not [path for path in place.hub.requested("") if path.endswith((".safetensors", ".py", ".bin"))]


def test_with_weights_safetensors_are_fetched_once_and_no_pickle_or_code(
    place: Place, model_files: dict[str, bytes]
) -> None:
    folder = place.fetch(place.old, weights=True, verify=True)
    assert {file.name for file in folder.iterdir()} == set(model_files)
    fetched = {path for path in place.hub.requested("") if "/resolve/" in path}
    assert fetched == {f"/{REPO}/resolve/{place.old}/{name}" for name in model_files}


def test_the_resolved_folder_loads_in_transformers(place: Place, model_files: dict[str, bytes]) -> None:
    import torch
    from safetensors.torch import load
    from transformers import AutoModelForCausalLM

    folder = place.fetch(place.old, weights=True)
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    saved = load(model_files["model.safetensors"])
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items() if name in saved)


def test_a_pin_stays_where_it_is_when_the_branch_moves(place: Place, model_files: dict[str, bytes]) -> None:
    assert place.repository.branches["main"] == place.new
    old, new = (place.fetch(commit) for commit in (place.old, place.new))
    assert (old / TOKENIZER).read_bytes() == model_files[TOKENIZER]
    assert (new / TOKENIZER).read_bytes() == shipped_tokenizer("spm-v2").read_bytes()


def test_the_error_for_a_branch_names_the_commit_it_points_to(place: Place) -> None:
    answer = place.resolve("main", place="recipe.yaml, base.revision")
    assert answer["error"].startswith("recipe.yaml, base.revision: revision 'main' is not a pin")
    assert answer["next_step"] == f"main is {place.new} now; pin that."


def test_offline_the_error_for_a_branch_names_the_commit_it_pointed_to_when_fetched(place: Place) -> None:
    call = "import sys, huggingface_hub as hub; hub.hf_hub_download(sys.argv[1], 'config.json')"
    assert place.run([sys.executable, "-c", call, REPO]).returncode == 0
    assert f"main was {place.new} when it was last fetched" in place.resolve("main", offline=True)["next_step"]
    (place.home / "secret").write_text(COMMIT)
    assert COMMIT not in place.resolve("../../../secret", offline=True)["next_step"]


def test_an_absent_revision_is_an_error_that_names_the_newest(place: Place) -> None:
    answer = place.resolve(COMMIT)
    assert answer["found"] == f"{REPO} has no commit {COMMIT}"
    assert place.new in answer["next_step"]


def test_an_absent_repository_is_an_error(place: Place) -> None:
    answer = place.resolve(COMMIT, repo="tiny/absent")
    assert answer["found"] == f"no repository at {place.hub.url}/tiny/absent, or a private one"
    assert "HF_TOKEN" in answer["next_step"]


def test_a_name_that_is_no_repository_id_is_an_error(place: Place) -> None:
    assert "is not the id of a Hub repository" in place.resolve(COMMIT, repo="a/b/c")["found"]


def test_a_gated_repository_is_an_error_that_tells_of_the_licence(place: Place) -> None:
    place.repository.gated = True
    answer = place.resolve(place.old)
    assert answer["found"] == f"access to {place.hub.url}/{REPO} is gated"
    assert "Accept its licence" in answer["next_step"]
    assert "hf auth login" in answer["next_step"]


def test_an_unreachable_endpoint_is_an_error_and_the_cache_still_serves(place: Place) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        answer = place.resolve(place.old, endpoint=nobody)
        assert answer["found"].startswith(f"cannot fetch {REPO} from {nobody}: Connect")
        assert "HF_ENDPOINT" in answer["next_step"]
        place.fetch(place.old)
        assert place.fetch(place.old, endpoint=nobody) == place.snapshot(place.old)


def test_offline_an_empty_cache_is_an_error_whose_command_fills_it(place: Place) -> None:
    answer = place.resolve(place.old, offline=True)
    assert "offline mode is on" in answer["found"]
    command = shlex.split(answer["next_step"].removeprefix("Fetch it once: "))
    assert command[0] == "HF_HUB_OFFLINE=0"
    done = place.run(command[1:])
    assert done.returncode == 0, done.stderr
    asked = len(place.hub.requests)
    assert place.fetch(place.old, offline=True) == place.snapshot(place.old)
    assert len(place.hub.requests) == asked


def test_offline_a_cache_without_the_weights_does_not_pass_for_one_with_them(place: Place) -> None:
    place.fetch(place.old)
    answer = place.resolve(place.old, offline=True, weights=True)
    assert "offline mode is on" in answer["found"]
    assert "weights=True" in answer["next_step"]


def test_a_missing_shard_is_named(place: Place, model_files: dict[str, bytes]) -> None:
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    )
    commit = place.repository.commit(
        {
            "config.json": model_files["config.json"],
            "model.safetensors.index.json": index.encode(),
            "model-00001-of-00002.safetensors": model_files["model.safetensors"],
        }
    )
    assert place.resolve(commit, weights=True)["found"].endswith("has no model-00002-of-00002.safetensors")


def test_a_repository_with_nothing_to_use_is_an_error(place: Place) -> None:
    commit = place.repository.commit({"README.md": b"# Nothing\n"})
    assert place.resolve(commit)["found"].endswith("has no configuration or tokenizer file")


@pytest.mark.parametrize("offline", [False, True])
def test_a_cached_file_that_was_edited_is_refused(place: Place, offline: bool) -> None:
    file = place.fetch(place.old) / "config.json"
    blob = file.resolve()
    data = bytearray(blob.read_bytes())
    data[0] ^= 1
    blob.write_bytes(bytes(data))
    answer = place.resolve(place.old, offline=offline)
    assert answer["place"] == str(file)
    assert git_sha1(bytes(data)) in answer["found"]


@pytest.mark.parametrize("offline", [False, True])
def test_a_tokenizer_of_another_commit_is_refused(place: Place, offline: bool) -> None:
    place.fetch(place.new)
    file = place.fetch(place.old) / TOKENIZER
    relink(file, Path(os.path.relpath((place.snapshot(place.new) / TOKENIZER).resolve(), file.parent)))
    keeps_listings = (place.cache / "trees").is_dir()
    answer = place.resolve(place.old, offline=offline)
    if offline and not keeps_listings:
        # huggingface_hub before version 2 notes nowhere which blob a commit's file is
        assert answer == {"folder": str(place.snapshot(place.old))}
    else:
        assert answer["place"] == str(file)
        assert sha256(shipped_tokenizer("spm-v2").read_bytes()) in answer["found"]


def test_the_endpoint_is_believed_before_the_notes_in_the_cache(place: Place, model_files: dict[str, bytes]) -> None:
    place.fetch(place.new)
    file = place.fetch(place.old) / TOKENIZER
    other = (place.snapshot(place.new) / TOKENIZER).resolve()
    relink(file, other)
    for notes in (place.cache / "trees").glob(f"{place.old}.json"):
        notes.write_text(notes.read_text().replace(sha256(model_files[TOKENIZER]), other.name))
    assert place.resolve(place.old)["place"] == str(file)


def test_a_commit_that_the_repository_does_not_have_is_not_served_from_the_cache(place: Place) -> None:
    place.fetch(place.old)
    del place.repository.commits[place.old]
    assert place.resolve(place.old)["found"] == f"{REPO} has no commit {place.old}"


def test_a_file_that_leads_out_of_the_cache_is_refused(place: Place, model_files: dict[str, bytes]) -> None:
    file = place.fetch(place.old) / TOKENIZER
    outside = place.home / sha256(model_files[TOKENIZER])
    outside.write_bytes(model_files[TOKENIZER])
    relink(file, outside)
    answer = place.resolve(place.old, offline=True)
    assert answer["place"] == str(file)
    assert "leads out of the cache" in answer["found"]


def test_a_file_that_the_commit_does_not_have_is_refused(place: Place) -> None:
    folder = place.fetch(place.old)
    (folder / "tokenizer.json").write_text("{}")
    answer = place.resolve(place.old)
    assert answer["place"] == str(folder / "tokenizer.json")
    assert "has no such file" in answer["found"]


def test_weights_are_hashed_only_when_asked(place: Place) -> None:
    file = place.fetch(place.old, weights=True) / "model.safetensors"
    blob = file.resolve()
    blob.write_bytes(bytes(reversed(blob.read_bytes())))
    place.fetch(place.old, weights=True, offline=True)
    assert place.resolve(place.old, weights=True, offline=True, verify=True)["place"] == str(file)


def test_a_file_damaged_on_the_way_is_refused(place: Place) -> None:
    place.hub.corrupted.add("config.json")
    assert place.resolve(place.old)["place"] == str(place.snapshot(place.old) / "config.json")


def test_a_cache_without_links_is_judged_by_the_listing(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    file = folder / "config.json"
    file.write_text("{}")
    check_file(file, folder, {"config.json": git_sha1(b"{}")}, content=True)
    with pytest.raises(PinError, match="not the file of commit"):
        check_file(file, folder, {"config.json": git_sha1(b"{ }")}, content=True)

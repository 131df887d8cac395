"""Signatures by the real model-signing, with keys that are made here: no network is asked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora import cli
from pytest_mistral_lora.cli import manifests as verb
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.signature import Signature


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """A folder with a file, its signature, and two key pairs: the author's and another one."""
    signing = pytest.importorskip("model_signing.signing", reason="model-signing cannot be imported")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    for name in ("author", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        form = serialization.PrivateFormat.TraditionalOpenSSL
        private = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        kind = serialization.PublicFormat.SubjectPublicKeyInfo
        (tmp_path / f"{name}.pem").write_bytes(private)
        (tmp_path / f"{name}.pub").write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, kind))
    folder = tmp_path / "lora-out"
    folder.mkdir()
    write_json(folder / "manifest.json", {"seed": 0})
    signing.Config().use_elliptic_key_signer(private_key=tmp_path / "author.pem").sign(folder, tmp_path / "author.sig")
    return tmp_path


def test_the_author_of_an_unchanged_folder_is_proven(signed: Path) -> None:
    fact = Signature(signed / "author.sig", signed / "author.pub").verify(signed / "lora-out")
    assert (fact.state, fact.found) == ("match", f"by {signed / 'author.pub'}")


def test_another_author_another_folder_and_another_signature_are_not(signed: Path) -> None:
    folder, signature = signed / "lora-out", signed / "author.sig"
    assert Signature(signature, signed / "other.pub").verify(folder).state == "mismatch"
    changed = json.loads(signature.read_text())
    payload = changed["dsseEnvelope"]["payload"]
    changed["dsseEnvelope"]["payload"] = payload[:40] + ("A" if payload[40] != "A" else "B") + payload[41:]
    for name, text in (("changed.sig", json.dumps(changed)), ("no.sig", "{"), ("empty.sig", "")):
        (signed / name).write_text(text)
        assert Signature(signed / name, signed / "author.pub").verify(folder).state == "mismatch", name
    more = Path(shutil.copytree(folder, signed / "more"))
    (more / "later.txt").write_text("later")
    assert "later.txt" in Signature(signature, signed / "author.pub").verify(more).found
    write_json(folder / "manifest.json", {"seed": 1})
    fact = Signature(signature, signed / "author.pub").verify(folder)
    assert fact.state == "mismatch"
    assert "Hash mismatch" in fact.found
    assert "manifest.json" in fact.found


def test_a_key_that_is_none_is_bad_input(signed: Path) -> None:
    with pytest.raises(InputError, match=r"author\.sig: cannot be used"):
        Signature(signed / "author.sig", signed / "author.sig").verify(signed / "lora-out")


@pytest.mark.parametrize(
    "named", [{}, {"identity": "me"}, {"issuer": "x"}, {"public_key": Path("k"), "identity": "me"}]
)
def test_a_signature_without_an_author_proves_nothing(tmp_path: Path, named: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="either --public-key FILE, or --identity WHO and --issuer URL"):
        Signature(tmp_path / "a.sig", **named).verify(tmp_path)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.sig: no such file"):
        Signature(tmp_path / "a.sig", tmp_path / "author.pub").verify(tmp_path)


def test_without_the_library_the_error_names_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for name in ("a.sig", "author.pub"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"pip install 'pytest-mistral-lora\[signing\]'"):
        Signature(tmp_path / "a.sig", tmp_path / "author.pub").verify(tmp_path)


def test_an_author_without_a_signature_is_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tmp_path), "--public-key", "author.pub"]) == 2
    assert "--signature: an author " in capsys.readouterr().err


def test_the_commands_of_the_page_sign_and_verify(
    signed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sign", "key", "lora-out", "--private_key", "author.pem", "--signature", "lora-out.sig"]
    subprocess.run([sys.executable, "-m", "model_signing", *words], cwd=signed, check=True, capture_output=True)
    monkeypatch.chdir(signed)
    monkeypatch.setattr("pytest_mistral_lora.records.verify.verify", lambda *given, **named: [])
    words = ["verify", "lora-out", "--signature", "lora-out.sig", "--public-key", "author.pub"]
    assert cli.main(words) == 0
    verdict = "no difference: 1 match, 0 mismatch, 0 not available"
    assert capsys.readouterr() == (f"match          signature: by author.pub\n{verdict}\n", "")
    (signed / "lora-out" / "manifest.json").write_text("{}")
    assert cli.main(words) == 1
    assert capsys.readouterr().out.startswith("mismatch       signature: not by author.pub, ")


def test_without_a_signature_the_report_ends_with_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pytest_mistral_lora.records.verify.verify", lambda *given, **named: [])
    assert cli.main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().err == verb._NOT_SIGNED

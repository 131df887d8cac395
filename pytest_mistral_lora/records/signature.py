"""Signatures of a folder, made and verified by OpenSSF's model-signing: they prove who wrote a record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.errors import InputError, one_line
from pytest_mistral_lora.extras import require_extra
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.verify import FieldCheck

SIGNATURE = "signature"
"""Name of the result of `Signature.verify`."""


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature, and its expected author: either a key, or an identity that Sigstore knows.

    Attributes:
        file: The signature, a Sigstore bundle.
        public_key: The public key of its author, an elliptic-curve key in PEM.
        identity: Its author's identity, such as an e-mail address.
        issuer: The OpenID Connect provider of the identity, as a URL.
    """

    file: Path
    public_key: Path | None = None
    identity: str = ""
    issuer: str = ""

    def verify(self, folder: Path) -> FieldCheck:
        """Compare a folder with the signature: `match` if this author signed exactly these files.

        Raises:
            InputError: If model-signing is not installed, no author is named, or one of the files cannot be read.
        """
        verifier, author = self._verifier()
        try:
            verifier.verify(folder, self.file)
        except (
            Exception
        ) as error:  # an error of the library, of cryptography or of sigstore: each means that nothing is proven
            reason = one_line(error) or type(error).__name__
            return FieldCheck(SIGNATURE, "mismatch", author, f"not by {author}, or not of these files: {reason}")
        return FieldCheck(SIGNATURE, "match", author, f"by {author}", Place.of(self.file))

    def _verifier(self) -> tuple[Any, str]:
        """Return model-signing's verifier, and the author that it expects."""
        if bool(self.public_key) == bool(self.identity) or bool(self.identity) != bool(self.issuer):
            raise InputError(
                "a signature proves nothing without its author",
                place="--signature",
                expected="either --public-key FILE, or --identity WHO and --issuer URL",
            )
        for file in (self.file, *([self.public_key] if self.public_key else [])):
            if not file.is_file():
                raise InputError("no such file", place=str(file))
        require_extra("signing")
        from model_signing import verifying

        try:
            if self.public_key:
                # the constructor reads the key
                return verifying.Config().use_elliptic_key_verifier(public_key=self.public_key), str(self.public_key)
            verifier = verifying.Config().use_sigstore_verifier(identity=self.identity, oidc_issuer=self.issuer)
            return verifier, f"{self.identity} ({self.issuer})"
        except Exception as error:  # a key of another kind, or no network to fetch Sigstore's keys
            place = Place.of(self.public_key or "--identity")
            raise InputError(
                f"cannot be used: {one_line(error)}",
                place=place,
                expected="a public key in PEM, such as a P-256 key" if self.public_key else "",
            ) from error

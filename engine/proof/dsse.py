"""Envelopes of DSSE (https://github.com/secure-systems-lab/dsse), version 1, with ed25519 signatures or none.

What is signed is the pre-authentication encoding of the payload, not its base64 form. Signing and verifying use the
package `cryptography`, which the extra `receipts` installs; reading an envelope does not need it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from sempre.engine.proof.json_values import canonical_json
from sempre.ipc.errors import ConfigError

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_KEY_BYTES = 65_536
_KEY_ID_DIGITS = 16


class Signer(Protocol):
    """A private key."""

    key_id: str

    def sign(self, data: bytes) -> bytes:
        """Return the signature of `data`."""


class Verifier(Protocol):
    """A public key."""

    key_id: str

    def is_valid(self, signature: bytes, data: bytes) -> bool:
        """Whether `signature` is this key's of `data`."""


def envelope(payload: bytes, signer: Signer | None = None) -> bytes:
    """Return the envelope of a statement as canonical JSON; without a signer its list of signatures is empty."""
    signatures = []
    if signer is not None:
        signature = base64.b64encode(signer.sign(pre_authentication_encoding(payload))).decode()
        signatures.append({"keyid": signer.key_id, "sig": signature})
    text = base64.b64encode(payload).decode()
    return canonical_json({"payload": text, "payloadType": PAYLOAD_TYPE, "signatures": signatures})


def pre_authentication_encoding(payload: bytes) -> bytes:
    """Return the bytes that a signature covers."""
    return b"DSSEv1 %d %b %d %b" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def payload_of(document: dict[str, Any]) -> bytes:
    """Return an envelope's payload. Raises ValueError that names the field."""
    kind = document.get("payloadType")
    if kind != PAYLOAD_TYPE:
        raise ValueError(f"payloadType: expected {PAYLOAD_TYPE!r}, found {kind!r}")
    try:
        return base64.b64decode(document.get("payload", ""), validate=True)
    except (TypeError, binascii.Error) as error:
        raise ValueError(f"payload: expected base64, found something else ({error})") from None


def check_signatures(document: dict[str, Any], payload: bytes, keys: Sequence[Verifier]) -> None:
    """Raise ValueError unless one of `keys` signed the payload."""
    found = document.get("signatures")
    signatures = [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    if not signatures:
        raise ValueError("signatures: expected one of the given keys, found none: the receipt is not signed")
    data = pre_authentication_encoding(payload)
    for each in signatures:
        try:
            signature = base64.b64decode(each.get("sig", ""), validate=True)
        except (TypeError, binascii.Error):
            continue
        if any(key.is_valid(signature, data) for key in keys):
            return
    named = ", ".join(repr(each.get("keyid")) for each in signatures)
    wanted = ", ".join(key.key_id for key in keys)
    raise ValueError(f"signatures: expected one of key {wanted}, found none that is valid (of key {named})")


def load_signer(path: Path) -> Signer:
    """Return the private key of a PEM file (`openssl genpkey -algorithm ed25519`). Raises ConfigError."""
    serialization, ed25519 = _library()
    try:
        key = serialization.load_pem_private_key(_key_file(path), password=None)
    except (ValueError, TypeError) as error:
        raise _unusable(path, "an unencrypted private key", error) from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise _unusable(path, "an ed25519 private key", type(key).__name__)
    return _Key(key.public_key(), key)


def load_verifier(path: Path) -> Verifier:
    """Return the public key of a PEM file, or that of a private key. Raises ConfigError."""
    serialization, ed25519 = _library()
    text = _key_file(path)
    if b"PRIVATE KEY" in text:
        return cast(Verifier, load_signer(path))
    try:
        key = serialization.load_pem_public_key(text)
    except (ValueError, TypeError) as error:
        raise _unusable(path, "a public key", error) from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise _unusable(path, "an ed25519 public key", type(key).__name__)
    return _Key(key)


class _Key:
    def __init__(self, public: Any, private: Any = None) -> None:
        self._public, self._private = public, private
        self.key_id = hashlib.sha256(public.public_bytes_raw()).hexdigest()[:_KEY_ID_DIGITS]

    def sign(self, data: bytes) -> bytes:
        return bytes(self._private.sign(data))

    def is_valid(self, signature: bytes, data: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature

        try:
            self._public.verify(signature, data)
        except InvalidSignature:
            return False
        return True


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ConfigError(
            "signatures of receipts need the package cryptography, which is not installed: pip install"
            " 'sempre[receipts]'",
            parameter="record_key",
        ) from None
    return serialization, ed25519


def _key_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_KEY_BYTES)
    except OSError as error:
        raise ConfigError(f"key file {path}: cannot be read: {error.strerror or error}.", parameter="key") from None


def _unusable(path: Path, expected: str, found: object) -> ConfigError:
    return ConfigError(f"key file {path}: expected {expected} in PEM, found {found}.", parameter="key")

"""Signed receipts: a valid signature is accepted; any other, another key's and none are refused by name."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sempre.engine import LLM, RecordError, SamplingParams
from sempre.engine.proof.dsse import load_signer, load_verifier, pre_authentication_encoding
from sempre.engine.proof.receipt_log import Receipt, read_receipts, receipt_files
from sempre.ipc.errors import ConfigError

pytest.importorskip("cryptography", reason="signatures of receipts need the extra `receipts`")

SETTINGS: dict[str, Any] = {"max_model_len": 128, "num_threads": 1, "multiprocessing": False}


def new_key(folder: Path, name: str, kind: str = "ed25519") -> tuple[Path, Path]:
    """Write a private and a public key in PEM."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ed448, ed25519

    key: Any = {"ed25519": ed25519.Ed25519PrivateKey, "ed448": ed448.Ed448PrivateKey}[kind].generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    pem = form.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, form.PrivateFormat.PKCS8, form.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, form.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A file of two signed receipts, and the keys."""
    folder = tmp_path_factory.mktemp("signed")
    private, public = new_key(folder, "own")
    receipts = folder / "receipts"
    with LLM("tiny", record=str(receipts), record_key=str(private), **SETTINGS) as llm:
        llm.generate(["a", "b"], SamplingParams(max_tokens=2), use_tqdm=False)
    return receipt_files(receipts)[0], private, public


def test_the_key_and_its_private_half_verify(signed: tuple[Path, Path, Path]) -> None:
    path, private, public = signed
    for file in (private, public):
        assert [type(each) for each in read_receipts(path, [load_verifier(file)])] == [Receipt, Receipt]
    document = json.loads(path.read_bytes().splitlines()[0])
    [signature] = document["signatures"]
    data = pre_authentication_encoding(base64.b64decode(document["payload"]))
    assert load_verifier(public).is_valid(base64.b64decode(signature["sig"]), data)
    assert signature["keyid"] == load_verifier(public).key_id == load_signer(private).key_id


def test_a_signed_receipt_has_at_most_130_bytes_more(signed: tuple[Path, Path, Path]) -> None:
    [signature] = json.loads(signed[0].read_bytes().splitlines()[0])["signatures"]
    assert len(json.dumps(signature)) < 140


@pytest.mark.parametrize("what", ["payload", "signature", "other key", "no signature", "no base64"])
def test_what_the_key_did_not_sign(what: str, signed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    path, _, public = signed
    document = json.loads(path.read_bytes().splitlines()[0])
    keys = [load_verifier(public)]
    expected = f"expected one of key {keys[0].key_id}, found none that is valid (of key '{keys[0].key_id}')"
    if what == "payload":
        text = base64.b64decode(document["payload"]).replace(b'"finishedOn":"2', b'"finishedOn":"3')
        document["payload"] = base64.b64encode(text).decode()
    elif what == "signature":
        document["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
    elif what == "no base64":
        document["signatures"][0]["sig"] = "?"
    elif what == "no signature":
        document["signatures"] = []
        expected = "found none: the receipt is not signed"
    else:
        keys = [load_verifier(new_key(tmp_path, "other")[1])]
        expected = f"expected one of key {keys[0].key_id}, found none"
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(document) + "\n")
    [found] = read_receipts(file, keys)
    assert isinstance(found, RecordError)
    assert expected in str(found)
    # without a key, only what contradicts itself is noticed
    assert isinstance(next(read_receipts(file)), Receipt)


def test_other_key_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    wrong = [
        (tmp_path / "text", "expected an unencrypted private key in PEM, found "),
        (new_key(tmp_path, "other", "ed448")[0], "expected an ed25519 private key in PEM, found Ed448PrivateKey"),
        (tmp_path / "absent", "cannot be read: No such file or directory"),
    ]
    for path, message in wrong:
        with pytest.raises(ConfigError, match=re.escape(message)):
            LLM("tiny", record=True, record_key=str(path), **SETTINGS)
    for name, message in (("text", "a public key in PEM"), ("other.pub", "an ed25519 public key in PEM, found Ed448")):
        with pytest.raises(ConfigError, match=message):
            load_verifier(tmp_path / name)

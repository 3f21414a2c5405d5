"""Malicious checkpoints: each is refused by name, at once, and without taking memory."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from worker_settings import worker_config

from sempre.engine.checkpoints import embedded_checkpoint
from sempre.engine.text.chat_template import load_chat_template
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import ConfigError, ModelError
from sempre.ipc.model_files import check_regular, read_json_object, shown
from sempre.workers.layers.linear_kernel import linear_kernel
from sempre.workers.layers.module import Build, parameters
from sempre.workers.loading import load_model
from sempre.workers.models.registry import build_model, load_spec
from sempre.workers.quantization.plain import NotQuantized
from sempre.workers.tensor_source import INDEX_FILE, SINGLE_FILE, open_safetensors

READERS: dict[str, Callable[[Path], object]] = {
    "config.json": load_spec,
    "generation_config.json": load_spec,
    "tokenizer.json": Tokenizer.from_folder,
    "tokenizer_config.json": Tokenizer.from_folder,
    "chat_template.jinja": load_chat_template,
    SINGLE_FILE: lambda folder: open_safetensors(folder).__enter__(),
    INDEX_FILE: lambda folder: open_safetensors(folder).__enter__(),
}
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    source = embedded_checkpoint("tiny")
    assert source is not None
    shutil.copytree(source, folder)
    return folder


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path], None]] = {
    "a FIFO": put_fifo,
    "a socket": put_socket,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_opened(checkpoint: Path, name: str, kind: str) -> None:
    path = checkpoint / name
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    with pytest.raises(ModelError) as refusal:
        READERS[name](checkpoint)
    assert str(refusal.value) == f"{path}: expected a regular file, found {kind}."


def test_a_link_to_a_regular_file_is_one(checkpoint: Path) -> None:
    (checkpoint / "config.json").rename(checkpoint / "blob")
    (checkpoint / "config.json").symlink_to("blob")
    assert load_spec(checkpoint).num_layers > 0


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".json")])
@pytest.mark.parametrize(
    "text",
    [DEEP, "[" * 100_000, '{"a": ' + "9" * 10_000 + "}", '{"a": "\\ud800', "[]", "null", "", "\xff\xfe", '{"a": NaN'],
)
def test_hostile_json(checkpoint: Path, name: str, text: str) -> None:
    (checkpoint / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError) as refusal:
        READERS[name](checkpoint)
    assert name in str(refusal.value)
    assert len(str(refusal.value)) < 1000


NUMBERS = [10**9, 2**31, 2**63, 10**400, -1, 0, 0.5, 1e300, "4", True, [], {}, [[[[[1]]]]]]
SIZES = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"]
SIZES += ["vocab_size", "head_dim", "max_position_embeddings"]
OTHERS = ["rms_norm_eps", "rope_theta", "initializer_range", "eos_token_id", "rope_scaling", "rope_parameters"]
OTHERS += ["sliding_window", "layer_types", "quantization_config", "architectures", "torch_dtype", "hidden_act"]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: repr(value)[:12])
def test_sizes_are_bounded_before_anything_is_done(checkpoint: Path, name: str, value: object) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ModelError, match=rf"config.json: {name}: expected .*, found ") as refusal:
        load_spec(checkpoint)
    assert len(str(refusal.value)) < 500


def test_other_fields_never_do_more_than_be_refused(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    refused = 0
    for name in OTHERS:
        for value in [*NUMBERS, [10**9] * 100_000, {"a": 1}, {"rope_type": "llama3", "factor": 10**400}]:
            path.write_text(json.dumps({**config, name: value}))
            try:
                load_spec(checkpoint)
            except ModelError as error:
                refused += 1
                text = str(error)
                if len(text) > 3000:
                    pytest.fail(text[:200])
    assert refused > 100


def test_memory_stays_free_and_no_layer_is_made(checkpoint: Path) -> None:
    """A checkpoint that claims a billion layers, in a process that may take two GiB."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 10**9}))
    program = (
        "import pathlib, sys; from sempre.workers.models import registry; registry.load_spec(pathlib.Path(sys.argv[1]))"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))

    done = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint)], preexec_fn=limit, capture_output=True, text=True
    )
    assert "num_hidden_layers: expected an integer of at most 1024, found 1000000000" in done.stderr


HUGE = {"hidden_size": 2**14, "intermediate_size": 2**16, "num_hidden_layers": 200, "num_attention_heads": 256}


@pytest.mark.parametrize("load_format", ["dummy", "safetensors"])
def test_weights_that_fit_nowhere_are_refused_before_one_is_made(checkpoint: Path, load_format: str) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **HUGE, "num_key_value_heads": 256, "head_dim": 128}))
    spec = load_spec(checkpoint)
    if load_format == "safetensors":
        model = build_model(Build(linear_kernel("invariant"), NotQuantized()), spec)
        tensors, end = {}, 0
        for name, parameter in parameters(model).items():
            begin, end = end, end + 2 * math.prod(parameter.shape)
            tensors[name] = {"dtype": "BF16", "shape": parameter.shape, "data_offsets": [begin, end]}
        with (checkpoint / SINGLE_FILE).open("wb") as file:
            file.write(header(**tensors))
            file.truncate(file.tell() + end)  # a hole: nothing is stored
    # a file of that size cannot even be mapped on many machines
    expected = r"expected weights that fit into the \d+ bytes of free memory|cannot be opened as .* unable to mmap"
    with pytest.raises(ModelError, match=expected):
        load_model(worker_config(checkpoint, load_format=load_format), spec, linear_kernel("invariant"))


def header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


HEADERS = {
    "a length beyond the file": (2**60).to_bytes(8, "little") + b"{}",
    "no length": b"\x01",
    "empty": b"",
    "no JSON": (4).to_bytes(8, "little") + b"\xff\xff\xff\xff",
    "nested": len(DEEP).to_bytes(8, "little") + DEEP.encode(),
    "offsets beyond the file": header(a={"dtype": "F32", "shape": [4], "data_offsets": [0, 10**15]}),
    "offsets that go back": header(a={"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}) + b"\0" * 16,
    "a shape beyond its bytes": header(a={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}) + b"\0" * 16,
    "a shape that overflows": header(a={"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 0]}),
    "a negative shape": header(a={"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}) + b"\0" * 4,
    "an unknown dtype": header(a={"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}) + b"\0" * 4,
    "a hole": header(a={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}) + b"\0" * 8,
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors_that_lie(checkpoint: Path, name: str) -> None:
    (checkpoint / SINGLE_FILE).write_bytes(HEADERS[name])
    with pytest.raises(ModelError, match=SINGLE_FILE), open_safetensors(checkpoint):
        pytest.fail("opened")


@pytest.mark.parametrize(
    "entries", [{"a": "../a"}, {"a": "/dev/zero"}, {"a": 5}, {"a": ""}, [], {"a": "missing.safetensors"}]
)
def test_an_index_names_files_of_its_folder(checkpoint: Path, entries: object) -> None:
    (checkpoint / INDEX_FILE).write_text(json.dumps({"weight_map": entries}))
    with pytest.raises(ModelError) as refusal, open_safetensors(checkpoint):
        pytest.fail("opened")
    assert str(checkpoint) in str(refusal.value)


def mutate(checkpoint: Path, seed: int, runs: int) -> None:
    """Bytes changed in each file: it is read as before, or refused with one of our errors."""
    drawn = random.Random(seed)
    originals = {name: (checkpoint / name).read_bytes() for name in READERS if (checkpoint / name).exists()}
    for _ in range(runs):
        name = drawn.choice(list(originals))
        data = bytearray(originals[name])
        # of the weights only the header decides what is done
        most = min(len(data), 4096)
        for _ in range(drawn.randint(1, 6)):
            at = drawn.randrange(most)
            data[at : at + drawn.choice([0, 1, 1, 8])] = drawn.choice(
                [drawn.randbytes(1), b"[" * 50, b"9" * 20, b'"', b""]
            )
        (checkpoint / name).write_bytes(data)
        with suppress(ModelError, ConfigError):
            READERS[name](checkpoint)
        (checkpoint / name).write_bytes(originals[name])


def test_files_that_nobody_foresaw(checkpoint: Path) -> None:
    mutate(checkpoint, seed=1, runs=150)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_many_files_that_nobody_foresaw(checkpoint: Path, seed: int) -> None:
    mutate(checkpoint, seed=100 + seed, runs=3000)


def test_what_is_shown_is_short() -> None:
    deep: object = 1
    for _ in range(5000):
        deep = [deep]
    for value in (deep, "a" * 10**6, [1] * 10**6, {str(n): n for n in range(10**5)}, 10**4000):
        assert len(shown(value)) < 1000
    assert shown([1, "a", None]) == "[1, 'a', None]"


def test_limits_of_size(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole: nothing is stored
    with pytest.raises(ModelError, match="expected at most"):
        read_json_object(path)
    with pytest.raises(ModelError, match="expected at most 10 bytes"):
        check_regular(path, 10)

"""Frames: anything that arrives either decodes or is refused with the field's name; valid ones come back unchanged."""

from __future__ import annotations

import zlib
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sempre.ipc.channel import Link
from sempre.ipc.codec import HEADER_BYTES, MAGIC, FrameDecoder, FrameEncoder
from sempre.ipc.errors import FrameLost, MessageMalformed, MessageTooLarge, ProtocolError
from sempre.ipc.messages import (
    AddRequests,
    ClientCommand,
    ClientEvent,
    Heartbeat,
    LoadModel,
    LogprobRows,
    OutputsReady,
    RequestOutputDelta,
    RequestSpec,
    SampledTokens,
    SamplingSpec,
    StepResult,
    WorkerCommand,
    WorkerConfig,
    WorkerEvent,
)

LIMIT = 1 << 16
ENCODER = FrameEncoder(LIMIT)
WORKER_EVENTS: FrameDecoder[WorkerEvent] = FrameDecoder(WorkerEvent, LIMIT)
WORKER_COMMANDS: FrameDecoder[WorkerCommand] = FrameDecoder(WorkerCommand, LIMIT)
CLIENT_COMMANDS: FrameDecoder[ClientCommand] = FrameDecoder(ClientCommand, LIMIT)

ROWS = LogprobRows(num_rows=1, width=1, token_ids=b"\1\0\0\0", logprobs=b"\0\0\x80\xbf", ranks=b"\1\0\0\0")
STEP_RESULT = StepResult(
    rank=1,
    step_id=2**63,
    sampled=[SampledTokens(request_id="a"), SampledTokens(request_id="ü", token_ids=[7, 0], logprobs=ROWS)],
)
ADD_REQUESTS = AddRequests(
    requests=[
        RequestSpec(
            request_id="r",
            prompt_token_ids=[1, 2, 3],
            params=SamplingSpec(max_tokens=3, logit_bias={5: -1.5}, bad_words_token_ids=[[1], [2, 3]]),
            seed=2**64 - 1,
            ordinal=0,
            cache_salt="s",
        )
    ]
)


def seal(payload: bytes, sequence: int = 1) -> bytes:
    """A frame with a valid header and any payload."""
    checked = sequence.to_bytes(8, "little") + payload
    return MAGIC + zlib.crc32(checked).to_bytes(4, "little") + checked


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(frame: bytes) -> None:
    with pytest.raises(MessageMalformed):
        WORKER_EVENTS.decode(frame)


@given(st.binary(max_size=200))
def test_arbitrary_payloads_decode_or_are_refused(payload: bytes) -> None:
    decodes_or_refuses(WORKER_EVENTS, seal(payload))


@given(st.data())
def test_mutated_payloads_decode_or_are_refused(data: st.DataObject) -> None:
    decoder, message = data.draw(st.sampled_from([(WORKER_EVENTS, STEP_RESULT), (CLIENT_COMMANDS, ADD_REQUESTS)]))
    payload = bytearray(msgspec.msgpack.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    decodes_or_refuses(decoder, seal(bytes(payload)))


def decodes_or_refuses(decoder: FrameDecoder[object], frame: bytes) -> None:  # type: ignore[type-var]
    with suppress(MessageMalformed):
        _, message = decoder.decode(frame)
        assert isinstance(message, msgspec.Struct)


@given(st.integers(0, 10**6))
def test_a_truncated_frame_is_refused(length: int) -> None:
    frame = ENCODER.encode(STEP_RESULT, 1)
    with pytest.raises(MessageMalformed) as refusal:
        WORKER_EVENTS.decode(frame[: length % len(frame)])
    assert refusal.value.field in ("header", "checksum")


@given(st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_is_refused(position: int, bit: int) -> None:
    frame = ENCODER.encode(STEP_RESULT, 1)
    frame[position % len(frame)] ^= 1 << bit
    with pytest.raises(MessageMalformed) as refusal:
        WORKER_EVENTS.decode(frame)
    assert refusal.value.field in ("magic", "checksum")


@pytest.mark.parametrize("position", range(len(MAGIC)))
def test_a_frame_of_another_format_is_refused(position: int) -> None:
    frame = ENCODER.encode(STEP_RESULT, 1)
    frame[position] += 1
    with pytest.raises(MessageMalformed, match="magic: expected"):
        WORKER_EVENTS.decode(frame)


def test_messages_come_back_as_they_were() -> None:
    assert WORKER_EVENTS.decode(ENCODER.encode(STEP_RESULT, 3)) == (3, STEP_RESULT)
    assert CLIENT_COMMANDS.decode(ENCODER.encode(ADD_REQUESTS, 2**64 - 1)) == (2**64 - 1, ADD_REQUESTS)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (["StepResult", -1, 0], "StepResult.rank"),
        (["StepResult", 0], "StepResult.step_id"),
        (["StepResult", 0, 0, [["a"], [1]]], "StepResult.sampled[1].request_id"),
        (["StepResult", 0, 0, [["a", [0, 2**31]]]], "StepResult.sampled[0].token_ids[1]"),
        (["StepResult", 0, 0, [["a", [], [1, 0, b"", b"", b""]]]], "StepResult.sampled[0].logprobs.width"),
        (["StepResult", 0, 0, [["a", [], [1, 1, b""]]]], "StepResult.sampled[0].logprobs.logprobs"),
        (["ModelLoaded", 0, ["a", "b"], 1, 1, 1, 1, [1, 1, 1]], "ModelLoaded.digests_before_load.torch_cpu"),
        (["Refused", ["T", "m", None, "", {"fact": 1.5}]], "Refused.error.facts[…]"),
        (["StepResults", 0, 0], "tag"),
        ([7], "tag"),
        ([], "tag"),
        ({"a": 1}, "$"),
        (None, "$"),
    ],
)
def test_a_refusal_names_the_field(message: object, field: str) -> None:
    with pytest.raises(MessageMalformed) as refusal:
        WORKER_EVENTS.decode(seal(msgspec.msgpack.encode(message)))
    assert refusal.value.field == field
    assert field in str(refusal.value) or field == "$"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"dtype": "int8"}, ".dtype"),
        ({"device": "tpu"}, ".device"),
        ({"load_format": "pickle"}, ".load_format"),
        ({"max_model_len": 0}, ".max_model_len"),
        ({"numerics": "fast"}, ".numerics"),
        ({"role": "guest"}, ".role"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 33}}, ".num_speculative_tokens"),
        ({"tensor_parallel_size": 16}, ".tensor_parallel_size"),
        ({"rank": None}, ".rank"),
    ],
)
def test_a_worker_refuses_settings_out_of_their_ranges(settings: dict[str, object], field: str) -> None:
    config = {"model": "m", "model_path": "/m", "rank": 0, **settings}
    with pytest.raises(MessageMalformed) as refusal:
        WORKER_COMMANDS.decode(seal(msgspec.msgpack.encode(["LoadModel", config])))
    assert refusal.value.field.startswith("LoadModel.config.")
    assert refusal.value.field.endswith(field)


def test_settings_of_the_future_are_ignored() -> None:
    config = {"model": "m", "model_path": "/m", "rank": 1, "setting_of_the_future": 5}
    _, command = WORKER_COMMANDS.decode(seal(msgspec.msgpack.encode(["LoadModel", config])))
    assert command == LoadModel(config=WorkerConfig(model="m", model_path="/m", rank=1))


@pytest.mark.parametrize(
    "payload",
    [
        b"\x94\xafCallMethodReply\x00\x01" + b"\x91" * 100_000,  # nested too deeply
        b"\x91\xdd\xff\xff\xff\xff",  # a list of 4 billion elements that are not there
        b"\xc6\xff\xff\xff\xff",  # 4 GiB of bytes that are not there
        b"\x94\xafCallMethodReply\x00\x01\x81\x80\x01",  # a key that cannot be hashed
        b"\x94\xafCallMethodReply\x00\x01\xa1\xff",  # a string that is not UTF-8
    ],
)
def test_hostile_payloads_are_refused(payload: bytes) -> None:
    decoder: FrameDecoder[WorkerEvent] = FrameDecoder(WorkerEvent, 1 << 20)
    with pytest.raises(MessageMalformed):
        decoder.decode(seal(payload))


def test_size_is_limited_on_both_sides() -> None:
    large = OutputsReady(outputs=[RequestOutputDelta(request_id="x" * LIMIT)])
    with pytest.raises(MessageTooLarge) as refusal:
        ENCODER.encode(large, 1)
    assert refusal.value.limit_bytes == LIMIT
    frame = FrameEncoder(1 << 20).encode(large, 1)
    decoder: FrameDecoder[ClientEvent] = FrameDecoder(ClientEvent, LIMIT)
    with pytest.raises(MessageTooLarge) as refusal:
        decoder.decode(frame)
    assert refusal.value.size_bytes == len(frame)
    # checked before anything is decoded
    with pytest.raises(MessageTooLarge):
        decoder.decode(b"\0" * (LIMIT + 1))


def new_link() -> Link[WorkerEvent]:
    return Link(ENCODER, WORKER_EVENTS)


def test_a_link_drops_repetitions() -> None:
    sender, receiver = new_link(), new_link()
    first, second = (bytes(sender.pack(Heartbeat(steps_done=n))) for n in (1, 2))
    arrivals = [receiver.unpack([frame]) for frame in (first, first, second, first, second)]
    assert arrivals == [Heartbeat(steps_done=1), None, Heartbeat(steps_done=2), None, None]


def test_a_link_notices_a_lost_frame_and_goes_on() -> None:
    sender, receiver = new_link(), new_link()
    frames = [bytes(sender.pack(Heartbeat(steps_done=n))) for n in range(4)]
    assert receiver.unpack([frames[0]]) == Heartbeat(steps_done=0)
    with pytest.raises(FrameLost) as loss:
        receiver.unpack([frames[2]])
    assert (loss.value.expected, loss.value.found) == (2, 3)
    assert receiver.unpack([frames[3]]) == Heartbeat(steps_done=3)


def test_a_corrupt_frame_counts_as_one() -> None:
    sender, receiver = new_link(), new_link()
    frames = [bytes(sender.pack(Heartbeat(steps_done=n))) for n in range(2)]
    with pytest.raises(MessageMalformed):
        receiver.unpack([frames[0][:-1]])
    assert receiver.unpack([frames[1]]) == Heartbeat(steps_done=1)


def test_more_than_one_part_is_refused() -> None:
    frame = bytes(ENCODER.encode(Heartbeat(), 1))
    with pytest.raises(ProtocolError, match="parts: expected 1 part, found 2"):
        new_link().unpack([frame, frame])


def test_the_header_is_sixteen_bytes() -> None:
    assert HEADER_BYTES == 16
    assert bytes(ENCODER.encode(Heartbeat(), 1)) == seal(msgspec.msgpack.encode(Heartbeat()))

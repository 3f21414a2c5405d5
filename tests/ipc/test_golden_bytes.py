"""The bytes of every message, one example each: a change here is a change of the protocol.

Appending a field with a default lengthens a message and is compatible; anything else needs a new PROTOCOL_VERSION.
"""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from sempre.ipc import messages as m
from sempre.ipc.key_pairs import KeyPair, WorkerKeys

DIGESTS = m.RngDigests(python_random="p", numpy_random="n", torch_cpu="t")
ROWS = m.LogprobRows(num_rows=1, width=1, token_ids=b"\1\0\0\0", logprobs=b"\0\0\x80\xbf", ranks=b"\1\0\0\0")
ERROR = m.ErrorInfo(type="T", message="m", rank=1, facts={"a": 1, "b": None})
PARAMS = m.SamplingSpec(max_tokens=4, logit_bias={7: 0.5}, bad_words_token_ids=[[1, 2]])
FACTS = m.NodeFacts(host="h", address="10.0.0.2", num_cores=8, versions={"torch": "2"}, clock_s=0.5)
ADAPTER = m.AdapterSpec(name="a", path="/a", digest="0f")
SPEC = m.RequestSpec(
    request_id="r",
    prompt_token_ids=[1, 300],
    params=PARAMS,
    seed=2**64 - 1,
    ordinal=0,
    adapter=ADAPTER,
    tenant=m.TenantSpec(name="t", weight=2),
)
DELTA = m.RequestOutputDelta(request_id="r", token_ids=[5], logprobs=ROWS, finish_reason="stop", stop_reason=5)

EXAMPLES: list[m.Message] = [
    m.ClientHello(protocol_version=1, pid=2),
    m.AddRequests(requests=[SPEC]),
    m.AbortRequests(request_ids=["r"]),
    m.PauseRequests(request_ids=["r"]),
    m.ResumeRequests(request_ids=["r"]),
    m.FramesRead(sequence=300),
    m.CallWorkers(call_id=1, method="ping", args=[1], kwargs={"k": None}),
    m.ResetPrefixCache(call_id=1),
    m.UpdateWeights(call_id=1, path="/w"),
    m.SleepEngine(call_id=1, tags=["scheduling", "kv_cache"], mode="keep", clear_cache=True),
    m.WakeEngine(call_id=1, tags=["weights"]),
    m.GetSleepState(call_id=1),
    m.GetMetrics(call_id=1),
    m.GetHealth(call_id=1),
    m.AdmitClient(pid=2),
    m.DropClient(pid=300),
    m.ShutdownEngine(),
    m.Heartbeat(rank=0, steps_done=3),
    m.Refused(error=ERROR),
    m.StartupProgress(phase="load", seconds=0.5, compile_seconds=0.25),
    m.EngineReady(
        vocab_size=10,
        max_model_len=20,
        eos_token_ids=[2],
        num_blocks=3,
        block_size=16,
        world_size=1,
        fingerprint={"a": "b"},
        worker_pids=[9],
        pooling=m.PoolingModel(task="embed", kind="LAST", width=8, dimensions=[4]),
        kv_block_bytes=6144,
    ),
    m.EngineNotice(message="m"),
    m.OutputsReady(outputs=[DELTA]),
    m.CallWorkersReply(call_id=1, results=["pong"]),
    m.ResetPrefixCacheReply(call_id=1, done=True),
    m.UpdateWeightsReply(call_id=1, fingerprint={"a": "b"}),
    m.SleepReply(call_id=1, tags=["scheduling"]),
    m.MetricsReply(call_id=1, values={"a": 1.0, "b": [1.0], "c": {"d": 1.0}}),
    m.HealthReply(
        call_id=1,
        workers=[m.WorkerHealth(rank=0, pid=9, state="ready", heartbeat_age_s=0.5)],
        stalled=[m.StalledRequests(rank=0, num_requests=2, request_id="a", age_s=0.5)],
    ),
    m.WorkerStateChanged(rank=0, state="restarting", pid=9, error=ERROR),
    m.EngineFailed(error=ERROR),
    m.LoadModel(config=m.WorkerConfig(rank=0, model="m", model_path="/m", max_num_seqs=4)),
    m.StartServing(num_blocks=3),
    m.ExecuteStep(
        step_id=1,
        finished_request_ids=["q"],
        new_requests=[
            m.NewRequest(request_id="r", token_ids=[1, 2], num_prompt_tokens=2, seed=0, params=PARAMS, adapter=ADAPTER)
        ],
        scheduled=[
            m.ScheduledRequest(request_id="r", num_computed_tokens=0, num_tokens=2, block_table_start=0, block_ids=[4])
        ],
        drafts=[m.DraftRequest(request_id="r", token_ids=[5], num_drafts=2)],
    ),
    m.CallMethod(call_id=1, method="ping"),
    m.ShutdownWorker(),
    m.WorkerHello(protocol_version=1, rank=0, pid=2, versions={"torch": "2"}),
    m.ModelLoaded(
        rank=0,
        digests_before_load=DIGESTS,
        vocab_size=10,
        max_model_len=20,
        kv_block_bytes=64,
        available_kv_blocks=3,
        costs=m.StepCosts(step=0.5, row=0.25, result=0.125),
    ),
    m.WorkerReady(rank=0, digests_after_warm_up=DIGESTS),
    m.StepResult(
        rank=0,
        step_id=1,
        sampled=[m.SampledTokens(request_id="r", token_ids=[5], logprobs=ROWS)],
        drafts=[[5, 6], []],
    ),
    m.CallMethodReply(rank=0, call_id=1, result={"a": [1, 2.5, None, True]}),
    m.WorkerFailed(rank=0, error=ERROR),
    m.NodeHello(protocol_version=1, pid=2, node_rank=1, nnodes=2, world_size=4, facts=FACTS, model_path="/m"),
    m.StartWorker(
        rank=2,
        start=0,
        name="worker 2",
        device="cpu",
        device_index=0,
        num_threads=1,
        heartbeat_interval_s=0.5,
        max_message_bytes=65536,
        hub_address="tcp://10.0.0.1:5",
        keys=WorkerKeys(own=KeyPair(public="p", secret="s"), hub="h", peers={0: "q"}),
    ),
    m.KillWorker(rank=2, start=0),
    m.EndNode(error=ERROR),
    m.WorkerStarted(rank=2, start=0, pid=9),
    m.WorkerExited(rank=2, start=0, exitcode=-9, ending="killed by SIGKILL", log_tail="l"),
]

GOLDEN = {
    "ClientHello": "93ab436c69656e7448656c6c6f0102",
    "AddRequests": """
        92ab4164645265717565737473919ca1729201cd012cdc00140400cb3ff0000000000000cb3ff000000000000000cb00
        00000000000000cb0000000000000000cb0000000000000000cb3ff00000000000008107cb3fe0000000000000c09192
        01029090c0c0c0c090c0cfffffffffffffffff0000c09000c093a161a22f61a2306692a17402
    """,
    "AbortRequests": "93ad41626f7274526571756573747391a172a561626f7274",
    "PauseRequests": "92ad5061757365526571756573747391a172",
    "ResumeRequests": "92ae526573756d65526571756573747391a172",
    "FramesRead": "92aa4672616d657352656164cd012c",
    "CallWorkers": "95ab43616c6c576f726b65727301a470696e67910181a16bc0",
    "ResetPrefixCache": "92b05265736574507265666978436163686501",
    "SleepEngine": "95ab536c656570456e67696e650192aa7363686564756c696e67a86b765f6361636865a46b656570c3",
    "WakeEngine": "93aa57616b65456e67696e650191a777656967687473",
    "GetSleepState": "92ad476574536c656570537461746501",
    "SleepReply": "94aa536c6565705265706c790191aa7363686564756c696e67c0",
    "GetMetrics": "92aa4765744d65747269637301",
    "GetHealth": "92a94765744865616c746801",
    "AdmitClient": "92ab41646d6974436c69656e7402",
    "DropClient": "92aa44726f70436c69656e74cd012c",
    "ShutdownEngine": "91ae53687574646f776e456e67696e65",
    "Heartbeat": "95a94865617274626561740003c0a0",
    "Refused": "92a75265667573656495a154a16d01a082a16101a162c0",
    "StartupProgress": "94af5374617274757050726f6772657373a46c6f6164cb3fe0000000000000cb3fd0000000000000",
    "EngineReady": """
        9fab456e67696e6552656164790a14910203100181a161a16280910990cd0800cc809aa5656d626564a44c41535408c3
        c291049080c0a6636f73696e65cd1800
    """,
    "EngineNotice": "92ac456e67696e654e6f74696365a16d",
    "OutputsReady": """
        92ac4f7574707574735265616479919aa1729105970101c40401000000c404000080bfc40401000000c400c400c0a473
        746f700500c0c0c0
    """,
    "CallWorkersReply": "94b043616c6c576f726b6572735265706c790191a4706f6e67c0",
    "UpdateWeights": "93ad5570646174655765696768747301a22f77",
    "UpdateWeightsReply": "94b2557064617465576569676874735265706c790181a161a162c0",
    "ResetPrefixCacheReply": "93b5526573657450726566697843616368655265706c7901c3",
    "MetricsReply": """
        93ac4d6574726963735265706c790183a161cb3ff0000000000000a16291cb3ff0000000000000a16381a164cb3ff000
        0000000000
    """,
    "HealthReply": """
        95ab4865616c74685265706c7901919f0009a57265616479cb3fe0000000000000c0c000a0a6746172676574a0c0a0c0
        a0a091940002a161cb3fe000000000000090
    """,
    "WorkerStateChanged": """
        95b2576f726b657253746174654368616e67656400aa72657374617274696e670995a154a16d01a082a16101a162c0
    """,
    "EngineFailed": "92ac456e67696e654661696c656495a154a16d01a082a16101a162c0",
    "LoadModel": """
        93a94c6f61644d6f64656cde0004a56d6f64656ca16daa6d6f64656c5f70617468a22f6dac6d61785f6e756d5f736571
        7304a472616e6b0080
    """,
    "StartServing": "93ac537461727453657276696e670300",
    "ExecuteStep": """
        96ab45786563757465537465700191a1719197a1729201020200dc00140400cb3ff0000000000000cb3ff00000000000
        0000cb0000000000000000cb0000000000000000cb0000000000000000cb3ff00000000000008107cb3fe00000000000
        00c0919201029090c0c0c0c090c0c093a161a22f61a230669199a17200020091040090ff909193a172910502
    """,
    "CallMethod": "95aa43616c6c4d6574686f6401a470696e679080",
    "ShutdownWorker": "91ae53687574646f776e576f726b6572",
    "WorkerHello": "97ab576f726b657248656c6c6f01000281a5746f726368a132a0a0",
    "ModelLoaded": """
        dc0015ab4d6f64656c4c6f616465640094a170a16ea174a00a14400394cb3fe0000000000000cb3fd0000000000000cb
        3fc0000000000000cb00000000000000009080800110cd0800c0cb0000000000000000cc800000c0c0
    """,
    "WorkerReady": "95ab576f726b657252656164790094a170a16ea174a08080",
    "StepResult": """
        95aa53746570526573756c7400019198a1729105970101c40401000000c404000080bfc40401000000c400c400c0c0c0
        c400c4009292050690
    """,
    "CallMethodReply": "95af43616c6c4d6574686f645265706c79000181a1619401cb4004000000000000c0c3c0",
    "WorkerFailed": "93ac576f726b65724661696c65640095a154a16d01a082a16101a162c0",
    "NodeHello": """
        99a94e6f646548656c6c6f010201020495a168a831302e302e302e320881a5746f726368a132cb3fe0000000000000a2
        2f6dc0
    """,
    "StartWorker": """
        9cab5374617274576f726b65720200a8776f726b65722032a36370750001cb3fe0000000000000ce00010000b0746370
        3a2f2f31302e302e302e313a359392a170a173a1688100a171c2
    """,
    "KillWorker": "93aa4b696c6c576f726b65720200",
    "EndNode": "92a7456e644e6f646595a154a16d01a082a16101a162c0",
    "WorkerStarted": "94ad576f726b657253746172746564020009",
    "WorkerExited": "96ac576f726b65724578697465640200f7b16b696c6c6564206279205349474b494c4ca16c",
}


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_the_bytes_are_the_agreed_ones(message: m.Message) -> None:
    name = type(message).__name__
    data = msgspec.msgpack.encode(message)
    assert data.hex() == "".join(GOLDEN[name].split())
    assert msgspec.msgpack.decode(data, type=type(message)) == message


def test_every_message_has_an_example() -> None:
    unions = (m.ClientCommand, m.ClientEvent, m.WorkerCommand, m.WorkerEvent, m.NodeCommand, m.NodeEvent)
    assert {kind.__name__ for union in unions for kind in get_args(union)} == set(GOLDEN)
    assert {type(message).__name__ for message in EXAMPLES} == set(GOLDEN)


def test_an_appended_field_is_ignored_by_an_older_reader() -> None:
    longer = msgspec.msgpack.encode(["GetMetrics", 1, "a field of the future"])
    assert msgspec.msgpack.decode(longer, type=m.ClientCommand) == m.GetMetrics(call_id=1)


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        m.GetMetrics(call_id=1).call_id = 2  # type: ignore[misc]

"""Of several clients of a coordinator each gets what is its own, and nothing of another's."""

from __future__ import annotations

import pytest

from sempre.engine.coordinator.clients import Clients
from sempre.engine.harness import make_request
from sempre.ipc.errors import MessageMalformed
from sempre.ipc.messages import (
    AbortRequests,
    AddRequests,
    AdmitClient,
    ClientCommand,
    EngineNotice,
    GetMetrics,
    MetricsReply,
    OutputsReady,
    PauseRequests,
    RequestOutputDelta,
    ResumeRequests,
    ShutdownEngine,
    UpdateWeights,
)

OWNER, ONE, TWO = b"owner", b"one", b"two"


def add(*names: str) -> AddRequests:
    return AddRequests(requests=[make_request([3], request_id=name, max_tokens=4) for name in names])


@pytest.fixture
def clients() -> Clients:
    made = Clients(owner_pid=1)
    made.welcome(OWNER, 1)
    for identity, pid in ((ONE, 11), (TWO, 12)):
        made.admit(pid)
        made.welcome(identity, pid)
    return made


def test_only_announced_processes_are_let_in_and_once(clients: Clients) -> None:
    for pid in (1, 11, 13):
        with pytest.raises(MessageMalformed):
            clients.welcome(b"other", pid)
    clients.admit(13)
    clients.drop(13)
    with pytest.raises(MessageMalformed, match=r"expected 1, found 13"):
        clients.welcome(b"other", 13)
    assert b"other" not in clients
    assert clients.others == [ONE, TWO]


def test_outputs_go_to_the_client_whose_requests_they_are(clients: Clients) -> None:
    clients.taken(OWNER, add("o"))
    clients.taken(ONE, add("a", "b"))
    clients.taken(TWO, add("c"))
    deltas = {name: RequestOutputDelta(request_id=name, token_ids=[5]) for name in "caob"}
    assert clients.addressed(OutputsReady(outputs=list(deltas.values()))) == [
        (TWO, OutputsReady(outputs=[deltas["c"]])),
        (ONE, OutputsReady(outputs=[deltas["a"], deltas["b"]])),
        (OWNER, OutputsReady(outputs=[deltas["o"]])),
    ]
    assert clients.addressed(EngineNotice(message="m")) == [(OWNER, EngineNotice(message="m"))]


def test_order_is_that_of_arrival_whichever_client_it_was(clients: Clients) -> None:
    taken = [clients.taken(*each) for each in ((ONE, add("a")), (TWO, add("c", "d")), (ONE, add("b")))]
    ordinals = [spec.ordinal for command in taken if isinstance(command, AddRequests) for spec in command.requests]
    assert ordinals == sorted(set(ordinals))
    assert len(ordinals) == 4


def test_calls_of_equal_number_get_their_own_answers(clients: Clients) -> None:
    numbers = {}
    for identity in (OWNER, TWO, ONE):
        command = clients.taken(identity, GetMetrics(call_id=0))
        assert isinstance(command, GetMetrics)
        numbers[identity] = command.call_id
    for identity in (ONE, OWNER):
        reply = MetricsReply(call_id=numbers[identity], values={})
        assert clients.addressed(reply) == [(identity, MetricsReply(call_id=0, values={}))]
    clients.drop(12)
    assert clients.addressed(MetricsReply(call_id=numbers[TWO], values={})) == []


@pytest.mark.parametrize("command", [AdmitClient(pid=5), ShutdownEngine(), UpdateWeights(call_id=0, path="/w")])
def test_what_concerns_all_is_for_the_owner(clients: Clients, command: ClientCommand) -> None:
    with pytest.raises(MessageMalformed, match="owner of the engine alone"):
        clients.taken(ONE, command)
    clients.taken(OWNER, command)


@pytest.mark.parametrize(
    "command",
    [
        add("new", "a"),
        AbortRequests(request_ids=["a"]),
        PauseRequests(request_ids=["a"]),
        ResumeRequests(request_ids=["a"]),
    ],
)
def test_a_client_cannot_touch_the_requests_of_another(clients: Clients, command: ClientCommand) -> None:
    clients.taken(ONE, add("a"))
    with pytest.raises(MessageMalformed, match="'a' of another"):
        clients.taken(TWO, command)
    clients.taken(ONE, AbortRequests(request_ids=["a", "unknown"]))


def test_a_process_that_has_ended_takes_its_requests_along(clients: Clients) -> None:
    clients.taken(ONE, add("a", "b", "done"))
    clients.taken(TWO, add("c"))
    clients.addressed(OutputsReady(outputs=[RequestOutputDelta(request_id="done", finish_reason="stop")]))
    assert clients.drop(11) == (ONE, AbortRequests(request_ids=["a", "b"]))
    assert clients.drop(11) == (None, AbortRequests(request_ids=[]))
    assert clients.others == [TWO]
    clients.taken(TWO, add("a"))


def test_a_client_that_is_behind_holds_up_its_own_requests_alone(clients: Clients) -> None:
    clients.taken(ONE, add("a", "b"))
    clients.taken(TWO, add("c"))
    clients.taken(ONE, PauseRequests(request_ids=["b"]))
    assert clients.let_go(ONE) is None
    assert clients.hold(ONE) == PauseRequests(request_ids=["a", "b"])
    assert clients.hold(ONE) is None
    clients.taken(ONE, add("d"))
    assert clients.hold(ONE) == PauseRequests(request_ids=["d"])
    assert clients.taken(ONE, ResumeRequests(request_ids=["b"])) == ResumeRequests(request_ids=[])
    clients.taken(ONE, PauseRequests(request_ids=["a"]))
    assert clients.let_go(ONE) == ResumeRequests(request_ids=["b", "d"]), "it has paused the other itself"
    assert clients.let_go(ONE) is None
    assert clients.let_go(TWO) is None

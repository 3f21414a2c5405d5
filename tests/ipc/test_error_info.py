"""Exceptions in transit keep their type, text and facts."""

from __future__ import annotations

import msgspec
import pytest

from sempre.ipc import errors
from sempre.ipc.error_info import describe, restore
from sempre.ipc.messages import ErrorInfo

EXAMPLES = [
    errors.ConfigError("refused", parameter="seed", value=-1),
    errors.RequestError("refused", parameter="n", value="x", request_id="r1"),
    errors.RequestCrashed("again", request_id="r1", num_crashes=3),
    errors.ModelError("unusable"),
    errors.UnknownArchitecture("none", architecture="A"),
    errors.TensorMismatch("no", tensor="w", expected="[2]", found="[3]"),
    errors.InvarianceError("no", operation="linear"),
    errors.SeedMismatch("no", rank=1, expected="a", found="b"),
    errors.ProtocolError("no"),
    errors.MessageMalformed("no", field="tag"),
    errors.MessageTooLarge("no", size_bytes=2, limit_bytes=1),
    errors.FrameLost("no", expected=1, found=2),
    errors.VersionMismatch("no", expected=1, found=2),
    errors.RecordError("no", path="p", line=3),
    errors.ServerError("no", url="http://a", status=503),
    errors.RanksDiffer("no", rank=1, step_id=3, request_id="r1"),
    errors.StartupError("no", rank=0, cause="c"),
    errors.EngineUnhealthy("no", rank=0, cause="c"),
    errors.WorkerDied("no", rank=0, exitcode=-9, cause="c", worker_traceback="t"),
    errors.CoordinatorDied("no", exitcode=1, cause="c"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_the_project_s_errors_come_back_as_they_were(error: errors.SempreError) -> None:
    info = msgspec.msgpack.decode(msgspec.msgpack.encode(describe(error, rank=3)), type=ErrorInfo)
    back = restore(info)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)
    assert info.rank == 3


def test_every_leaf_of_the_tree_is_an_example() -> None:
    def leaves(kind: type[errors.SempreError]) -> set[type]:
        below = kind.__subclasses__()
        return set().union(*map(leaves, below)) if below else {kind}

    assert leaves(errors.SempreError) <= {type(error) for error in EXAMPLES}


def test_other_errors_keep_type_text_and_traceback() -> None:
    try:
        {}["missing"]
    except KeyError as error:
        info = describe(error)
    assert (info.type, info.message) == ("KeyError", "'missing'")
    assert "test_error_info.py" in info.traceback
    assert restore(info) is None


def test_facts_that_have_no_wire_form_are_described() -> None:
    info = describe(errors.ConfigError("refused", parameter="seed", value=1.5))
    assert info.facts == {"parameter": "seed", "value": "1.5"}
    assert describe(errors.ConfigError("refused", value=True)).facts["value"] == "True"
    assert describe(errors.ConfigError("refused", value=2**64)).facts["value"] == str(2**64)

"""Each API key has its limits, its part of the queue, and prefixes of its own in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sempre.engine.server.api_keys import ApiKey, api_keys
from sempre.engine.server.clients import Client, KeyRing
from sempre.engine.server.config import server_config
from sempre.engine.server.errors import BadRequest, RateLimited
from sempre.engine.server.ledger import Ledger
from sempre.ipc.errors import ConfigError


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def client(clock: Clock, **limits: int) -> Client:
    return Client(Ledger(), ApiKey(secret="s", name="n", **limits), None, clock)


def test_requests_beyond_the_rate_are_refused_until_the_bucket_has_filled() -> None:
    clock = Clock()
    caller, free = client(clock, requests_per_minute=3), client(clock)
    for _ in range(3):
        caller.enter()
    with pytest.raises(RateLimited, match=r"3 requests per minute") as refused:
        caller.enter()
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "20")
    clock.now += 19.9
    with pytest.raises(RateLimited):
        caller.enter()
    clock.now += 0.2
    caller.enter()
    assert dict(caller.headers()) == {
        b"x-ratelimit-limit-requests": b"3",
        b"x-ratelimit-remaining-requests": b"0",
        b"x-ratelimit-reset-requests": b"59.900s",
    }
    assert caller.num_refused == 2
    for _ in range(100):
        free.enter()
    assert free.headers() == []


def test_tokens_are_paid_when_known_so_that_no_rate_is_exceeded_in_the_long_run() -> None:
    clock = Clock()
    caller = client(clock, tokens_per_minute=60)
    paid = 0
    began = clock.now
    while clock.now < began + 600:
        try:
            caller.enter()
        except RateLimited as refused:
            clock.now += float(refused.headers["Retry-After"])
            continue
        caller.charge(150)
        paid += 150
    # a minute's worth at the start, and the last request, whose tokens are still to be waited for
    assert 600 <= paid <= 60 + 600 + 150
    assert caller.num_tokens == paid


def test_a_key_leaves_a_part_of_the_places_to_the_others() -> None:
    several = KeyRing([ApiKey(secret=name, name=name) for name in ("a", "b")], Ledger())
    first, second = several.clients
    first.admit(12, 16, 7)
    with pytest.raises(RateLimited, match="12 sequences at a time") as refused:
        first.admit(1, 16, 7)
    assert refused.value.headers["Retry-After"] == "7"
    second.admit(4, 16, 7)
    with pytest.raises(BadRequest, match="asks for 13 sequences"):
        second.admit(13, 16, 7)
    first.release(1)
    first.admit(1, 16, 7)
    [alone] = KeyRing([ApiKey(secret="a", name="a")], Ledger()).clients
    alone.admit(16, 16, 7)
    limited = client(Clock(), max_sequences=2)
    limited.admit(2, 16, 7)
    with pytest.raises(RateLimited):
        limited.admit(1, 16, 7)


@pytest.mark.parametrize(
    ("num_keys", "shares", "salts"),
    [(2, False, ["key 0", "key 0 own", "key 1", "key 1 own"]), (2, True, [None, "own"] * 2), (1, False, [None, "own"])],
)
def test_prompts_of_several_keys_are_kept_apart_unless_they_share(
    num_keys: int, shares: bool, salts: list[str | None]
) -> None:
    keys = [ApiKey(secret=f"secret-{index}", name=f"n{index}") for index in range(num_keys)]
    ring = KeyRing(keys, Ledger(), shares_prefix_cache=shares)
    prompts: list[dict[str, Any]] = [{"prompt": "p"}, {"prompt": "p", "cache_salt": "own"}]
    assert [p.get("cache_salt") for caller in ring.clients for p in caller.salted(prompts)] == salts
    assert ring.anybody.salted(prompts) == prompts


def test_a_line_of_the_file_has_settings_of_its_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n\n  two name=alice weight=3 tokens_per_minute=0 max_sequences=8\n")
    config = server_config({"api_key": ["zero"], "api_key_file": str(path), "tokens_per_minute": 500})
    assert api_keys(config) == [
        ApiKey(secret="zero", name="key-1", tokens_per_minute=500),
        ApiKey(secret="one", name="key-2", tokens_per_minute=500),
        ApiKey(secret="two", name="alice", weight=3, max_sequences=8),
    ]


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("K wait=3", {}, r"line 1: expected setting=value after the key, .* Did you mean weight\?"),
        ("a\nK weight", {}, r"line 2: expected setting=value"),
        ("K weight=0", {}, r"line 1: .*weight"),
        ("K weight=many", {}, r"line 1: .*weight"),
        ("K tokens_per_minute=-1", {}, r"line 1: .*tokens_per_minute"),
        ("K\nK", {}, r"keys 1 and 2 have the same key"),
        ("K", {"api_key": ["K"]}, r"keys 1 and 2 have the same key"),
        ("a name=x\nb name=x", {}, r"keys 1 and 2 have the name 'x'"),
        (" \n", {}, "holds no key"),
        (None, {"requests_per_minute": 5}, r"requests_per_minute limits each API key: give api_key or api_key_file"),
    ],
)
def test_keys_that_cannot_be_meant_are_refused_without_showing_one(
    tmp_path: Path, text: str | None, settings: dict[str, Any], message: str
) -> None:
    if text is not None:
        path = tmp_path / "keys"
        path.write_text(text.replace("K", "hidden"))
        settings = {**settings, "api_key_file": str(path)}
    if "api_key" in settings:
        settings["api_key"] = ["hidden"]
    with pytest.raises(ConfigError, match=message) as refused:
        api_keys(server_config(settings))
    assert "hidden" not in str(refused.value)

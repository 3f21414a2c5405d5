"""What a user does on the page beyond one run: chat with branches, reload, links, load, and a server that is gone."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
from server_process import ServerProcess

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playground_page import ENABLED, answer, fill, generate, run_again, say, shown  # noqa: E402  (needs playwright)

expect = sync_api.expect
MARKDOWN = """# Plan

Some **bold** and *slanted* words, `code`, and a [page](https://example.org/).

- one
- two

| a | b |
| - | - |
| 1 | 2 |

```
for x in y:
```
<img src=x onerror="document.title='taken'"><script>document.title='taken'</script>
[bad](javascript:document.title='taken') ![remote](https://example.org/x.png)
"""


def output(page: sync_api.Page) -> str:
    return "".join(shown(page)).replace("⏎\n", "\n")


def test_prompt_and_continuation_are_one_text(page: sync_api.Page) -> None:
    page.focus("#prompt")
    page.keyboard.type("One")
    page.keyboard.press("Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    with page.expect_request("**/v1/completions") as sent:
        page.keyboard.press("Control+Enter")
    assert json.loads(sent.value.post_data or "")["prompt"] == "One\ntwo\n"
    page.wait_for_selector(ENABLED)
    text = (page.text_content("#sheet") or "").replace("⏎\n", "\n").replace("\u200b", "")
    assert text == "One\ntwo\n" + output(page)
    # the continuation begins in the line in which the prompt ends
    page.fill("#prompt", "The ship")
    page.click("#generate")
    page.wait_for_selector(ENABLED)
    first = "document.querySelector('#output .token').getClientRects()[0]"
    assert page.evaluate(f"Math.abs({first}.top - document.getElementById('prompt').getClientRects()[0].top)") < 10


def test_an_example_is_one_press_away_and_a_run_has_its_times(page: sync_api.Page) -> None:
    examples = page.locator("#examples button")
    assert examples.count() == 3
    text = examples.nth(1).inner_text()
    examples.nth(1).click()
    page.wait_for_selector(ENABLED)
    assert page.inner_text("#prompt") == text
    expect(page.locator("#examples")).to_be_hidden()
    assert re.fullmatch(r"[\d.]+ ms", page.inner_text("#first"))
    assert re.fullmatch(r"[\d.]+", page.inner_text("#speed"))


@pytest.mark.parametrize("mode", ["completion", "chat"])
def test_a_rival_token_starts_a_branch_and_the_old_one_stays(page: sync_api.Page, mode: str) -> None:
    page.check(f"input[value={mode}]")
    page.select_option("#colour", "probability")
    generate(page, seed="11", max_tokens="16")
    before = shown(page)
    page.locator("#output .token").nth(5).click()
    rival = page.locator("#details .rival").first
    name = rival.inner_text()
    rival.click()
    page.wait_for_selector(ENABLED)
    given = "".join(before[:5]).replace("⏎\n", "\n") + name.replace("⏎", "\n").replace("⇥", "\t")
    assert page.text_content(".prefix") == given
    assert page.inner_text(".branches .of") == "Branch 2 of 2"
    assert run_again(page).startswith("Equal bits: ")
    branch = shown(page)
    page.click("button[aria-label='Previous branch']")
    assert shown(page) == before
    assert page.text_content(".prefix") == ""
    # the focus stays on the button that was pressed
    assert page.evaluate("document.activeElement.ariaLabel") == "Previous branch"
    assert run_again(page).startswith("Equal bits: ")
    page.click("button[aria-label='Next branch']")
    assert shown(page) == branch


def test_chat_has_several_turns_and_a_branch_keeps_those_after_it(page: sync_api.Page) -> None:
    page.check("input[value=chat]")
    fill(page, seed="3", max_tokens="8", system="Be brief.")
    say(page, "Hello")
    first = page.inner_text("#output")
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "And then?")
    messages = json.loads(sent.value.post_data or "")["messages"]
    assert [one["role"] for one in messages] == ["system", "user", "assistant", "user"]
    assert messages[2]["content"].split() == first.split()
    assert page.locator(".asked").all_inner_texts() == ["Hello", "And then?"]
    assert page.inner_text("#prompt") == ""
    assert run_again(page).startswith("Equal bits: ")
    page.select_option("#colour", "rank")
    page.locator("#output .token").nth(2).click()
    page.locator("#details .rival").first.click()
    page.wait_for_selector(ENABLED)
    say(page, "Why?")
    assert page.locator(".turn").count() == 3
    page.click("button[aria-label='Previous branch']")
    assert page.locator(".turn").count() == 2
    page.click("button[aria-label='Next branch']")
    assert page.locator(".asked").all_inner_texts() == ["Hello", "And then?", "Why?"]


def test_markdown_is_formatted_and_harmless(page: sync_api.Page) -> None:
    page.check("input[value=chat]")
    content = [{"token": "x", "bytes": [120], "logprob": -0.1, "top_logprobs": []}]
    choice = {"delta": {"content": MARKDOWN}, "logprobs": {"content": content}, "finish_reason": "stop"}
    answer(page, choice, path="chat/completions")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    generate(page)
    inside = page.locator("#output.markdown")
    for name, count in {"h1": 1, "strong": 1, "em": 1, "li": 2, "td": 2, "pre code": 1, "img": 0, "script": 0}.items():
        assert inside.locator(name).count() == count, name
    assert inside.locator("a[href]").evaluate_all("all => all.map((one) => [one.href, one.rel])") == [
        ["https://example.org/", "noopener noreferrer"]
    ]
    assert "<script>document.title='taken'</script>" in inside.inner_text()
    assert page.title() == "Sempre playground"
    assert [url for url in requests if "example.org" in url or url.endswith("/x")] == []


def test_history_and_settings_survive_a_reload(page: sync_api.Page) -> None:
    page.check("input[value=chat]")
    fill(page, seed="21", temperature="0.7", max_tokens="8", api_key="secret")
    say(page, "Hello")
    say(page, "Again")
    chat = page.locator(".turn").all_inner_texts()
    page.check("input[value=completion]")
    page.click("#new")
    generate(page, prompt="The ship", max_tokens="12")
    page.fill("#prompt", "The ship is unsent")
    tokens = shown(page)
    page.reload()
    expect(page.locator("#output .token")).to_have_count(len(tokens))
    assert shown(page) == tokens
    assert page.inner_text("#prompt") == "The ship is unsent"
    expect(page.locator("#edited")).to_be_visible()
    fields = {name: page.input_value(f"#{name}") for name in ("seed", "temperature", "max_tokens", "api_key")}
    assert fields == {"seed": "21", "temperature": "0.7", "max_tokens": "12", "api_key": ""}
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    # what was kept is enough to find the same bits again
    page.fill("#prompt", "The ship")
    assert run_again(page).startswith("Equal bits: 12 tokens")
    page.click("#history-button")
    page.click(".entry:has-text('Hello')")
    assert page.locator(".turn").all_inner_texts() == chat
    assert page.input_value("#max_tokens") == "8"
    page.click("button[aria-label='Delete: Hello']")
    expect(page.locator(".entry")).to_have_count(1)


def test_a_damaged_history_is_told(page: sync_api.Page) -> None:
    # written once the page is being left, after what the page itself keeps then
    page.evaluate("addEventListener('pagehide', () => localStorage.setItem('sempre.playground.1', '{'))")
    page.reload()
    expect(page.locator("#status")).to_have_text(
        "What this browser had kept could not be read; the page starts afresh."
    )


def _link(page: sync_api.Page) -> str:
    page.click("#share")
    return page.input_value("#link")


def _changed(link: str, **fields: object) -> str:
    address, _, data = link.partition("#run=")
    held = json.loads(base64.urlsafe_b64decode(data + "=" * (-len(data) % 4)))
    text = base64.urlsafe_b64encode(json.dumps({**held, **fields}).encode()).decode().rstrip("=")
    return f"{address}#run={text}"


@pytest.mark.parametrize("mode", ["completion", "chat"])
def test_a_link_says_whether_the_answer_was_the_same(page: sync_api.Page, browser: sync_api.Browser, mode: str) -> None:
    page.check(f"input[value={mode}]")
    page.select_option("#colour", "probability")
    generate(page, prompt="日本 and שלום", max_tokens="12", temperature="0.9")
    link, seed, fingerprint = _link(page), page.inner_text("#seed-used"), page.inner_text("#fingerprint")
    expected = page.inner_text("#output")
    checks = ["0"] * 12
    with browser.new_context() as context:
        context.set_default_timeout(120_000)
        other = context.new_page()
        for address, verdict in (
            (
                link,
                "The same answer as in the link: 12 tokens and their log-probabilities. The fingerprint is the same.",
            ),
            (
                _changed(link, checks=checks),
                "Not the answer of the link: token 1 differs. The fingerprint is the same.",
            ),
            (_changed(link, fingerprint="f00"), f"had fingerprint f00, this one has {fingerprint}: another engine."),
        ):
            other.goto("about:blank")
            other.goto(address)
            expect(other.locator("#verdict")).to_contain_text(verdict)
            assert other.inner_text("#seed-used") == seed
            assert "#" not in other.url
        if mode == "completion":
            assert other.inner_text("#output") == expected
        other.goto("about:blank")
        other.goto(_changed(link, model="large"))
        expect(other.locator("#status")).to_contain_text("The link is of the model large; this server has tiny.")
        other.goto("about:blank")
        other.goto(link[:-9])
        expect(other.locator("#status")).to_contain_text("The link is damaged")


def _slide(page: sync_api.Page, others: int) -> None:
    page.evaluate(
        "others => { const slider = document.getElementById('others'); slider.value = others;"
        " for (const kind of ['input', 'change']) slider.dispatchEvent(new Event(kind, { bubbles: true })); }",
        others,
    )


def test_the_text_comes_out_the_same_under_load(page: sync_api.Page) -> None:
    generate(page, max_tokens="96", seed="8")
    before = shown(page)
    _slide(page, 48)
    assert page.inner_text("#others-count") == "48"
    # live: others run, and tokens are confirmed while the rest still waits
    expect(page.locator("#status")).to_have_text("Generating beside 48 other requests…")
    page.wait_for_function(
        "() => ['same', 'pending'].every((name) => document.querySelector(`.token.${name}`) !== null)"
    )
    expect(page.locator("#progress")).to_contain_text(re.compile(r"^\s*\d+ of 96 tokens the same so far"))
    page.wait_for_function("() => Number(document.getElementById('running').textContent) > 20")
    page.wait_for_selector("#verdict.equal")
    assert page.inner_text("#verdict").startswith("Equal bits: 96 tokens")
    assert page.locator(".token.same").count() == 96
    assert shown(page) == before
    # the others end with it
    expect(page.locator("#running")).to_have_text("0")


def test_colours_have_one_hue_and_can_be_off(page: sync_api.Page) -> None:
    top = {"a": -0.7, "b": -0.9, "c": -4.0}
    logprobs = {"tokens": ["c", "a"], "token_logprobs": [-4.0, -0.7], "top_logprobs": [top, {"a": -0.7}]}
    answer(page, {"logprobs": logprobs, "token_ids": [5, 6], "finish_reason": "length"})
    generate(page)
    tints = {}
    for colour in ("probability", "entropy", "rank", "off"):
        page.select_option("#colour", colour)
        tokens = page.locator("#output .token")
        tints[colour] = [tokens.nth(i).get_attribute("class") for i in range(2)]
        assert page.locator("#legend .key").count() == (0 if colour == "off" else 5)
    assert tints == {
        "probability": ["token s3", "token s2"],
        # 0.50, 0.41, 0.02 and the rest 0.08; then 0.50 and 0.50
        "entropy": ["token s2", "token s1"],
        "rank": ["token s2", "token s0"],
        "off": ["token s0", "token s0"],
    }


def test_copy_takes_the_whole_text(page: sync_api.Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    generate(page, max_tokens="8")
    page.click("#copy")
    expect(page.locator("#status")).to_have_text("The text is copied.")
    assert page.evaluate("navigator.clipboard.readText()") == "The ship" + output(page)


def test_text_runs_in_its_own_direction(page: sync_api.Page) -> None:
    page.fill("#prompt", "שלום עולם")
    assert page.evaluate("getComputedStyle(document.getElementById('prompt')).direction") == "rtl"
    page.check("input[value=chat]")
    generate(page, prompt="שלום עולם", max_tokens="4")
    assert page.evaluate("getComputedStyle(document.querySelector('.asked')).direction") == "rtl"


def test_polls_once_in_two_seconds_and_not_while_hidden(page: sync_api.Page) -> None:
    page.clock.install()
    page.reload()
    polls: list[str] = []
    page.on("request", lambda request: polls.append(request.url) if request.url.endswith("/load") else None)
    for _ in range(3):
        before = len(polls)
        with page.expect_request("**/load"):
            page.clock.run_for(2000)
        page.wait_for_function("() => document.getElementById('running').textContent !== '–'")
        assert len(polls) - before <= 2
    page.evaluate("Object.defineProperty(document, 'visibilityState', { value: 'hidden' })")
    page.clock.run_for(2000)
    before = len(polls)
    page.clock.run_for(20_000)
    assert len(polls) == before


def test_a_server_that_is_gone_is_told(browser: sync_api.Browser, tmp_path: Path) -> None:
    with browser.new_context(viewport={"width": 390, "height": 850}) as context:
        context.set_default_timeout(120_000)
        page = context.new_page()
        with ServerProcess(tmp_path / "log", "--num-threads", "1", "--device", "cpu") as server:
            page.goto(server.url)
            generate(page, max_tokens="4")
            expect(page.locator("#gone")).to_be_hidden()
        expect(page.locator("#gone")).to_contain_text("The server is gone")
        before = shown(page)
        page.click("#again")
        expect(page.locator("#status")).to_contain_text("The server cannot be reached")
        # what was there stays
        assert shown(page) == before
        page.unroute_all()
        page.route("**/load", lambda route: route.fulfill(json={"server_load": 0}))
        page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "tiny"}]}))
        expect(page.locator("#gone")).to_be_hidden()


def test_a_key_that_is_missing_is_not_a_server_that_is_gone(page: sync_api.Page) -> None:
    refused = {"error": {"message": "You didn't provide an API key."}}
    page.route("**/load", lambda route: route.fulfill(status=401, json=refused))
    page.route("**/v1/models", lambda route: route.fulfill(status=401, json=refused))
    page.reload()
    expect(page.locator("#status")).to_have_text("You didn't provide an API key.")
    expect(page.locator("#gone")).to_be_hidden()

"""The page at `/`, in headless Chromium against a real server."""

from __future__ import annotations

import json
import re

import httpx
import numpy as np
import pytest

from sempre.engine.server.playground import ASSETS, HEADERS

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playground_page import answer, fill, generate, run_again, shown  # noqa: E402  (needs playwright)

WAIT_MS = 120_000


def test_files_and_policy(server_url: str) -> None:
    for path in ("/", *(f"/playground/{name}" for name in ASSETS)):
        response = httpx.get(server_url + path)
        assert response.status_code == 200
        assert {name: response.headers[name] for name in HEADERS} == HEADERS
    html = httpx.get(server_url).text
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    assert re.findall(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|https?://", html) == []
    own = [name for name in ASSETS if name.endswith(".js") and not name.startswith("vendor/")]
    scripts = "".join(httpx.get(f"{server_url}/playground/{name}").text for name in own)
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://\w", scripts) == []
    assert httpx.get(f"{server_url}/playground/../app.py").status_code == 404


def test_tokens_with_probabilities_seed_and_fingerprint(page: sync_api.Page, server_url: str) -> None:
    # more than 53 bits, which a JavaScript number would round
    seed = 2**64 - 3
    generate(page, seed=str(seed), max_tokens="20", prompt="The ship")
    body = {"prompt": "The ship", "seed": seed, "max_tokens": 20, "logprobs": 5, "temperature": 1}
    expected = httpx.post(f"{server_url}/v1/completions", json=body).json()
    tokens = page.locator("#output .token")
    logprobs = expected["choices"][0]["logprobs"]
    assert [text.replace("⏎\n", "\n") for text in tokens.all_text_contents()] == logprobs["tokens"]
    tints = [sum(np.exp(p) < bound for bound in (0.01, 0.1, 0.5, 0.9)) for p in logprobs["token_logprobs"]]
    assert [tokens.nth(i).get_attribute("class") for i in range(20)] == [f"token s{tint}" for tint in tints]
    assert page.inner_text("#seed-used") == str(seed)
    assert page.inner_text("#fingerprint") == expected["system_fingerprint"]
    assert (page.inner_text("#count"), page.inner_text("#finish")) == ("20", "length")
    tokens.nth(3).click()
    numbers = page.locator("#details tbody td:last-child")
    alternatives = sorted(logprobs["top_logprobs"][3].values(), reverse=True)
    assert [float(text) for text in numbers.all_inner_texts()] == [float(f"{one:.3g}") for one in alternatives]
    page.click("text=All digits")
    assert [float(text) for text in numbers.all_inner_texts()] == alternatives


@pytest.mark.parametrize("mode", ["completion", "chat"])
def test_run_again_finds_equal_bits(page: sync_api.Page, mode: str) -> None:
    page.check(f"input[value={mode}]")
    generate(page, max_tokens="24", temperature="1.2")
    count, seed = page.inner_text("#count"), page.inner_text("#seed-used")
    assert run_again(page).startswith(f"Equal bits: {count} tokens and ")
    assert page.inner_text("#seed-used") == seed
    assert page.get_attribute("#verdict", "class") == "equal"


@pytest.mark.parametrize(
    "change", ["last bit of a logprob", "last bit of an alternative", "token", "length", "fingerprint"]
)
def test_run_again_finds_a_difference(page: sync_api.Page, change: str) -> None:
    generate(page, max_tokens="64", seed="5")
    places: list[int] = []

    def alter(route: sync_api.Route) -> None:
        response = route.fetch()
        events = response.text().split("\n\n")
        # a chunk holds one token, or several if the server was held up
        chunk = json.loads(events[1].removeprefix("data: "))
        places.append(len(json.loads(events[0].removeprefix("data: "))["choices"][0]["token_ids"]))
        choice = chunk["choices"][0]
        logprobs = choice["logprobs"]
        if change == "last bit of a logprob":
            logprobs["token_logprobs"][0] = float(
                np.nextafter(np.float32(logprobs["token_logprobs"][0]), np.float32(0))
            )
        elif change == "last bit of an alternative":
            name = list(logprobs["top_logprobs"][0])[-1]
            value = np.float32(logprobs["top_logprobs"][0][name])
            logprobs["top_logprobs"][0][name] = float(np.nextafter(value, np.float32(0)))
        elif change == "token":
            choice["token_ids"][0] += 1
        events[1] = f"data: {json.dumps(chunk)}"
        if change == "length":
            del events[1]
        text = "\n\n".join(events)
        if change == "fingerprint":
            text = text.replace('"system_fingerprint":"', '"system_fingerprint":"other')
        route.fulfill(response=response, body=text)

    page.route("**/v1/completions", alter)
    verdict = run_again(page)
    if change == "fingerprint":
        assert verdict.startswith("Equal bits: 64 tokens")
        assert "The fingerprint changed from" in verdict
    else:
        [place] = places
        assert verdict.startswith(f"Different: token {place + 1} was ")
        assert page.get_attribute("#verdict", "class") == "different"
        assert page.locator("#output .token").nth(place).get_attribute("class").endswith("differs")


def test_text_of_a_model_is_never_markup(page: sync_api.Page) -> None:
    markup = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
    logprobs = {"tokens": [markup], "token_logprobs": [-0.1], "top_logprobs": [{markup: -0.1, "<b>": -3.0}]}
    choice = {"index": 0, "text": markup, "logprobs": logprobs, "token_ids": [5], "finish_reason": "stop", "seed": 1}
    stream = f"data: {json.dumps({'choices': [choice], 'system_fingerprint': markup})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    generate(page)
    assert page.inner_text("#output") == page.inner_text("#fingerprint") == markup
    page.locator("#output .token").hover()
    assert page.locator("#details td").first.inner_text() == markup
    # three digits are three, zeros as well
    assert page.locator("#details td:last-child").all_inner_texts() == ["-0.100", "-3.00"]
    assert page.locator("#details td:nth-child(2)").all_inner_texts() == ["90.5 %", "4.98 %"]
    assert page.locator("main img, main script, main b").count() == 0
    assert page.title() == "Sempre playground"


def test_the_keyboard_reaches_everything(page: sync_api.Page) -> None:
    page.fill("#prompt", "The ship")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#again[aria-disabled=false]")
    # neither the start of a run nor its end takes the focus away
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "output"
    caption = page.locator("#details caption")
    assert caption.inner_text().startswith("Token 1, id ")
    page.keyboard.press("ArrowRight")
    assert caption.inner_text().startswith("Token 2, id ")
    assert page.text_content("#announcement").startswith("Token 2: ")
    tops = "[...document.querySelectorAll('#output .token')].map((one) => Math.round(one.getClientRects()[0].top))"
    lines = page.evaluate(tops)
    active = "[...document.querySelectorAll('#output .token')].findIndex((one) => one.matches('.active'))"
    page.keyboard.press("ArrowDown")
    below = min((top for top in lines if top > lines[1] + 8), default=lines[1])
    assert abs(lines[page.evaluate(active)] - below) < 8
    page.keyboard.press("ArrowUp")
    assert abs(lines[page.evaluate(active)] - lines[1]) < 8
    page.keyboard.press("End")
    assert caption.inner_text().startswith(f"Token {page.inner_text('#count')}, id ")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.closest('#details') !== null")
    page.keyboard.press("Escape")
    sync_api.expect(page.locator("#details")).to_be_hidden()
    for expected in ("output", "again", "generate", "stop-button", "copy", "share"):
        assert page.evaluate("document.activeElement.id") == expected
        page.keyboard.press("Tab")


@pytest.mark.parametrize("drawer", ["settings", "history"])
def test_a_drawer_gives_the_focus_back(page: sync_api.Page, drawer: str) -> None:
    page.click(f"#{drawer}-button")
    assert page.evaluate(f"document.activeElement.closest('#{drawer}') !== null")
    page.keyboard.press("Escape")
    sync_api.expect(page.locator(f"#{drawer}")).to_be_hidden()
    assert page.evaluate("document.activeElement.id") == f"{drawer}-button"


def test_nothing_moves_where_motion_is_not_wanted(page: sync_api.Page) -> None:
    generate(page, max_tokens="4")
    duration = "getComputedStyle(document.querySelector('#output .token')).transitionDuration"
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(duration) != "0s"
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(duration) == "0s"


def test_light_and_dark(page: sync_api.Page) -> None:
    def colours() -> list[str]:
        style = "getComputedStyle(document.body)"
        found: list[str] = page.evaluate(f"[{style}.backgroundColor, {style}.color]")
        return found

    page.emulate_media(color_scheme="light")
    light = colours()
    page.emulate_media(color_scheme="dark")
    assert colours() != light


def test_a_refusal_is_shown_and_a_run_can_be_stopped(page: sync_api.Page) -> None:
    fill(page, prompt="The ship", stop="x")
    page.route("**/v1/completions", lambda route: route.continue_(post_data=json.dumps({"prompt": "a", "top_p": 7})))
    page.click("#generate")
    page.wait_for_selector("#status.bad")
    assert page.inner_text("#status").startswith("top_p: ")
    page.unroute("**/v1/completions")
    page.route("**/v1/completions", lambda route: None)
    page.click("#generate")
    page.keyboard.press("Escape")
    sync_api.expect(page.locator("#status")).to_have_text("Stopped.")
    page.unroute_all(behavior="ignoreErrors")


def test_load_and_cache_usage_are_live(page: sync_api.Page, server_url: str) -> None:
    running, meter = page.locator("#running"), page.locator("#kv-meter")
    sync_api.expect(running).to_have_text("0", timeout=WAIT_MS)
    body = {"prompt": "The ship", "n": 48, "max_tokens": 500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server_url}/v1/completions", json=body, timeout=None) as response:
        # held, since the response ends with its iterator
        received = response.iter_raw()
        next(received)
        sync_api.expect(running).to_have_text(re.compile(r"^[1-9]\d*$"), timeout=WAIT_MS)
        sync_api.expect(meter).to_have_attribute("value", re.compile(r"[1-9]"), timeout=WAIT_MS)
    sync_api.expect(running).to_have_text("0", timeout=WAIT_MS)


@pytest.mark.parametrize("gesture", ["click", "tap"])
def test_a_click_or_tap_shows_the_token_it_is_on(browser: sync_api.Browser, server_url: str, gesture: str) -> None:
    with browser.new_context(has_touch=gesture == "tap") as context:
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        page.goto(server_url)
        generate(page, max_tokens="12", seed="3")
        tokens = page.locator("#output .token")
        for place in (7, 2, 11, 0):
            getattr(tokens.nth(place), gesture)()
            if gesture == "click":
                page.mouse.move(0, 0)
            assert page.inner_text("#details caption").startswith(f"Token {place + 1}, id ")
            assert "active" in tokens.nth(place).get_attribute("class").split()
            assert page.text_content("#announcement").startswith(f"Token {place + 1}: ")
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#details caption").startswith("Token 2, id ")


# cut at each place: an emoji of four bytes, one of several code points, Hebrew, Japanese, and plain text between
CUT = ["🌶", "👩‍🚀", "שלום", "日本語", "a b"]


def _parts() -> list[bytes]:
    data = "".join(CUT).encode()
    return [data[i : i + 1] for i in range(len(data))]


def _name(part: bytes) -> str:
    try:
        return part.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in part)


@pytest.mark.parametrize("mode", ["completion", "chat"])
def test_a_character_is_shown_on_the_token_that_completes_it(page: sync_api.Page, mode: str) -> None:
    parts = _parts()
    if mode == "completion":
        names = [_name(part) for part in parts]
        logprobs = [{"tokens": [n], "token_logprobs": [-0.1], "top_logprobs": [{n: -0.1, "ש": -2.0}]} for n in names]
        answer(page, *({"logprobs": one, "token_ids": [5], "finish_reason": None} for one in logprobs))
    else:
        page.check("input[value=chat]")
        page.select_option("#colour", "rank")
        entries = [{"token": "�", "bytes": list(part), "logprob": -0.1, "top_logprobs": []} for part in parts]
        choices = [{"logprobs": {"content": [entry]}, "delta": {}, "finish_reason": None} for entry in entries]
        answer(page, *choices, path="chat/completions")
    generate(page)
    expected = []
    rest = b""
    for part in parts:
        rest += part
        try:
            expected.append(rest.decode())
            rest = b""
        except UnicodeDecodeError:
            expected.append("·")
    assert shown(page) == expected
    assert "".join(text for text in shown(page) if text != "·") == "".join(CUT)
    page.locator("#output .token").nth(0).hover()
    assert page.locator("#details tr.chosen td").first.inner_text() == "\\xf0"


def test_what_is_never_completed_is_shown_as_no_character(page: sync_api.Page) -> None:
    logprobs = {"tokens": ["a", "bytes:\\xe3\\x81"], "token_logprobs": [-0.1, -0.1], "top_logprobs": [{}, {}]}
    answer(page, {"logprobs": logprobs, "token_ids": [5, 6], "finish_reason": "length"})
    generate(page)
    assert shown(page) == ["a", "�"]


def test_a_verdict_is_never_shown_beneath_another_request(page: sync_api.Page) -> None:
    generate(page, prompt="The ship", max_tokens="8", seed="")
    verdict, again = page.locator("#verdict"), page.locator("#again")
    assert run_again(page).startswith("Equal bits")
    page.fill("#prompt", "The ships")
    sync_api.expect(verdict).to_be_hidden()
    sync_api.expect(page.locator("#edited")).to_be_visible()
    sync_api.expect(again).to_have_attribute("aria-disabled", "true")
    # the same again as what was sent
    page.fill("#prompt", "The ship")
    sync_api.expect(again).to_have_attribute("aria-disabled", "false")
    assert run_again(page).startswith("Equal bits")
    for field, value in (("seed", "4"), ("temperature", "0.5"), ("stop", "x")):
        before = page.input_value(f"#{field}")
        page.fill(f"#{field}", value)
        sync_api.expect(again).to_have_attribute("aria-disabled", "true")
        page.fill(f"#{field}", before)
        sync_api.expect(again).to_have_attribute("aria-disabled", "false")
    page.check("input[value=chat]")
    sync_api.expect(again).to_have_attribute("aria-disabled", "true")
    page.check("input[value=completion]")
    # edited while it runs
    held: list[sync_api.Route] = []
    page.route("**/v1/completions", lambda route: held.append(route))
    again.click()
    page.fill("#prompt", "Another")
    while not held:
        page.wait_for_timeout(20)
    held[0].continue_()
    sync_api.expect(page.locator("#status")).to_have_text("Done. The form has changed since this request was sent.")
    sync_api.expect(verdict).to_be_hidden()


def test_an_error_stands_beside_the_earlier_answer_with_its_own_facts(page: sync_api.Page) -> None:
    generate(page, max_tokens="8", seed="5")
    run_again(page)
    names = ("seed-used", "fingerprint", "count", "finish")
    before = ([page.inner_text(f"#{name}") for name in names], shown(page))
    page.locator("#output .token").nth(2).click()
    sync_api.expect(page.locator("#details")).to_be_visible()
    page.click("h1")
    refused = json.dumps({"error": {"message": "no"}})
    page.route("**/v1/completions", lambda route: route.fulfill(status=400, body=refused))
    page.click("#generate")
    sync_api.expect(page.locator("#status")).to_have_text("no")
    assert ([page.inner_text(f"#{name}") for name in names], shown(page)) == before
    for name in ("verdict", "details"):
        sync_api.expect(page.locator(f"#{name}")).to_be_hidden()
    assert page.text_content("#announcement") == ""
    # another prompt has no answer and no facts
    page.fill("#prompt", "Another")
    sync_api.expect(page.locator("#edited")).to_be_visible()
    page.click("#generate")
    sync_api.expect(page.locator("#status")).to_have_text("no")
    assert shown(page) == []
    assert [page.inner_text(f"#{name}") for name in names] == ["–"] * 4
    sync_api.expect(page.locator("#again")).to_have_attribute("aria-disabled", "true")

"""Each state of the page in both widths and both colour schemes: WCAG 2.1 AA as axe-core checks it (contrast, names,
roles), nothing beside the window, nothing over another control."""

from __future__ import annotations

from collections.abc import Callable

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
from playground_page import answer, fill, generate, open_settings, run_again, say  # noqa: E402  (needs playwright)

# Pairs of controls that overlap by more than a pixel, and elements beyond the window's sides.
FAULTS = """() => {
  const name = (one) => `${one.tagName} ${one.id || one.textContent.slice(0, 20)}`;
  const seen = (one) => one.checkVisibility() && !one.closest('#details, .skip');
  const all = [...document.querySelectorAll('button, input, select, textarea, #prompt, dd')].filter(seen);
  const boxes = all.map((one) => one.getBoundingClientRect());
  const found = [];
  boxes.forEach((a, i) => {
    if (a.left < -1 || a.right > innerWidth + 1) found.push(`beyond the window: ${name(all[i])}`);
    boxes.slice(i + 1).forEach((b, j) => {
      const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (width > 1 && height > 1) found.push(`${name(all[i])} over ${name(all[i + 1 + j])}`);
    });
  });
  if (document.documentElement.scrollWidth > innerWidth) found.push('the page scrolls sideways');
  const card = document.getElementById('details').getBoundingClientRect();
  if (card.left < 0 || card.right > innerWidth) found.push('the card is beyond the window');
  return found;
}"""


def empty(page: sync_api.Page) -> None:
    sync_api.expect(page.locator("#examples")).to_be_visible()


def token(page: sync_api.Page) -> None:
    generate(page, seed="5", max_tokens="32")
    page.click(".close[data-for=settings]")
    page.locator("#output .token").last.click()


def verdict(page: sync_api.Page) -> None:
    generate(page)
    run_again(page)
    page.click("#share")


def edited(page: sync_api.Page) -> None:
    generate(page)
    page.fill("#prompt", "Another")


def different(page: sync_api.Page) -> None:
    chosen = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5}]}
    answer(page, {"logprobs": chosen, "token_ids": [1], "finish_reason": "stop"})
    generate(page)
    page.unroute_all()
    other = {**chosen, "token_logprobs": [-5.5]}
    answer(page, {"logprobs": other, "token_ids": [1], "finish_reason": "stop"})
    assert run_again(page).startswith("Different")


def settings(page: sync_api.Page) -> None:
    page.check("input[value=chat]")
    open_settings(page)


def history(page: sync_api.Page) -> None:
    generate(page, prompt="A long line of words that the list has to cut or wrap " * 3)
    page.click("#history-button")


def chat(page: sync_api.Page) -> None:
    page.check("input[value=chat]")
    fill(page, max_tokens="8")
    say(page, "Hello")
    text = "# Plan\n\nA [page](https://example.org), `code`\n\n```\n" + "long " * 60 + "\n```\n\n|a|b|\n|-|-|\n|1|2|"
    content = [{"token": "x", "bytes": [120], "logprob": -0.1, "top_logprobs": []}]
    choice = {"delta": {"content": text}, "logprobs": {"content": content}, "finish_reason": "stop"}
    answer(page, choice, path="chat/completions")
    say(page, "Averylongwordwithoutanyplacetobreak" * 5)


def gone(page: sync_api.Page) -> None:
    page.route("**/load", lambda route: route.abort())
    sync_api.expect(page.locator("#gone")).to_contain_text("The server is gone")


def assert_sound(page: sync_api.Page) -> None:
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    assert page.evaluate(FAULTS) == []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        options = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], "resultTypes": ["violations"]}
        found = axe.Axe().run(page, options=options).response["violations"]
        assert [(scheme, one["id"], one["nodes"][0]["html"]) for one in found] == []


STATES = [empty, token, verdict, edited, different, settings, history, chat, gone]


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(state, marks=[pytest.mark.product] * (state not in (token, settings, chat, gone)))
        for state in STATES
    ],
    ids=lambda state: state.__name__,
)
def test_each_state_is_sound(page: sync_api.Page, state: Callable[[sync_api.Page], None]) -> None:
    state(page)
    assert_sound(page)


def test_the_checks_find_what_is_wrong(page: sync_api.Page) -> None:
    """Controls that must fail: a pale text, a wide element, two controls at one place."""
    page.evaluate("document.getElementById('status').style.color = '#bbb'")
    page.emulate_media(color_scheme="light")
    with pytest.raises(AssertionError, match="color-contrast"):
        assert_sound(page)
    page.evaluate("document.getElementById('generate').style.width = '2000px'")
    with pytest.raises(AssertionError, match="beyond the window"):
        assert_sound(page)
    page.evaluate("document.getElementById('generate').removeAttribute('style')")
    page.evaluate("document.getElementById('copy').style.cssText = 'position: relative; left: -40px'")
    with pytest.raises(AssertionError, match=" over "):
        assert_sound(page)


def test_on_a_phone_the_buttons_and_the_output_are_in_sight(page: sync_api.Page) -> None:
    generate(page, prompt="A line of the prompt.\n" * 12, max_tokens="48")
    page.click(".close[data-for=settings]")
    page.evaluate("scrollTo(0, 0)")
    place = page.evaluate("document.getElementById('again').getBoundingClientRect().bottom / innerHeight")
    assert place <= 1
    columns = page.evaluate("getComputedStyle(document.querySelector('.facts')).gridTemplateColumns.split(' ').length")
    if page.viewport_size == {"width": 390, "height": 850}:
        assert columns == 2
    page.click("#generate")
    page.wait_for_selector("#again[aria-disabled=false]")
    output = page.evaluate("document.getElementById('output').getBoundingClientRect().toJSON()")
    assert output["top"] < 850
    assert output["bottom"] > 0

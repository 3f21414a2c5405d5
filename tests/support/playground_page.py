"""What a user does on the page."""

from __future__ import annotations

import json
from typing import Any

from playwright.sync_api import Page

ENABLED = "#again[aria-disabled=false]"


def open_settings(page: Page) -> None:
    if page.locator("#settings").is_hidden():
        page.click("#settings-button")


def fill(page: Page, **fields: str) -> None:
    for name, value in fields.items():
        if name != "prompt":
            open_settings(page)
        page.fill(f"#{name}", value)


def generate(page: Page, **fields: str) -> None:
    """Fill the fields and send; returns once there is an answer."""
    fill(page, **{"prompt": "The ship", **fields})
    page.click("#generate")
    page.wait_for_selector(ENABLED)


def run_again(page: Page) -> str:
    page.click("#again")
    page.wait_for_selector("#verdict:not([hidden])")
    return page.inner_text("#verdict")


def say(page: Page, text: str) -> None:
    """Send a message in chat and wait for its answer."""
    turns = page.locator(".turn").count()
    page.fill("#prompt", text)
    page.click("#generate")
    page.wait_for_function(f"() => document.querySelectorAll('.turn').length === {turns + 1}")
    page.wait_for_selector(ENABLED)


def shown(page: Page) -> list[str]:
    found: list[str] = page.locator("#output .token").all_text_contents()
    return found


def answer(page: Page, *choices: dict[str, Any], path: str = "completions") -> None:
    """Have the page's requests answered with a chunk for each of `choices`."""
    chunks = [{"choices": [{"index": 0, "seed": 1, **choice}], "system_fingerprint": "f"} for choice in choices]
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route(f"**/v1/{path}", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))

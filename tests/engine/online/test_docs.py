"""The page at `/docs`, in headless Chromium against a real server."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import httpx
import pytest

from sempre.engine.server import docs
from sempre.engine.server.docs import ASSETS, HEADERS

COMPLETIONS = "#operations-default-v1_completions_post"


def test_files_policy_and_licences(server_url: str) -> None:
    for path in ("/docs", *(f"/docs/{name}" for name in ASSETS)):
        response = httpx.get(server_url + path)
        assert response.status_code == 200
        assert {name: response.headers[name] for name in HEADERS} == HEADERS
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    html, script = (httpx.get(server_url + path).text for path in ("/docs", "/docs/docs.js"))
    assert re.findall(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|https?://", html + script) == []
    # relative, so that they are found behind a proxy's path
    assert re.findall(r'(?:src|href)="/|url: \'/', html + script) == []
    assert httpx.get(server_url + "/docs/../app.py").status_code == 404
    vendor = files(docs) / "vendor"
    assert "Apache License" in (vendor / "swagger-ui.LICENSE").read_text()
    assert "MIT" in (vendor / "swagger-ui.js.LICENSE").read_text()


@pytest.mark.product
def test_every_endpoint_is_shown_and_one_is_tried(browser: object, server_url: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    assert isinstance(browser, sync_api.Browser)
    described = httpx.get(server_url + "/openapi.json").json()["paths"]
    complaints: list[str] = []
    asked: list[str] = []
    with browser.new_context(viewport={"width": 1440, "height": 900}) as context:
        context.on("weberror", lambda error: complaints.append(str(error.error)))
        context.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.goto(server_url + "/docs")
        page.wait_for_selector(".opblock")
        assert page.locator(".opblock").count() == sum(len(operations) for operations in described.values())
        page.locator(COMPLETIONS).click()
        page.click("text=Try it out")
        body = {"model": "tiny", "prompt": "The ship", "max_tokens": 4, "seed": 7}
        page.fill(f"{COMPLETIONS} textarea", json.dumps(body))
        page.click("text=Execute")
        page.wait_for_selector(".live-responses-table .response")
        shown = page.inner_text(".live-responses-table")
    expected = httpx.post(server_url + "/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    assert json.dumps(expected, ensure_ascii=False)[1:-1] in shown
    assert complaints == []
    assert [url for url in asked if not url.startswith((server_url, "data:"))] == []

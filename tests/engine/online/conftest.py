"""One real server process for all tests of its clients, and a browser for those of its page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from server_process import ServerProcess

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = ("--max-model-len", "512", "--max-num-seqs", "64", "--num-threads", "1", "--device", "cpu")
WAIT_MS = 120_000


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ServerProcess(tmp_path_factory.mktemp("online") / "log", *FLAGS) as process:
        yield process.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no `chromium` on the PATH (Debian's package of that name)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium)
        yield opened
        opened.close()


@pytest.fixture(params=[pytest.param(1440, marks=pytest.mark.product), 390])
def page(browser: Browser, server_url: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page in a wide and in a phone's window, loaded; a complaint of the browser fails the test, except for
    requests that fail, which tests cause on purpose."""
    context = browser.new_context(viewport={"width": request.param, "height": 850}, has_touch=request.param == 390)
    context.set_default_timeout(WAIT_MS)
    opened = context.new_page()
    complaints: list[str] = []
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    context.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.goto(server_url)
    opened.wait_for_function("() => document.getElementById('model').textContent !== '…'")
    yield opened
    context.close()
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []

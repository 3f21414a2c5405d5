"""The page at `/`: try prompts, see probabilities, check that a second run gives the same bits.

Plain files without a build step. The policy only lets the page load from and call this server, and prevents scripts
in markup and markup from text: model output is shown as text, or as the few elements that DOMPurify admits of what
marked makes of an answer's Markdown. Both are in `vendor`, unchanged but for their source map's address, with their
licences: marked 18.2.1 (MIT) and DOMPurify 3.5.0 (Apache 2.0 or MPL 2.0).
"""

from __future__ import annotations

from sempre.engine.server.page_files import file_route, page_headers

HEADERS = page_headers(more="; require-trusted-types-for 'script'; trusted-types dompurify")
ASSETS = (
    "playground.css",
    "icon.svg",
    "main.js",
    "api.js",
    "tokens.js",
    "characters.js",
    "colours.js",
    "comparison.js",
    "conversation.js",
    "details.js",
    "drawers.js",
    "editor.js",
    "elements.js",
    "engine_status.js",
    "facts.js",
    "form.js",
    "history.js",
    "link.js",
    "markdown.js",
    "pressure.js",
    "runs.js",
    "session.js",
    "vendor/marked.js",
    "vendor/dompurify.js",
)
PLAYGROUND_ROUTES = [
    file_route("/", __name__, "index.html", HEADERS),
    *(file_route(f"/playground/{name}", __name__, name, HEADERS) for name in ASSETS),
]

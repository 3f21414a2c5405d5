"""The page at `/`: try prompts, see probabilities, check that a second run gives the same bits.

Plain files without a build step. The policy only lets the page load from and call this server, and prevents scripts
in markup and markup from text: model output is shown as text, or as the few elements that DOMPurify admits of what
marked makes of an answer's Markdown. Both are in `vendor`, unchanged but for their source map's address, with their
licences: marked 18.2.1 (MIT) and DOMPurify 3.5.0 (Apache 2.0 or MPL 2.0).
"""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types dompurify"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # The page depends on the server's version, so browsers must revalidate it.
    "Cache-Control": "no-cache",
}


def _route(path: str, name: str) -> Route:
    content = (files(__name__) / name).read_bytes()
    media_type = _TYPES[name[name.rindex(".") :]]

    async def send(_request: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=media_type)

    return Route(path, send, name=f"playground {name}")


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
PLAYGROUND_ROUTES = [_route("/", "index.html"), *(_route(f"/playground/{name}", name) for name in ASSETS)]

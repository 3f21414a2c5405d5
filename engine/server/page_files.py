"""Files of the pages that the server shows, from this package."""

from __future__ import annotations

from functools import cache
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
_OWN_FILES_ALONE = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src {images}; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def page_headers(*, images: str = "'self'", more: str = "") -> dict[str, str]:
    """Headers with which a page loads and calls nothing but this server; `more` are further directives."""
    return {
        "Content-Security-Policy": _OWN_FILES_ALONE.format(images=images) + more,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        # The page depends on the server's version, so browsers must revalidate it.
        "Cache-Control": "no-cache",
    }


def file_route(path: str, package: str, name: str, headers: dict[str, str]) -> Route:
    """Serve the file `name` of a package at `path`."""
    media_type = _TYPES[name[name.rindex(".") :]]

    async def send(_request: Request) -> Response:
        return Response(_content(package, name), headers=headers, media_type=media_type)

    return Route(path, send, name=f"{package} {name}")


@cache
def _content(package: str, name: str) -> bytes:
    return (files(package) / name).read_bytes()

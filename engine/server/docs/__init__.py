"""The page at `/docs`: every endpoint and field of /openapi.json, to be tried out.

The page is Swagger UI, in `vendor`, unchanged but for the addresses of its source maps and of the file of licences:
swagger-ui-dist 5.35.0 (Apache 2.0), with other libraries inside. It loads from and calls this server only.
"""

from __future__ import annotations

from sempre.engine.server.page_files import file_route, page_headers

# the style sheet has icons as data
HEADERS = page_headers(images="'self' data:")
ASSETS = ("docs.js", "vendor/swagger-ui.js", "vendor/swagger-ui.css")
DOCS_ROUTES = [
    file_route("/docs", __name__, "index.html", HEADERS),
    *(file_route(f"/docs/{name}", __name__, name, HEADERS) for name in ASSETS),
]

"""The page at `/`, its files under `/ui/`, and the API's description at `/docs`, all of it from this server alone.

Nothing here is dynamic: the page asks the API like any other client. Its policy lets it load and ask nothing from
elsewhere, run nothing that stands in a document, and be framed by nobody.
"""

from __future__ import annotations

from os import PathLike

from fastapi import APIRouter, FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ensemble_server.server.api.json_response import JSONResponse
from ensemble_server.server.web import FOLDER

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Swagger UI writes style attributes into its markup.
_DOCS_POLICY = _POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked again each time, and answered with 304 while nothing has changed
}

LINKS = {
    "models": "/v1/models",
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "openapi": "/openapi.json",
    "docs": "/docs",
    "health": "/health",
    "metrics": "/metrics",
}


def install_page(app: FastAPI, *, has_page: bool) -> None:
    """Adds the routes to `app`. Without a page (`server.web: false`) `/` has the links only."""
    app.include_router(_page_router(has_page=has_page))
    if has_page:
        app.mount("/ui", _Guarded(_Files(FOLDER), _POLICY))
    app.mount("/docs", _Guarded(_Files(FOLDER / "docs"), _DOCS_POLICY))


def _page_router(*, has_page: bool) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def root(request: Request) -> Response:
        """The page for whoever asks for HTML, which browsers do; links for all others."""
        if has_page and prefers_html(request.headers):
            return _document(FOLDER / "index.html", _POLICY, {"vary": "accept"})
        links = LINKS | ({"page": "/"} if has_page else {})
        return JSONResponse({"name": "ensemble-server", "links": links}, headers={"vary": "accept"})

    @router.api_route("/docs", methods=["GET", "HEAD"])
    async def docs() -> Response:
        return _document(FOLDER / "docs" / "index.html", _DOCS_POLICY)

    return router


def prefers_html(headers: Headers) -> bool:
    """Whether `Accept` names text/html with a quality above zero and not below JSON's. `*/*` alone is no wish."""
    accepted: dict[str, float] = {}
    for item in headers.get("accept", "").split(","):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        quality = next((parameter[2:] for parameter in parameters if parameter.startswith("q=")), "1")
        try:
            accepted[kind] = float(quality)
        except ValueError:
            accepted[kind] = 0.0
    return accepted.get("text/html", 0.0) > 0 and accepted["text/html"] >= accepted.get("application/json", 0.0)


def _document(path: PathLike[str], policy: str, headers: dict[str, str] | None = None) -> FileResponse:
    return FileResponse(
        path, media_type="text/html", headers=_HEADERS | {"content-security-policy": policy} | (headers or {})
    )


class _Files(StaticFiles):
    """What browsers load; not the package's own Python files."""

    def __init__(self, folder: PathLike[str]) -> None:
        super().__init__(directory=folder)

    def lookup_path(self, path: str):
        return ("", None) if path.endswith((".py", ".pyc")) else super().lookup_path(path)


class _Guarded:
    """ASGI layer that adds the headers to what `app` answers."""

    def __init__(self, app: ASGIApp, policy: str) -> None:
        self._app = app
        self._headers = _HEADERS | {"content-security-policy": policy}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        await self._app(scope, receive, send_guarded)

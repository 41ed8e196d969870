"""The page and its files as they are served. How the page behaves in a browser stands in tests/server/web."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from ensemble_server.server.api.page import prefers_html
from tests.server.api.conftest import asgi_client

BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


async def test_browsers_get_the_page_and_programs_get_links(host):
    async with asgi_client(host()) as client:
        page = await client.get("/", headers=BROWSER)
        links = await client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert '<script type="module" src="ui/app.js">' in page.text
    assert links.json()["links"]["models"] == "/v1/models"
    assert links.json()["links"]["page"] == "/"
    for answer in (page, links):
        assert "accept" in answer.headers["vary"].lower().split(", ")  # a cache may not mix them up


@pytest.mark.parametrize(
    ("accept", "is_page"),
    [
        (BROWSER["accept"], True),
        ("text/html", True),
        ("text/html;q=0.5, application/json", False),
        ("application/json", False),
        ("*/*", False),
        ("text/html;q=0", False),
        ("text/html;q=much", False),
        ("", False),
    ],
)
def test_who_asks_for_html_is_a_browser(accept, is_page):
    assert prefers_html(Headers({"accept": accept})) is is_page


@pytest.mark.parametrize("path", ["/", "/docs", "/ui/app.js", "/docs/swagger-ui.css"])
async def test_heads_are_answered(host, path):
    async with asgi_client(host()) as client:
        response = await client.head(path, headers=BROWSER)
    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize("path", ["/", "/ui/app.js", "/ui/style.css"])
async def test_nothing_from_elsewhere_and_nothing_inline_may_run(host, path):
    async with asgi_client(host()) as client:
        headers = (await client.get(path, headers=BROWSER)).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


async def test_with_keys_the_page_is_open_and_the_api_is_not(host):
    async with asgi_client(host({"api_keys": ("secret",)})) as client:
        for path in ("/", "/ui/app.js", "/docs", "/docs/swagger-ui-bundle.js"):
            assert (await client.get(path, headers=BROWSER)).status_code == 200
        for path in ("/v1/models", "/metrics", "/uix", "/ui", "/docsx"):
            assert (await client.get(path, headers=BROWSER)).status_code == 401


async def test_a_config_can_do_without_the_page(host):
    async with asgi_client(host({"web": False})) as client:
        assert "page" not in (await client.get("/", headers=BROWSER)).json()["links"]
        assert (await client.get("/ui/app.js")).status_code == 404
        assert (await client.get("/docs")).status_code == 200


@pytest.mark.parametrize(
    "path", ["/ui/__init__.py", "/ui/../api/auth.py", "/ui/%2e%2e/api/auth.py", "/ui/vendor/", "/docs/"]
)
async def test_only_files_for_browsers_are_served(host, path):
    async with asgi_client(host()) as client:
        assert (await client.get(path)).status_code == 404

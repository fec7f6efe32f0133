"""The files of the chat page as the gateway sends them: complete, typed, guarded, asked about once."""

from __future__ import annotations

import asyncio
import gzip
import re
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy.gateway import pages
from llamacpp_mqtt_deploy.gateway.pages import Pages, page_files

FOLDER = Path(pages.__file__).with_name("page")


def get(path: str, method: str = "GET", **asked: str) -> tuple[int, dict[str, str], bytes]:
    headers = {name.replace("_", "-").encode(): value.encode() for name, value in asked.items()}
    status, answered, body = Pages().respond(method, path, headers)
    return status, {name.decode(): value.decode() for name, value in answered}, body


def test_every_file_that_the_page_names_is_there() -> None:
    named = set(re.findall(r'(?:src|href)="([^"#]+)"', (FOLDER / "index.html").read_text("utf-8")))
    for script in FOLDER.glob("*.js"):
        named |= {
            name.removeprefix("./") for name in re.findall(r'(?:from |import\()"([^"]+)"', script.read_text("utf-8"))
        }
    assert {"page.js", "page.css", "vendored/marked.esm.js", "vendored/mqtt.esm.js"} <= named
    for name in named:
        status, headers, body = get(name)
        assert (status, headers["content-length"]) == (200, str(len(body))), name


def test_the_page_is_at_the_empty_path() -> None:
    status, headers, body = get("")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert body.startswith(b"<!doctype html>")


def test_everything_vendored_has_its_licence_beside_it() -> None:
    for script in (FOLDER / "vendored").glob("*.js"):
        assert "Permission is hereby granted" in script.with_name(script.name.split(".")[0] + ".LICENSE").read_text()


@pytest.mark.parametrize(
    "path", ["nothing", "../pages.py", "vendored/", "vendored/README.md", "page.js/", "index.html\x00", "//page.js"]
)
def test_what_is_no_file_of_the_page_is_not_found(path: str) -> None:
    status, headers, _ = get(path)
    assert status == 404
    assert headers["x-content-type-options"] == "nosniff"


def test_the_policy_lets_only_the_pages_own_scripts_run() -> None:
    directives = dict(part.strip().split(" ", 1) for part in get("")[1]["content-security-policy"].split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"
    assert directives["trusted-types"] == directives["base-uri"] == directives["frame-ancestors"] == "'none'"
    assert "connect-src 'self' ws://broker:9001;" in pages.policy(["ws://broker:9001"])


def test_the_page_has_neither_scripts_nor_styles_nor_handlers_in_its_html() -> None:
    html = (FOLDER / "index.html").read_text("utf-8")
    assert re.findall(r"<script(?![^>]* src=)", html) == []
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=", html) == []


def test_a_browser_that_has_a_file_is_told_so() -> None:
    etag = get("page.js")[1]["etag"]
    status, headers, body = get("page.js", if_none_match=f'"other", W/{etag}')
    assert (status, body, headers["etag"]) == (304, b"", etag)
    assert get("page.js", if_none_match='"other"')[0] == 200


def test_files_are_sent_compressed_to_who_can_read_that() -> None:
    plain, packed = get("vendored/mqtt.esm.js")[2], get("vendored/mqtt.esm.js", accept_encoding="br, gzip")
    assert packed[1]["content-encoding"] == "gzip"
    assert gzip.decompress(packed[2]) == plain
    assert len(packed[2]) < len(plain) / 3


def test_head_tells_the_length_and_other_methods_are_refused() -> None:
    status, headers, body = get("page.css", "HEAD")
    assert (status, body, headers["content-length"]) == (200, b"", str(len(page_files()["page.css"].body)))
    status, headers, _ = get("page.css", "POST")
    assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_a_first_visit_through_the_gateway_loads_less_than_60_kb() -> None:
    """MQTT.js is loaded only where the page is set to speak to a broker."""
    first = ["", *(name for name in page_files() if name.endswith((".js", ".css", ".svg")) and "mqtt" not in name)]
    assert sum(len(page_files()[name].compressed) for name in first) < 60_000


def test_it_is_an_asgi_application_that_can_be_mounted_anywhere() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    scope = {"type": "http", "method": "GET", "path": "/below/page.css", "root_path": "/below", "headers": []}
    asyncio.run(Pages()(scope, receive, send))
    assert (sent[0]["status"], sent[1]["body"]) == (200, page_files()["page.css"].body)

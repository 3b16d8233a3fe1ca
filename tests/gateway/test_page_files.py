"""The page's files as they are served: complete, small, nobody else's, under a policy that lets nothing in."""

import hashlib
import re
from importlib.resources import files

import pytest

from headrace.gateway.page import CONTENT_SECURITY_POLICY, assets

HTML = assets()["index.html"][0].decode()
SCRIPTS = {name: content.decode() for name, (content, _, _) in assets().items() if name.startswith("js/")}
STYLES = {name: content.decode() for name, (content, _, _) in assets().items() if name.startswith("css/")}
VENDOR = files("headrace.gateway") / "static" / "vendor"


def test_the_page_comes_with_its_policy(plain):
    http = plain.http
    response = http.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert "default-src 'none'; script-src 'self'; style-src 'self';" in CONTENT_SECURITY_POLICY
    assert http.head("/").content == b""


def test_a_file_that_is_known_is_not_sent_again(plain):
    http = plain.http
    first = http.get("/static/js/app.js")
    assert first.headers["content-type"] == "text/javascript; charset=utf-8"
    assert first.headers["cache-control"] == "no-cache"
    again = http.get("/static/js/app.js", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304
    assert again.content == b""
    assert http.get("/static/js/app.js", headers={"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["nothing.js", "", "js", "../page.py", "%2e%2e/page.py", "..%2fpage.py", "vendor/README.md", "js//app.js"]
)
def test_only_the_page_s_own_files_are_served(plain, path):
    response = plain.http.get(f"/static/{path}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


def test_everything_that_is_asked_for_is_there():
    asked = re.findall(r'(?:src|href)="/static/([^"]+)"', HTML)
    for name, script in SCRIPTS.items():
        for path in re.findall(r'(?:from|import) "(\.[^"]+)"', script):
            folder = name.rsplit("/", 1)[0]
            asked.append(path.replace("./", f"{folder}/") if path.startswith("./") else path.removeprefix("../"))
    assert len(asked) > 20
    assert [path for path in asked if path not in assets()] == []


def test_every_file_of_the_page_is_used():
    text = HTML + "".join(SCRIPTS.values())
    for name in assets():
        assert name == "index.html" or name.rsplit("/", 1)[-1] in text or name.endswith("LICENSE-MPL.txt"), name


def test_every_id_that_a_script_asks_for_exists_once():
    ids = re.findall(r'\sid="([^"]+)"', HTML)
    assert len(ids) == len(set(ids))
    made = {"s-temperature"}  # the fields of the settings are made by a script
    for script in SCRIPTS.values():
        for asked in re.findall(r'byId\("([^"]+)"\)', script):
            assert asked in ids or asked in made, asked
    for icon in re.findall(r'href="#(i-[a-z]+)"', HTML):
        assert icon in ids
    for icon in re.findall(r'icon(?:Button)?\("([a-z]+)"', "".join(SCRIPTS.values())):
        assert f"i-{icon}" in ids


def test_nothing_is_inline_and_nothing_comes_from_elsewhere():
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", HTML)
    assert re.findall(r"<script[^>]*>", HTML) == ['<script type="module" src="/static/js/app.js">']
    own = HTML + "".join(SCRIPTS.values()) + "".join(STYLES.values())
    assert set(re.findall(r"https?://[^\s\"'`)]+", own)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in own
    assert "url(" not in own
    assert "innerHTML" not in own


def test_the_page_is_small():
    sizes = {name: len(content) for name, (content, _, _) in assets().items() if "LICENSE" not in name}
    assert sum(sizes.values()) < 300_000, sizes


def test_vendored_files_are_the_published_ones_with_their_licences():
    table = re.findall(
        r"^\| `([^`]+)` \|.*\| ([^|]+) \| `([0-9a-f]{64})` \|$", (VENDOR / "README.md").read_text(), re.M
    )
    assert [name for name, _, _ in table] == ["marked.esm.js", "purify.min.js"]
    for name, licences, digest in table:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest
        texts = [(VENDOR / each).read_text() for each in re.findall(r"`([^`]+\.txt)`", licences)]
        assert texts
        assert all("Licen" in text or "licen" in text for text in texts)
    listed = {entry.name for entry in VENDOR.iterdir()}
    assert all(name in (VENDOR / "README.md").read_text() for name in listed - {"README.md"})

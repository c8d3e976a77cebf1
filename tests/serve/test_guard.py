"""Who is let in: tokens, hosts, origins, and what an answer tells a browser."""

import pytest

pytest.importorskip("fastapi", reason='needs pip install "flexkern[serve]"')
pytest.importorskip("httpx", reason='needs pip install "flexkern[test]"')

from serving import TOKEN, serving

from flexkern.serve.guard import validate_token
from flexkern.serve.server import Door


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("videos"), token=TOKEN) as running:
        yield running


GIVEN = [None, "", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN, "Bearer ÿ"]
ROUTES = ["/v1/videos", "/v1/models", "/v1/events", "/metrics", "/openapi.json", "/v1/videos/x/content", "/nothing"]


@pytest.mark.parametrize("given", GIVEN)
def test_without_the_token_nothing_is_told(guarded, given):
    headers = {"Authorization": (given or "").encode("latin-1")} if given is not None else {}
    client = type(guarded.client)(base_url=guarded.address)
    for path in ROUTES:
        answer = client.get(path, headers=headers)
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error" and TOKEN not in answer.text
    assert client.post("/v1/videos", json={"prompt": "a"}, headers=headers).status_code == 401


def test_with_the_token_all_is_open_and_without_it_the_page_is(guarded):
    assert guarded.client.get("/v1/videos").status_code == 200
    assert guarded.client.get("/v1/videos", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
    client = type(guarded.client)(base_url=guarded.address)
    for path in ("/", "/page.css", "/page.js", "/chart.js", "/icon.svg", "/health"):
        assert client.get(path).status_code == 200
    schema = guarded.client.get("/openapi.json").json()
    assert schema["paths"]["/v1/videos"]["post"]["security"] == [{"token": []}]
    assert "security" not in schema["paths"]["/health"]["get"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::2]"])
def test_another_host_is_not_this_server(shared, host):
    answer = shared.client.get("/v1/videos", headers={"Host": host})
    assert answer.status_code in (400, 403)  # 400: the server before it reads none at all
    assert answer.status_code == 400 or answer.json()["error"]["code"] == "wrong_host"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:80"])
def test_names_of_this_machine_are(shared, host):
    assert shared.client.get("/v1/videos", headers={"Host": host}).status_code == 200


FOREIGN = [("Origin", "https://evil.example"), ("Origin", "null"), ("Sec-Fetch-Site", "cross-site")]


@pytest.mark.parametrize("headers", [dict([pair]) for pair in [*FOREIGN, ("Sec-Fetch-Site", "same-site")]])
def test_a_page_of_another_origin_is_refused(shared, headers):
    answer = shared.client.post("/v1/videos", json={"prompt": "a"}, headers=headers)
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "wrong_origin"
    assert "access-control-allow-origin" not in answer.headers


def test_its_own_origin_is_not(shared):
    origin = shared.address.rstrip("/")
    headers = {"Origin": origin, "Sec-Fetch-Site": "same-origin"}
    assert shared.client.get("/v1/videos", headers=headers).status_code == 200


def test_every_answer_has_the_headers_that_keep_a_browser_narrow(shared):
    for path in ("/", "/v1/videos", "/nothing", "/v1/videos/x/content"):
        headers = shared.client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "'unsafe-inline'" not in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers


def test_the_page_has_no_script_or_style_in_line(shared):
    text = shared.client.get("/").text
    assert "<style" not in text and " style=" not in text and " on" + "click" not in text
    assert text.count("<script") == 1 and 'src="/page.js"' in text


@pytest.mark.parametrize(
    ("token", "why"), [("short", "at least 16"), ("a" * 15 + " b" * 9, "without spaces"), ("ä" * 20, "printable ASCII")]
)
def test_a_token_that_will_not_do(token, why):
    with pytest.raises(ValueError, match=why):
        validate_token(token)


def test_a_token_is_taken_without_the_line_end():
    assert validate_token(f" {TOKEN}\n") == TOKEN


def test_a_door_that_others_can_reach_needs_a_token():
    with pytest.raises(ValueError, match=r"0\.0\.0\.0 can be reached from other machines"):
        Door(host="0.0.0.0")
    assert Door(host="0.0.0.0", token=TOKEN).names == frozenset()
    assert Door(host="0.0.0.0", open=True).names == frozenset()
    assert {"localhost", "127.0.0.1"} <= Door(host="localhost").names
    with pytest.raises(ValueError, match="no host"):
        Door(host="no such host")
    with pytest.raises(ValueError, match="0 to 65535"):
        Door(port=65536)


def test_a_port_that_is_taken_is_told():
    with Door(port=0).bind() as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port}"):
            Door(port=port).bind()

"""Who may come in: keys, logins, origins, other sites, host names; and the program's flags that say so."""

import asyncio
import base64
import contextlib
import json
import logging

import gradio as gr
import httpx
import pytest
from fastapi import FastAPI
from support.http import Browser, StubPipeline, b64, handshake_status, post, serving
from support.pictures import grey

from qwen_realtime import RealtimeEngine
from server import EngineHolder, Guard, create_app, create_guard, create_routes, parse_args
from serving.startup import KEY_VARIABLE, is_loopback, warn_if_open

KEY = "k3y-of-the-house"
PATHS = ("health", "ready", "metrics", "docs", "openapi.json")
BODY = {"image": b64(grey()), "prompt": "negative"}


def basic(user: str, password: str) -> dict:
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture(scope="module")
def engine():
    with RealtimeEngine(StubPipeline()) as engine:
        yield engine


@pytest.fixture
def address(engine):
    with serving(EngineHolder(engine)) as address:
        yield address


def asked(guard: Guard, path="/health", method="GET", **headers) -> httpx.Response:
    """One request of an application with this guard, without a socket."""
    app = FastAPI(routes=create_routes(EngineHolder(), guard=guard))

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://editor.example") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(ask())


# Keys and logins


def test_the_key_opens_every_route_and_the_socket_in_each_of_its_forms(engine):
    with serving(EngineHolder(engine), guard=Guard(api_key=KEY)) as address:
        for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}, basic("anybody", KEY)):
            for path in PATHS:
                assert httpx.get(f"http://{address}/{path}", headers=headers).status_code == 200
            assert post(address, BODY, headers=headers).status_code == 200
            with Browser(address, additional_headers=headers) as browser:
                assert browser.until("status")["state"] == "ready"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer " + KEY[:-1]},
        {"authorization": KEY},
        {"authorization": "Bearer k\u00fcche"},
        {"x-api-key": ""},
        {"x-api-key": KEY + "x"},
        basic("anybody", "guess"),
        basic(KEY, ""),
        {"cookie": f"key={KEY}"},
    ],
)
def test_without_the_key_every_route_is_401_and_the_socket_does_not_open(engine, headers):
    headers = {name: value.encode("latin-1") for name, value in headers.items()}
    with serving(EngineHolder(engine), guard=Guard(api_key=KEY)) as address:
        for path in PATHS:
            answer = httpx.get(f"http://{address}/{path}", headers=headers)
            assert answer.status_code == 401 and answer.json()["kind"] == "login"
        answer = post(address, BODY, headers=headers)
        assert answer.status_code == 401 and "basic" in answer.headers["www-authenticate"].lower()
        if all(value.isascii() for value in headers.values()):
            assert handshake_status(address, **{name: value.decode() for name, value in headers.items()}) == 403
        assert httpx.get(f"http://{address}/health?api_key={KEY}", headers=headers).status_code == 401  # logs keep it


def test_with_a_login_and_a_key_either_is_enough_and_a_mixture_is_not():
    guard = Guard(("ann", "s3cret"), KEY)
    for headers, status in (
        (basic("ann", "s3cret"), 200),
        (basic("ann", KEY), 200),
        ({"x-api-key": KEY}, 200),
        ({"x-api-key": "s3cret"}, 401),
        (basic("bob", "s3cret"), 401),
        ({"authorization": "Bearer s3cret"}, 401),
    ):
        assert asked(guard, **headers).status_code == status, headers


def test_the_page_can_ask_the_guard_for_its_login():
    assert not Guard().locked and Guard(("ann", "s")).locked and Guard(api_key=KEY).locked
    both, key_only = Guard(("ann", "s3cret"), KEY), Guard(api_key=KEY)
    assert both.login("ann", "s3cret") and both.login("ann", KEY) and key_only.login("bob", KEY)
    assert not both.login("ann", "") and not key_only.login("ann", "s3cret") and not key_only.login(KEY, "")
    assert not Guard().login("ann", "s3cret")


def test_inside_the_page_the_routes_are_ours_and_its_login_takes_the_key(engine, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    guard = Guard(api_key=KEY)
    with gr.Blocks() as demo:
        gr.Markdown("the page")
    launched = {"prevent_thread_lock": True, "quiet": True, "ssr_mode": False, "server_name": "127.0.0.1"}
    routes = create_routes(EngineHolder(engine), guard=guard)
    demo.launch(**launched, auth=guard.login, app_kwargs={"routes": routes})
    try:
        with httpx.Client(base_url=demo.local_url, timeout=20) as browser:
            assert browser.get("config").status_code == browser.get("health").status_code == 401
            assert browser.post("login", data={"username": "ann", "password": "guess"}).status_code == 400
            assert browser.get("health").status_code == 401
            assert browser.post("login", data={"username": "ann", "password": KEY}).status_code == 200
            assert browser.get("config").status_code == browser.get("health").status_code == 200
            assert browser.post("edit", json=BODY).status_code == 200
            assert browser.get("edit").json()["kind"] == "method"  # and not the page
            assert "openapi.json" in browser.get("docs").text and browser.get("openapi.json").json()["paths"]["/edit"]
            assert browser.get("edit", headers={"origin": "https://evil.example"}).status_code == 403
    finally:
        demo.close()


def test_a_refused_request_costs_no_place_and_its_body_is_not_read(engine):
    with serving(EngineHolder(engine), guard=Guard(api_key=KEY)) as address:
        chunks = iter([b"{", *[b" " * 2**20] * 8])
        with contextlib.suppress(httpx.WriteError):  # refused while still being sent, which is as good
            assert post(address, None, content=chunks, headers={"content-type": "application/json"}).status_code == 401
        metrics = httpx.get(f"http://{address}/metrics", headers={"x-api-key": KEY}).text
    assert 'queue_requests{state="waiting"} 0' in metrics


# Origins and other sites

SITE = "https://app.example"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "content-type, x-api-key"}


@pytest.mark.parametrize("origin", [SITE, "http://editor.example:8080", "https://editor.example.evil.example", "null"])
def test_without_cors_a_page_of_another_site_gets_nothing_not_even_a_preflight(origin):
    for method in ("GET", "HEAD", "OPTIONS"):
        answer = asked(Guard(), method=method, origin=origin, **PREFLIGHT)
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_listed_site_is_let_in_and_no_other():
    guard = Guard(origins=[SITE])
    answer = asked(guard, origin=SITE)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == SITE
    assert "Server-Timing" in answer.headers["access-control-expose-headers"] and answer.headers["vary"] == "Origin"
    preflight = asked(guard, "/edit", "OPTIONS", origin=SITE, **PREFLIGHT)
    assert preflight.status_code == 204 and preflight.headers["access-control-allow-origin"] == SITE
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert "x-api-key" in preflight.headers["access-control-allow-headers"].lower()
    for origin in ("https://evil.example", "http://app.example", SITE + ".evil.example"):
        for path, method in (("/health", "GET"), ("/edit", "OPTIONS")):
            answer = asked(guard, path, method, origin=origin, **PREFLIGHT)
            assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


def test_a_listed_site_reads_refusals_too_and_needs_the_key_after_its_preflight():
    guard = Guard(api_key=KEY, origins=[SITE])
    assert asked(guard, "/edit", "OPTIONS", origin=SITE, **PREFLIGHT).status_code == 204
    refused = asked(guard, origin=SITE)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == SITE
    assert asked(guard, origin=SITE, **{"x-api-key": KEY}).status_code == 200


def test_the_socket_opens_to_a_listed_site_only(engine):
    with serving(EngineHolder(engine), guard=Guard(origins=[SITE])) as address:
        assert handshake_status(address, Origin=SITE) == 101
        assert handshake_status(address, Origin="https://evil.example") == 403


def test_what_a_browser_sends_by_itself_counts_for_our_own_page_only_even_when_every_site_is_let_in():
    guard = Guard(("ann", "s3cret"), KEY, origins=["*"])
    for origin, status in (("http://editor.example", 200), (SITE, 401), ("null", 401)):
        assert asked(guard, origin=origin, **basic("ann", "s3cret")).status_code == status
        assert asked(guard, origin=origin, **{"x-api-key": KEY}).status_code == 200
    app = FastAPI(routes=create_routes(EngineHolder(), guard=guard))
    app.tokens, app.cookie_id = {"token-1": "ann"}, "abc"  # as gradio.routes.App keeps its logins

    async def statuses():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://editor.example") as client:
            cookie = {"cookie": "access-token-abc=token-1"}
            origins = ({}, {"origin": "http://editor.example"}, {"origin": SITE}, {"origin": "null"})
            answers = [await client.get("/health", headers=cookie | origin) for origin in origins]
            assert all("access-control-allow-credentials" not in answer.headers for answer in answers)
            return [answer.status_code for answer in answers]

    assert asyncio.run(statuses()) == [200, 200, 401, 401]


def test_an_unlocked_server_of_this_machine_answers_to_this_machines_names_only(engine):
    app = create_app(EngineHolder(engine), create_guard(parse_args(["--allow-host", "editor.local"]), local_pages=True))

    async def status(host):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return (await client.get("/health", headers={"host": host, "origin": f"http://{host}"})).status_code

    for host in ("localhost", "127.0.0.1:8086", "[::1]:8086", "EDITOR.local"):
        assert asyncio.run(status(host)) == 200, host
    for host in ("evil.example", "evil.example:8086", "localhost.evil.example", "127.0.0.1.evil.example"):
        assert asyncio.run(status(host)) == 403, host


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://[", "http://localhost:1", ""])
def test_a_page_of_another_origin_is_refused(address, origin):
    assert handshake_status(address, Origin=origin) == 403
    answer = post(address, {"image": b64(grey()), "prompt": "negative"}, headers={"origin": origin})
    assert answer.status_code == 403


def test_the_own_origin_and_the_one_a_proxy_names_are_let_in(address):
    with Browser(address, origin=f"http://{address}") as browser:
        assert browser.until("status")["state"] == "ready"
    headers = {"x-forwarded-host": "editor.example"}
    with Browser(address, origin="https://editor.example", additional_headers=headers) as browser:
        assert browser.until("status")["state"] == "ready"


def test_auth_guards_every_route_and_takes_basic_credentials(engine):
    with serving(EngineHolder(engine), auth=("ann", "s3cret:ü")) as address:
        body = {"image": b64(grey()), "prompt": "negative"}
        good = {"authorization": "Basic " + base64.b64encode("ann:s3cret:ü".encode()).decode()}
        wrong = {"authorization": "Basic " + base64.b64encode(b"ann:guess").decode()}
        for headers in ({}, wrong, {"authorization": "Basic %%"}, {"cookie": "access-token-None=x"}):
            assert httpx.get(f"http://{address}/health", headers=headers).status_code == 401
            answer = post(address, body, headers=headers)
            assert answer.status_code == 401 and "basic" in answer.headers["www-authenticate"].lower()
            assert handshake_status(address, **headers) == 403
        assert httpx.get(f"http://{address}/health", headers=good).status_code == 200
        assert post(address, body, headers=good).status_code == 200
        with Browser(address, additional_headers=good) as browser:
            assert browser.until("status")["state"] == "ready"


def test_the_login_cookie_of_the_page_opens_the_routes(engine):
    app = FastAPI(routes=create_routes(EngineHolder(engine), ("ann", "s3cret")))
    app.tokens, app.cookie_id = {"token-1": "ann"}, "abc"  # as gradio.routes.App keeps its logins

    async def statuses():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [
                (await client.get("/health", headers={"cookie": f"access-token-unsecure-abc={token}"})).status_code
                for token in ("token-1", "token-2", "")
            ]

    assert asyncio.run(statuses()) == [200, 401, 401]


# Flags


@pytest.mark.parametrize(
    "flags",
    ["--api-key short", "--api-key naïve-key-of-me", "--cors app.example", "--cors https://a/b", "--queue 0",
     "--max-sessions 0", "--auth ann", "--port 0", "--ssl-keyfile k", "--share"],
)  # fmt: skip
def test_a_wrong_flag_ends_the_program_with_usage(flags, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(flags.split())
    assert end.value.code == 2 and "usage" in capsys.readouterr().err


def test_the_defaults_are_loopback_port_8086_closed_to_other_sites_and_no_lock(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    options = parse_args([])
    assert (options.host, options.port, options.cors, options.api_key) == ("127.0.0.1", 8086, [], None)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert parse_args([]).api_key == KEY and create_guard(parse_args([]), local_pages=True).locked


def test_sharing_without_a_lock_is_warned_of(caplog):
    caplog.set_level(logging.WARNING)
    warn_if_open("127.0.0.1", locked=False)
    warn_if_open("0.0.0.0", locked=True)
    assert not caplog.records and is_loopback("::1") and not is_loopback("0.0.0.0")
    warn_if_open("0.0.0.0", locked=False)
    warn_if_open("127.0.0.1", locked=False, share=True)
    assert ["0.0.0.0" in caplog.messages[0], "public link" in caplog.messages[1]] == [True, True]


def test_what_is_not_there_is_a_404_in_json_and_the_root_leads_to_the_docs():
    with_routes = create_app(EngineHolder())

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(with_routes), base_url="http://x") as client:
            missing, root = await client.get("/nothing"), await client.get("/")
            return missing, root, await client.get("/", follow_redirects=True)

    missing, root, page = asyncio.run(ask())
    assert missing.status_code == 404 and json.loads(missing.text)["kind"] == "no_such_path"
    assert root.status_code == 307 and page.headers["content-type"].startswith("text/html")

"""Whose word counts about a request: what the outermost layer makes of X-Forwarded headers."""

import asyncio

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse

from server import EngineHolder, create_app, create_guard, parse_args
from serving.access import Refusal, same_origin
from serving.proxy import BehindProxy, client_address


def seen(headers: dict, *, peer="127.0.0.1", path="/health", **options) -> dict:
    """What a route sees of a request that came from `peer` with these headers."""

    async def tell(scope, receive, send):
        request = Request(scope)
        about = {
            "client": client_address(scope), "scheme": scope["scheme"], "path": scope["path"],
            "host": request.headers.get("x-forwarded-host", request.headers["host"]),
            "forwarded": sorted(name for name in request.headers if "forwarded" in name), "own": same_origin(request),
        }  # fmt: skip
        await JSONResponse(about)(scope, receive, send)

    async def ask():
        transport = httpx.ASGITransport(BehindProxy(tell, **options), client=(peer, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://inner:7865") as client:
            return (await client.get(path, headers=headers)).json()

    return asyncio.run(ask())


FORWARDED = {
    "x-forwarded-for": "198.51.100.7", "x-forwarded-proto": "https", "x-forwarded-host": "editor.example:8443",
    "origin": "https://editor.example:8443",
}  # fmt: skip


def test_a_trusted_proxys_word_counts_and_nobody_elses_is_even_passed_on():
    believed = seen(FORWARDED)
    assert (believed["client"], believed["scheme"], believed["own"]) == ("198.51.100.7", "https", True)
    stranger = seen(FORWARDED, peer="203.0.113.5")
    assert (stranger["client"], stranger["scheme"], stranger["own"]) == ("203.0.113.5", "http", False)
    assert stranger["host"] == "inner:7865" and stranger["forwarded"] == []
    assert seen(FORWARDED, peer="203.0.113.5", trusted="10.0.0.1, 203.0.113.0/24")["own"]
    assert not seen(FORWARDED, trusted="10.0.0.1")["own"] and seen(FORWARDED, peer="203.0.113.5", trusted="*")["own"]


def test_of_a_chain_the_visitor_is_whom_the_last_trusted_proxy_saw():
    chain = FORWARDED | {"x-forwarded-for": "1.1.1.1, 198.51.100.7, 10.0.0.2"}  # the first may be the visitor's own invention
    assert seen(chain, peer="10.0.0.1", trusted="10.0.0.0/8")["client"] == "198.51.100.7"


@pytest.mark.parametrize(
    "headers, host",
    [
        ({"x-forwarded-host": "editor.example"}, "editor.example:8443"),  # by the browser's Origin
        ({"x-forwarded-host": "editor.example", "x-forwarded-port": "9000"}, "editor.example:9000"),
        ({"x-forwarded-host": "editor.example", "x-forwarded-port": "443"}, "editor.example"),
        ({"x-forwarded-host": "editor.example:8443, inner"}, "editor.example:8443"),
        ({"host": "editor.example", "x-forwarded-proto": "https"}, "editor.example:8443"),
        ({"x-forwarded-host": "other.example"}, "other.example"),
        ({"x-forwarded-host": "r.example"}, "r.example"),
    ],
)
def test_a_name_that_lost_its_port_on_the_way_gets_it_back(headers, host):
    about = seen({"origin": "https://editor.example:8443"} | headers)
    assert about["host"] == host and about["own"] == (host == "editor.example:8443")


def test_the_whole_public_address_is_believed_more_than_what_the_proxy_passes_on():
    about = seen(FORWARDED | {"x-forwarded-host": "wrong"}, root_path="https://editor.example:8443/edit")
    assert about["own"] and about["host"] == "editor.example:8443"
    assert seen({}, root_path="https://editor.example:8443/edit")["host"] == "inner:7865"  # no proxy on the way


def test_the_prefix_is_cut_off_where_the_proxy_left_it_on_and_a_route_of_that_name_stays():
    for path, own in {"/edit/edit": "/edit", "/edit/": "/", "/edit": "/edit", "/editor/x": "/editor/x", "/live": "/live"}.items():
        assert seen({}, path=path, root_path="/edit")["path"] == own, path


def test_a_name_that_was_pointed_here_is_refused_whatever_it_says_of_a_proxy():
    guard = create_guard(parse_args(["--root-path", "https://editor.example/edit"]), local_pages=True)

    def verdict(**headers):
        async def tell(scope, receive, send):
            try:
                guard.check(Request(scope))
                response = JSONResponse("in")
            except Refusal as refusal:
                response = refusal.response()
            await response(scope, receive, send)

        async def ask():
            transport = httpx.ASGITransport(BehindProxy(tell), client=("127.0.0.1", 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                return (await client.get("/health", headers=headers)).status_code

        return asyncio.run(ask())

    assert verdict(host="localhost:8086") == verdict(host="editor.example") == 200
    assert verdict(**{"host": "127.0.0.1:8086", "x-forwarded-host": "editor.example"}) == 200
    assert verdict(host="evil.example") == verdict(**{"host": "evil.example", "x-forwarded-host": "localhost"}) == 403
    assert verdict(**{"host": "localhost", "x-forwarded-host": "evil.example"}) == 403


def test_root_paths_that_are_none_end_the_program_with_usage(capsys):
    for good, kept in {"/edit/": "/edit", "/": "", "https://a.example:1/x/": "https://a.example:1/x"}.items():
        assert parse_args(["--root-path", good]).root_path == kept
    for bad in ("edit", "/a b", "ftp://x/y", "https://user@host/", "/edit?x=1", "//evil.example"):
        with pytest.raises(SystemExit):
            parse_args(["--root-path", bad])
        assert "expected one like /edit" in capsys.readouterr().err


def test_who_is_trusted_is_said_by_addresses_and_a_name_in_their_place_ends_the_program(capsys, monkeypatch):
    for good in ("*", "10.0.0.7", "127.0.0.1, 10.0.0.0/8,fd00::/8"):
        assert parse_args(["--forwarded-allow-ips", good]).forwarded_allow_ips == good
    for bad in ("proxy.example", "10.0.0.1/8", "10.0.0.1,", "127.0.0.1 10.0.0.1"):
        with pytest.raises(SystemExit):
            parse_args(["--forwarded-allow-ips", bad])
        assert "expected addresses or networks" in capsys.readouterr().err
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.0.0.7")
    assert parse_args([]).forwarded_allow_ips == "10.0.0.7"
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "")
    assert parse_args([]).forwarded_allow_ips == "127.0.0.1,::1"
    monkeypatch.setenv("SPACE_ID", "ann/editor")  # its platform's proxy is the only way in
    assert parse_args([]).forwarded_allow_ips == "*"


def test_the_server_without_the_page_works_under_a_prefix_too():
    app = BehindProxy(create_app(EngineHolder()), root_path="/edit")

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://inner:8086") as client:
            home, docs = await client.get("/edit/"), await client.get("/edit/docs", headers=FORWARDED)
            edits = [await client.post(path, json={}) for path in ("/edit/edit", "/edit")]
            return home, docs, edits

    home, docs, edits = asyncio.run(ask())
    assert home.status_code == 307 and home.headers["location"] == "docs"  # relative: /edit/docs
    assert docs.status_code == 200 and "curl https://editor.example:8443/edit/edit" in docs.text
    assert [answer.json()["kind"] for answer in edits] == ["loading", "loading"]

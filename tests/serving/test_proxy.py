"""Behind nginx and Caddy, as docs/proxy has them, under a prefix and TLS, on a port that is not the usual one: the page,
its endpoints, the routes and the live socket, with a login."""

import base64
import contextlib
import http.server
import io
import json
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file
from PIL import Image
from support import ROOT
from support.http import b64, wait_until
from support.page import PATIENCE_S, Program, await_frames, live, start_live
from support.pictures import answer, held_out, psnr_db
from websockets.sync.client import connect

from pipeline.images import open_image

PHOTO = held_out("chelsea.png")
LOGIN = ("ann", "s3cret")
GUIDE = """
            proxy_buffering off;
            proxy_redirect off;
            proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection "upgrade";
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-Host $host;
            proxy_set_header X-Forwarded-Proto $scheme;
"""  # the headers that Gradio's guide to nginx tells people to set


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The page under /edit with a login, and the page that the other tests' fixtures see."""
    program = Program(tmp_path_factory.mktemp("program") / "log.txt", "--root-path", "/edit", "--auth", ":".join(LOGIN))
    wait_until(lambda: httpx.get(program.url + "ready", auth=LOGIN).status_code == 200, "the model is loaded")
    yield program
    program.process.terminate()
    program.process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A folder with cert.pem and key.pem for localhost."""
    folder = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


@contextlib.contextmanager
def proxy(kind: str, program: Program, certificate: Path, folder: Path):
    """Yields the address under which this proxy offers the program. `kind`: nginx, caddy, guide."""
    name = "caddy" if kind == "caddy" else "nginx"
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed: apt-get install nginx-light caddy")
    port = free_port()
    text = (ROOT / "docs" / "proxy" / ("Caddyfile" if kind == "caddy" else "nginx.conf")).read_text()
    # The documented file but for what belongs to its machine: name, ports, certificate, writable folders.
    for theirs, ours in {
        "listen 443": f"listen 127.0.0.1:{port}", "\neditor.example {": f"\nlocalhost:{port} {{",
        "editor.example;": "localhost;", "cert.pem": f"{certificate}/cert.pem",
        "key.pem": f"{certificate}/key.pem", "127.0.0.1:7865": f"127.0.0.1:{program.port}",
    }.items():  # fmt: skip
        text = text.replace(theirs, ours)
    if kind == "guide":
        text = re.sub(r"(proxy_pass [^\n]+\n)[^}]*", lambda found: found[1] + GUIDE, text)
    if kind == "caddy":
        text = "{\n\tadmin off\n\tauto_https off\n}\n" + text
        command = ["caddy", "run", "--adapter", "caddyfile", "--config", folder / "config"]
    else:
        temporary = [f"{each}_temp_path {folder};" for each in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")]
        text = text.replace("http {", "http {\naccess_log off;\n" + "\n".join(temporary))
        options = f"daemon off; pid {folder}/pid;" + (" user root;" if os.geteuid() == 0 else "")  # may write the folder
        command = ["nginx", "-e", folder / "errors", "-p", folder, "-c", folder / "config", "-g", options]
    (folder / "config").write_text(text)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={"HOME": str(folder), "PATH": "/usr/sbin:/usr/bin:/bin"}
        )

    def answers() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    try:
        wait_until(answers, f"{name} listens")
        yield f"https://localhost:{port}/edit/"
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


@pytest.fixture(scope="module", params=["nginx", "caddy", "guide"])
def public(request, program, certificate, tmp_path_factory) -> str:
    with proxy(request.param, program, certificate, tmp_path_factory.mktemp(request.param)) as address:
        yield address


def origin_of(address: str) -> str:
    return address.removesuffix("/edit/")


@pytest.fixture
def visitor(public):
    """A browser's requests after its login: its cookies, its Origin."""
    with httpx.Client(base_url=public, verify=False, timeout=PATIENCE_S, headers={"origin": origin_of(public)}) as visitor:
        assert visitor.get("health").status_code == 401
        assert visitor.post("login", data=dict(zip(("username", "password"), LOGIN))).status_code == 200
        yield visitor


def test_the_page_and_its_endpoints_work_and_every_address_that_they_give_is_the_public_one(public, visitor, tmp_path):
    page = visitor.get("").text
    assert re.search(r'"root": ?"' + re.escape(public.rstrip("/")) + '"', page), re.findall(r'"root":[^,]+', page)
    assert httpx.get(public.rstrip("/"), verify=False).headers["location"].endswith("/edit/")
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    client = Client(
        public, auth=LOGIN, ssl_verify=False, verbose=False, download_files=str(tmp_path),
        headers={"origin": origin_of(public)},
    )  # fmt: skip
    path, about = client.predict(handle_file(tmp_path / "photo.png"), "make it black and white", api_name="/edit")
    client.close()
    assert psnr_db(open_image(Path(path).read_bytes()), answer("black and white", PHOTO)) > 18.0
    assert about["width"] == about["height"] == 256


def test_a_pictures_address_in_an_answer_of_the_pages_queue_can_be_opened(public, visitor, tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    with (tmp_path / "photo.png").open("rb") as file:
        (path,) = visitor.post("gradio_api/upload", files={"files": ("photo.png", file, "image/png")}).json()
    picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
    values = [picture, "make it sepia", 1, 64, 64, 0, 1.0, "", "crop", "output"]
    event = visitor.post("gradio_api/call/edit", json={"data": values}).json()["event_id"]
    events = visitor.get(f"gradio_api/call/edit/{event}").text
    url = json.loads(events.split("data: ")[-1])[0]["url"]
    assert url.startswith(public + "gradio_api/file="), url
    assert open_image(visitor.get(url).content).shape == (64, 64, 3)


def test_the_routes_work_for_the_page_and_their_documents_speak_of_the_same_folder(public, visitor):
    body = {"image": b64(PHOTO), "prompt": "make it black and white"}
    edited = visitor.post("edit", json=body)
    assert edited.status_code == 200, edited.text
    assert visitor.get("health").json()["state"] == "ready"
    docs, document = visitor.get("docs"), visitor.get("openapi.json").json()
    assert docs.status_code == 200 and not re.search(r'(?:href|src)="(?:/|http://(?:127|localhost))', docs.text)
    assert f"curl {public}edit" in docs.text
    assert document["servers"] == [{"url": "."}]  # relative to the document: `public` and a route's name
    stranger = visitor.post("edit", json=body, headers={"origin": "https://evil.example"})
    assert stranger.status_code == 403 and "evil.example" in stranger.json()["error"]
    assert httpx.post(public + "edit", json=body, verify=False).status_code == 401


def handshake(public: str, **headers):
    trust = ssl._create_unverified_context()
    return connect(public.replace("https", "wss") + "live", ssl=trust, additional_headers=headers)


def refusal(public: str, **headers) -> int:
    """The status of a handshake that is answered without a socket. Not by `connect`: over TLS it may wait for its reading
    thread for ever when it is refused."""
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    upgrade |= {"Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode()}
    return httpx.get(public + "live", headers=upgrade | headers, verify=False, timeout=PATIENCE_S).status_code


def test_the_live_socket_opens_to_the_page_and_edits(public, visitor):
    cookie = "; ".join(f"{name}={value}" for name, value in visitor.cookies.items())
    with handshake(public, Origin=origin_of(public), Cookie=cookie) as socket:
        socket.send(json.dumps({"type": "params", "prompt": "make it black and white", "width": 64, "height": 64}))
        file = io.BytesIO()
        Image.fromarray(PHOTO).save(file, "JPEG")
        socket.send(struct.pack("<I", 1) + file.getvalue())
        while isinstance(data := socket.recv(timeout=PATIENCE_S), str):
            assert json.loads(data)["type"] != "error", data
    length = struct.unpack_from("<I", data, 4)[0]
    assert open_image(data[8 + length :]).shape == (64, 64, 3)


def test_the_live_socket_is_refused_to_other_pages_and_without_a_login(public, visitor):
    cookie = "; ".join(f"{name}={value}" for name, value in visitor.cookies.items())
    for headers in ({"Origin": "https://evil.example", "Cookie": cookie}, {"Origin": origin_of(public)}):
        assert refusal(public, **headers) == 403


# In the browser


@pytest.fixture
def open_public(browser):
    """open_public(address) -> a page that is logged in at this address."""
    contexts = []

    def open_public(address: str):
        context = browser.new_context(ignore_https_errors=True)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_S * 1000)
        page = context.new_page()
        page.goto(address)
        log_in(page)
        page.wait_for_selector(".live")
        return page

    yield open_public
    for context in contexts:
        context.close()


def log_in(page):
    page.get_by_label("username").fill(LOGIN[0])
    page.get_by_label("password").fill(LOGIN[1])
    page.get_by_role("button", name="Login").click()


def start(page):
    page.locator(".live").get_by_role("button", name="Sepia", exact=True).click()
    page.get_by_role("button", name="Start", exact=True).click()


def test_the_live_view_runs_through_the_proxy_over_its_socket(public, open_public):
    page = open_public(public)
    start_live(page)
    await_frames(page, 2)
    assert live(page, "link") == "socket"


def test_where_the_server_refuses_the_page_the_live_view_stops_and_says_what_blocks_it(program, open_public):
    page = open_public(program.url)
    why = "Requests from 'https://a.example:8443' are not allowed here: this is a.example."
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.route_web_socket("**/live", lambda socket: (asked.append(socket.url), socket.close()))
    page.route("**/edit", lambda route: route.fulfill(status=403, json={"error": why, "kind": "forbidden"}))
    start(page)
    page.wait_for_selector(".live[data-state=failed]")
    assert why in page.locator(".message").inner_text()
    before = [url for url in asked if url.endswith(("/live", "/health", "/edit"))]
    assert 4 <= len(before) <= 12, before
    page.wait_for_timeout(500)  # the claim is about this half second
    assert before == [url for url in asked if url.endswith(("/live", "/health", "/edit"))]


@pytest.mark.parametrize("wrong", ["socket", "posts"])
def test_where_nothing_succeeds_the_page_asks_ever_more_slowly(program, open_public, wrong):
    page = open_public(program.url)
    tries = []

    def count(*args):
        tries.append(args)

    page.route_web_socket("**/live", lambda socket: (wrong == "socket" and count(socket), socket.close()))
    if wrong == "socket":  # a server that is loading, and a socket that opens and closes
        page.route("**/health", lambda route: route.fulfill(json={"state": "loading"}))
    else:
        failing = {"status": 500, "json": {"error": "The model failed."}}
        page.route("**/edit", lambda route: (count(route), route.fulfill(**failing)))
    page.clock.install()
    start(page)
    for _ in range(120):
        page.clock.run_for(500)
    assert 6 <= len(tries) <= 40, f"{len(tries)} tries in a minute"


def test_inside_another_sites_page_the_login_says_what_blocks_it_and_leads_to_a_tab_where_it_works(program, browser):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(f'<iframe src="http://localhost:{program.port}/" width="900" height="700">'.encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other, browser.new_context() as context:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        context.set_default_timeout(PATIENCE_S * 1000)
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{other.server_address[1]}/")  # another site than localhost
        frame = page.frame_locator("iframe")
        with page.expect_response("**/login") as login:
            log_in(frame)
        assert login.value.status == 200
        assert "cookie" in frame.locator(".auth").inner_text()
        with context.expect_page() as opened:
            frame.get_by_role("link", name="Open this page in a tab of its own").click()
        log_in(opened.value)
        opened.value.wait_for_selector(".live")
        other.shutdown()

"""Front ends of other people's on this machine, against `python server.py` as it starts without flags: what a page at
another port of localhost sends and reads, preflight and all. The page is the React front end of the seed of this
project; the requests are its own, written anew."""

import base64
import socket
import subprocess
import sys

import httpx
import pytest
from support import ROOT
from support.http import b64, handshake_status, wait_until
from support.pictures import answer, held_out, psnr_db

from pipeline.images import encode_jpeg, open_image
from server import Guard, create_guard, parse_args

FIRST, SECOND = held_out("chelsea.png"), held_out("coffee.png")
PAGES = ["http://localhost:3000", "http://127.0.0.1:5173", "http://[::1]:8080", "https://localhost", "http://LOCALHOST:3000"]
STRANGERS = [
    "null", "https://evil.example", "http://localhost.evil.example:3000", "http://127.0.0.1.evil.example", "http://evil-localhost",
    "http://127.0.0.2:3000", "http://localhost:3000.evil.example", "http://localhost@evil.example", "http://192.168.0.9:3000",
    "ftp://localhost", "http://localhost:", "http://localhost:3000/", "file://", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """host:port of `python server.py --model pocket`, ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("wb") as output:
        command = [sys.executable, "server.py", "--model", "pocket", "--device", "cpu", "--port", str(port)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"http://localhost:{port}/ready", timeout=20).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(ready, "the server is ready")
        yield f"localhost:{port}"
    finally:
        process.terminate()
        process.wait(20)


def jpeg_url(picture) -> str:
    """As a canvas gives it."""
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(picture, 90)).decode()


def press(server: str, prompt="make it black and white", *, image=FIRST, ref_image=None, steps=2, use_cfg=False) -> httpx.Response:
    """What the page does when its button is pressed: it sends all six fields, whichever tab is open."""
    fields = {
        "image": jpeg_url(image), "prompt": prompt, "steps": steps, "blend_ratio": 0.5, "use_cfg": use_cfg,
        "ref_image": None if ref_image is None else jpeg_url(ref_image),
    }  # fmt: skip
    headers = {"Origin": PAGES[0], "Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}
    answer = httpx.post(f"http://{server}/edit", json=fields, headers=headers, timeout=60)
    assert answer.headers["access-control-allow-origin"] == PAGES[0], answer.text  # or the page could not read it
    return answer


def shown(answer: httpx.Response):
    """The picture that the page shows, after what it reads of the answer."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert isinstance(body["elapsed"], float) and 0 < body["elapsed"] < 60
    return open_image(base64.b64decode(body["image"]))


def preflight(server: str, origin: str, **headers) -> httpx.Response:
    asks = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    return httpx.options(f"http://{server}/edit", headers=asks | headers, timeout=20)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_of_this_machine_may_use_a_server_of_this_machine(server, page):
    asked = preflight(server, page)
    assert asked.is_success and asked.headers["access-control-allow-origin"] == page
    assert "content-type" in asked.headers["access-control-allow-headers"].lower()
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert "access-control-allow-private-network" not in asked.headers
    private = preflight(server, page, **{"Access-Control-Request-Private-Network": "true"})
    assert private.headers["access-control-allow-private-network"] == "true"
    assert httpx.get(f"http://{server}/health", headers={"Origin": page}).headers["access-control-allow-origin"] == page
    assert handshake_status(server, Origin=page) == 101


@pytest.mark.parametrize("origin", STRANGERS)
def test_no_other_page_may_not_even_one_whose_name_looks_like_this_machine(server, origin):
    for refused in (
        preflight(server, origin, **{"Access-Control-Request-Private-Network": "true"}),
        httpx.post(f"http://{server}/edit", json={"image": b64(FIRST), "prompt": "x"}, headers={"Origin": origin}),
    ):
        assert refused.status_code == 403
        assert not [name for name in refused.headers if name.startswith("access-control")]
    assert handshake_status(server, Origin=origin) == 403


def test_each_of_the_pages_tabs_gets_its_picture(server):
    assert psnr_db(shown(press(server)), answer("black and white", FIRST)) > 18.0
    mixed = (FIRST.astype(float) + SECOND) / 2
    together = answer("black and white", mixed.round().astype("uint8"))
    assert psnr_db(shown(press(server, ref_image=SECOND)), together) > 18.0
    assert shown(press(server, steps=8)).shape == (256, 256, 3)


def test_its_cfg_box_turns_on_the_guidance_that_the_stock_pipeline_turns_on(server):
    off, on = shown(press(server)), shown(press(server, use_cfg=True))
    for scale, picture in ((1.0, off), (4.0, on)):
        fields = {"image": jpeg_url(FIRST), "prompt": "make it black and white", "steps": 2, "cfg_scale": scale}
        told = httpx.post(f"http://{server}/edit", json=fields, timeout=60)
        assert (shown(told) == picture).all(), scale
    assert (off != on).any()


def test_use_cfg_that_says_nothing_clear_is_refused(server):
    body = {"image": b64(FIRST), "prompt": "x"}
    for fields, says in (({"use_cfg": "yes"}, "use_cfg is 'yes'"), ({"use_cfg": True, "cfg_scale": 2}, "one of them")):
        refused = httpx.post(f"http://{server}/edit", json=body | fields, timeout=20)
        assert refused.status_code == 400 and says in refused.json()["error"]


def test_what_went_wrong_is_where_the_page_looks_for_it(server):
    refused = press(server, prompt="")
    assert refused.status_code == 400 and "prompt is empty" in refused.json()["detail"]
    missing = httpx.get(f"http://{server}/nothing", timeout=20).json()
    assert missing["detail"] == missing["error"]


def test_a_locked_or_a_public_server_lets_no_page_in_that_is_not_listed():
    for flags in (["--api-key", "k3y-of-the-house"], ["--auth", "ann:s3cret"], ["--host", "0.0.0.0"]):
        guard = create_guard(parse_args(flags), local_pages=True)
        assert isinstance(guard, Guard) and not guard.allows_origin("http://localhost:3000"), flags
        assert create_guard(parse_args([*flags, "--cors", "http://localhost:3000"]), local_pages=True).allows_origin("http://localhost:3000")
    assert create_guard(parse_args([]), local_pages=True).allows_origin("http://localhost:3000")

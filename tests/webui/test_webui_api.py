"""What programs call: the two endpoints through Gradio's own client, against the running program; and MCP where its
package is there."""

import asyncio
import base64
import contextlib
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from gradio_client import Client, exceptions, handle_file
from support.http import StubPipeline
from support.page import PATIENCE_S, PRESETS, Program
from support.pictures import assert_edited, held_out

from pipeline.images import blend, encode_png, fit, open_image
from qwen_realtime import EditParams, EngineConfig, RealtimeEngine
from server import EngineHolder
from webui.collage import collage
from webui.mcp import mcp_missing, own_file
from webui.work import settings_inside
from webui_realtime import launch, parse_args

FIRST, SECOND = held_out("chelsea.png"), held_out("coffee.png")


@pytest.fixture(scope="module")
def mcp_program(program):
    if mcp_missing() is not None:
        pytest.skip(mcp_missing())
    program.until(lambda health: health["state"] == "ready", "the model is loaded")
    return program


@pytest.fixture(scope="module")
def client(program, tmp_path_factory):
    program.until(lambda health: health["state"] == "ready", "the model is loaded")
    client = Client(program.url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))
    yield client
    client.close()


def file(folder: Path, name: str, picture: np.ndarray) -> dict:
    (folder / name).write_bytes(encode_png(picture))
    return handle_file(str(folder / name))


def test_only_the_two_endpoints_are_told_each_with_its_names_and_the_engines_defaults(client):
    endpoints = client.view_api(return_format="dict")
    assert sorted(endpoints["named_endpoints"]) == ["/composite", "/edit"] and not endpoints["unnamed_endpoints"]
    for name, pictures in {"/edit": ["image"], "/composite": ["image", "ref_image"]}.items():
        endpoint = endpoints["named_endpoints"][name]
        parameters = {p["parameter_name"]: p for p in endpoint["parameters"]}
        assert [n for n, p in parameters.items() if not p["parameter_has_default"]] == [*pictures, "prompt"]
        for field in ("steps", "seed", "cfg_scale", "negative_prompt", "fit", "reference_area"):
            assert parameters[field]["parameter_default"] == getattr(EditParams, field), field
        assert "by an instruction in words" in endpoint["description"]


def test_edit_gives_the_right_picture_with_its_settings_inside_and_says_how_long_it_took(client, tmp_path):
    path, about = client.predict(file(tmp_path, "in.png", FIRST), "make it black and white", seed=7, api_name="/edit")
    assert_edited(open_image(Path(path).read_bytes()), "black and white", FIRST)
    assert (about["width"], about["height"], about["seed"]) == (256, 256, 7) and about["stages_ms"]["denoise"] > 0
    inside = settings_inside(Path(path).read_bytes())
    assert (inside.prompt, inside.seed, inside.width) == ("make it black and white", 7, 256)
    path, _ = client.predict(
        file(tmp_path, "wide.png", fit(FIRST, 200, 100)), "make it sepia", width=128, height=64, api_name="/edit"
    )
    assert open_image(Path(path).read_bytes()).shape == (64, 128, 3)


def test_an_edit_without_a_size_has_the_pictures_shape_and_a_cut_one_is_said(client, tmp_path):
    picture = file(tmp_path, "odd.png", fit(FIRST, 200, 133))
    path, about = client.predict(picture, "make it sepia", height=75, api_name="/edit")
    assert open_image(Path(path).read_bytes()).shape == (75, 113, 3) and about["notes"] == []
    _, about = client.predict(picture, "make it sepia", width=75, height=75, api_name="/edit")
    assert about["notes"] == ["fit: picture 1 of 200x133 was cut to the shape of 75x75"]


@pytest.mark.parametrize("mode", ["references", "blend", "collage"])
def test_composite_uses_both_pictures_as_its_mode_says(client, tmp_path, mode):
    own = {
        "references": {"prompt": PRESETS["Side by side"]},
        "blend": {"prompt": "make it black and white", "blend_ratio": 0.3},
        "collage": {"prompt": "make it black and white", "across": 0.3, "down": 0.6, "scale": 0.5},
    }[mode]
    pictures = file(tmp_path, "1.png", FIRST), file(tmp_path, "2.png", SECOND)
    path, _ = client.predict(*pictures, mode=mode, **own, api_name="/composite")
    output = open_image(Path(path).read_bytes())
    if mode == "references":
        assert_edited(output, "side by side", FIRST, SECOND, at_least_db=16.0)
    else:
        flat = blend(FIRST, SECOND, 0.3) if mode == "blend" else collage(FIRST, SECOND, across=0.3, down=0.6, scale=0.5, opacity=1.0)
        assert_edited(output, "black and white", flat)


@pytest.mark.parametrize(
    "values, says",
    [
        ({"prompt": "   "}, "prompt is empty"),
        ({"prompt": "x", "steps": 9}, "steps is 9"),
        ({"prompt": "x", "steps": 2.5}, "steps is 2.5"),
        ({"prompt": "x", "width": 100.5, "height": 64}, "width is 100.5"),
        ({"prompt": "x", "fit": "stretch"}, "fit is"),
        ({"prompt": "x", "seed": -1}, "seed is -1"),
    ],
    ids=["no prompt", "steps", "half a step", "width", "fit", "seed"],
)  # fmt: skip
def test_bad_input_is_told_and_the_next_call_works(client, tmp_path, values, says):
    with pytest.raises(exceptions.AppError, match=says):
        client.predict(file(tmp_path, "in.png", FIRST), **values, api_name="/edit")
    with pytest.raises(exceptions.AppError, match="mode is"):
        pictures = file(tmp_path, "1.png", FIRST), file(tmp_path, "2.png", SECOND)
        client.predict(*pictures, "x", mode="edit", api_name="/composite")


def test_a_file_that_is_no_picture_is_told(client, tmp_path):
    (tmp_path / "in.png").write_bytes(b"no picture")
    with pytest.raises(exceptions.AppError, match="not a picture"):
        client.predict(handle_file(str(tmp_path / "in.png")), "x", api_name="/edit")


def raw_call(url: str, api_name: str, *values) -> str:
    """The events of a call that sends what it likes, as text."""
    call = httpx.post(f"{url}gradio_api/call/{api_name}", json={"data": values}, timeout=PATIENCE_S)
    if call.status_code != 200:
        return call.text
    return httpx.get(f"{url}gradio_api/call/{api_name}/{call.json()['event_id']}", timeout=PATIENCE_S).text


@pytest.mark.parametrize("where", ["path", "url in path's place"])
def test_nothing_is_fetched_for_a_caller_and_no_path_of_its_is_opened(ready, tmp_path, where):
    (tmp_path / "secret.png").write_bytes(encode_png(FIRST))
    path = str(tmp_path / "secret.png") if where == "path" else f"http://127.0.0.1:{ready.port}/docs"
    picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
    before = ready.health()["stats"]["frames"]
    events = raw_call(ready.url, "edit", picture, "make it sepia", 2, 0, 0, 0, 1.0, "", "crop", "output")
    assert "error" in events and "complete" not in events, events
    assert ready.health()["stats"]["frames"] == before
    if where != "path":
        assert "came as an address" in events


def test_a_private_event_of_the_page_cannot_be_called_by_name(ready):
    assert httpx.post(ready.url + "gradio_api/call/edit_1", json={"data": []}, timeout=PATIENCE_S).status_code == 404 or (
        "error" in raw_call(ready.url, "edit_1")
    )


CALL_AND_WAIT = """
import sys
from gradio_client import Client, handle_file
client = Client(sys.argv[1], verbose=False)
client.predict(handle_file(sys.argv[2]), "keep", width=64, height=64, api_name="/edit")
"""


def test_a_killed_client_frees_its_session_within_2_s(tmp_path):
    """Its edit is held in the model, so that nothing but the client's end can free the session."""
    (tmp_path / "in.png").write_bytes(encode_png(FIRST))
    stub = StubPipeline()
    stub.gate.clear()
    with RealtimeEngine(stub, EngineConfig()) as engine, served(engine) as url:
        caller = subprocess.Popen([sys.executable, "-c", CALL_AND_WAIT, url, str(tmp_path / "in.png")])
        try:
            assert stub.started.acquire(timeout=PATIENCE_S), "its edit never began"
            assert engine.stats().sessions == 1
        finally:
            caller.kill()
            caller.wait()
        killed = time.monotonic()
        while engine.stats().sessions and time.monotonic() < killed + PATIENCE_S:
            stub.started.acquire(timeout=0.01)  # nothing comes: only a rest for the other threads
        took_s = time.monotonic() - killed
        stub.gate.set()
    assert took_s <= 2.0, f"{took_s:.1f} s"


@contextlib.contextmanager
def served(engine, *flags: str):
    """The page over this engine, in this process; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    demo = launch(EngineHolder(engine), parse_args(["--port", str(port), *flags]))
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        demo.close()


def test_with_a_key_the_endpoints_want_it_too_and_take_it_as_the_password(tmp_path):
    with RealtimeEngine(StubPipeline(), EngineConfig()) as engine, served(engine, "--api-key", "a-long-key") as url:
        with pytest.raises(exceptions.AuthenticationError):
            Client(url, verbose=False)
        with pytest.raises(ValueError, match="Could not login"):
            Client(url, auth=("me", "a-wrong-key"), verbose=False)
        assert "Not authenticated" in raw_call(url, "edit", None, "x")
        client = Client(url, auth=("me", "a-long-key"), verbose=False, download_files=str(tmp_path))
        path, _ = client.predict(file(tmp_path, "in.png", FIRST), "negative", width=64, height=64, api_name="/edit")
        assert np.array_equal(open_image(Path(path).read_bytes()), 255 - fit(FIRST, 64, 64))
        client.close()


def test_without_its_package_or_with_a_lock_mcp_ends_the_program_with_what_to_do(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mcp", None)  # as if it were not installed
    assert "gradio[mcp]" in mcp_missing()
    with pytest.raises(SystemExit):
        parse_args(["--mcp"])
    assert 'pip install "gradio[mcp]"' in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "mcp", type(sys)("mcp"))
    assert parse_args(["--mcp"]).mcp and not parse_args([]).mcp
    with pytest.raises(SystemExit):
        parse_args(["--mcp", "--api-key", "12345678"])
    assert "cannot be locked" in capsys.readouterr().err


@pytest.mark.parametrize(
    "address, path",
    [
        ("http://127.0.0.1:7865/gradio_api/file=/tmp/gradio/ab/photo.png", "/tmp/gradio/ab/photo.png"),
        ("https://editor.example/edit/gradio_api/file=/tmp/gradio/ab/a%20photo%23.png", "/tmp/gradio/ab/a photo#.png"),
        ("http://127.0.0.1:7865/docs", None),
        ("http://127.0.0.1:7865/gradio_api/file=", None),
        ("http://127.0.0.1:7865/gradio_api/file=http://evil.example/x.png", None),
        ("http://127.0.0.1:7865/gradio_api/file=http%3A%2F%2Fevil.example/x.png", None),
        ("ftp://127.0.0.1/gradio_api/file=/tmp/gradio/x.png", None),
        ("http://[/gradio_api/file=/tmp/gradio/x.png", None),
        ("http://evil.example/?x=/gradio_api/file=/tmp/gradio/x.png", None),
        ("/tmp/gradio/ab/photo.png", None),
    ],
)
def test_only_the_address_of_an_uploaded_file_is_read_as_its_path(address, path):
    assert own_file(address) == path


def over_mcp(program: Program, use):
    """What the coroutine `use(session)` returns, over a session of the official client in a thread of its own."""

    async def speak():
        from mcp import ClientSession
        from mcp.client.streamable_http import streamable_http_client

        async with (
            streamable_http_client(program.url + "gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            return await use(session)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, speak()).result(PATIENCE_S)


def upload(url: str, picture: np.ndarray) -> str:
    """The address of an uploaded file as `gradio upload-mcp` makes it."""
    files = {"files": ("a photo #1.png", encode_png(picture), "image/png")}
    (path,) = httpx.post(url + "gradio_api/upload", files=files, timeout=PATIENCE_S).raise_for_status().json()
    return f"{url}gradio_api/file={quote(path)}"


async def nothing(progress, total, message):
    pass


@pytest.mark.parametrize("progress", [None, nothing], ids=["no progress token", "progress token"])
@pytest.mark.parametrize("given", ["uploaded", "data"])
def test_over_mcp_a_picture_comes_back_however_it_is_given_and_asked_for(mcp_program, given, progress):
    data = "data:image/png;base64," + base64.b64encode(encode_png(FIRST)).decode()
    picture = upload(mcp_program.url, FIRST) if given == "uploaded" else data

    async def edit(session):
        tools = {tool.name: tool for tool in (await session.list_tools()).tools}
        name = next(name for name in tools if name.endswith("edit"))
        arguments = {"image": picture, "prompt": "make it black and white", "seed": 7}
        return tools, await session.call_tool(name, arguments, progress_callback=progress)

    tools, answer = over_mcp(mcp_program, edit)
    assert len(tools) == 2 and all("instruction in words" in tool.description for tool in tools.values())
    assert not answer.isError, answer.content
    (image,) = (content for content in answer.content if content.type == "image")
    assert image.mimeType == "image/png"
    assert_edited(open_image(base64.b64decode(image.data)), "black and white", FIRST)
    texts = [content.text for content in answer.content if content.type == "text"]
    assert open_image(httpx.get(re.search(r"http\S+", texts[0])[0]).content).shape == (256, 256, 3)
    assert "'seed': 7" in texts[1], texts


def test_over_mcp_two_uploaded_pictures_are_edited_together(mcp_program):
    pictures = {"image": upload(mcp_program.url, FIRST), "ref_image": upload(mcp_program.url, SECOND)}

    async def composite(session):
        name = next(tool.name for tool in (await session.list_tools()).tools if tool.name.endswith("composite"))
        return await session.call_tool(name, pictures | {"prompt": PRESETS["Side by side"]})

    answer = over_mcp(mcp_program, composite)
    (image,) = (content for content in answer.content if content.type == "image")
    assert_edited(open_image(base64.b64decode(image.data)), "side by side", FIRST, SECOND, at_least_db=16.0)


@pytest.mark.parametrize("address", ["docs", "gradio_api/file={secret}", "gradio_api/file=/dev/zero"])
def test_over_mcp_no_address_is_fetched_and_no_file_read_that_was_not_uploaded(mcp_program, tmp_path, address):
    (tmp_path / "secret.png").write_bytes(encode_png(FIRST))
    picture = mcp_program.url + address.format(secret=tmp_path / "secret.png")

    async def edit(session):
        name = next(tool.name for tool in (await session.list_tools()).tools if tool.name.endswith("edit"))
        return await session.call_tool(name, {"image": picture, "prompt": "x"})

    before = mcp_program.health()["stats"]["frames"]
    answer = over_mcp(mcp_program, edit)
    assert answer.isError and not [content for content in answer.content if content.type == "image"], answer.content
    assert mcp_program.health()["stats"]["frames"] == before

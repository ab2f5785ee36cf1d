"""What a stranger may make the programs do: names, files, bodies, connections, the queue, logins. Against what really
serves: the page as `launch` serves it, and both programs as processes where the process matters."""

import contextlib
import json
import os
import socket
import threading
import time

import gradio as gr
import httpx
import pytest
from support.http import PATIENCE_S, StubPipeline, b64, wait_until
from support.pictures import grey
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import serving.connections
import serving.door
from pipeline.images import EditError, encode_png
from qwen_realtime import EngineConfig, RealtimeEngine
from serving.guesses import FREE_TRIES, Guesses
from serving.holder import EngineHolder
from webui import uploads
from webui.uploads import own_folder
from webui_realtime import launch, parse_args

SETTINGS = [1, 64, 64, 0, 1, "", "crop", "output"]
JSON = {"content-type": "application/json"}


class Served:
    def __init__(self, demo, port, pipeline, folder):
        self.demo, self.port, self.pipeline, self.folder = demo, port, pipeline, folder
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(timeout=PATIENCE_S)  # making one costs more than a request

    def get(self, path, **headers):
        self.client.cookies.clear()
        return self.client.get(self.url + path, headers=headers)

    def post(self, path, body=None, *, content=None, **headers):
        content = json.dumps(body) if content is None else content
        return self.client.post(self.url + path, content=content, headers=JSON | headers)

    def call(self, data, name="edit") -> str:
        event = self.post(f"/gradio_api/call/{name}", {"data": data}).json()["event_id"]
        with self.client.stream("GET", f"{self.url}/gradio_api/call/{name}/{event}") as answer:
            return answer.read().decode()

    def join(self, session):
        """One edit in Gradio's queue, that no one listens to."""
        fn = next(i for i, fn in self.demo.fns.items() if fn.api_name == "edit")
        data = [{"path": self.uploaded, "meta": {"_type": "gradio.FileData"}}, "keep it", *SETTINGS]
        return self.post("/gradio_api/queue/join", {"data": data, "fn_index": fn, "session_hash": session})

    @property
    def uploaded(self) -> str:
        files = {"files": ("in.png", encode_png(grey()), "image/png")}
        return self.client.post(f"{self.url}/gradio_api/upload", files=files).json()[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def page(*flags):
    pipeline, port = StubPipeline(), free_port()
    before = os.environ.get("GRADIO_TEMP_DIR")
    folder = own_folder()
    with RealtimeEngine(pipeline, EngineConfig(max_sessions=32)) as engine:
        demo = launch(EngineHolder(engine), parse_args(["--port", str(port), *flags]))
        served = Served(demo, port, pipeline, folder)
        try:
            yield served
        finally:
            pipeline.gate.set()
            served.client.close()
            demo.close(verbose=False)
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


@pytest.fixture(scope="module")
def served():
    with page() as served:
        yield served


# Names and sites


def test_an_unlocked_page_of_this_machine_answers_to_this_machines_names_only_on_every_path(served):
    for path in ("/", "/config", "/gradio_api/info", "/health", "/gradio_api/heartbeat/x", "/theme.css"):
        for host in ("evil.test", "evil.test:7865", "127.0.0.1.evil.test", ""):
            assert served.get(path, host=host).status_code == 403, (path, host)
    assert served.get("/config", host=f"localhost:{served.port}").status_code == 200
    with page("--allow-host", "editor.test") as other:
        assert other.get("/config", host="editor.test").status_code == 200


def test_no_page_of_another_site_can_make_the_browser_change_anything(served):
    for path in ("queue/join", "call/edit", "upload", "reset", "cancel", "run/predict", "component_server"):
        another_port = f"http://127.0.0.1:{served.port + 1}"  # such a page may use `server.py`, which has no person's pictures
        for origin in (
            "https://evil.test", "null", another_port, "http://localhost:3000", f"http://127.0.0.1.evil.test:{served.port}",
            "http://localhost@evil.test",
        ):  # fmt: skip
            answer = served.post(f"/gradio_api/{path}", {}, origin=origin)
            assert answer.status_code == 403, (path, origin, answer.text)
    for path, body in (("edit", {"image": "", "prompt": "x"}), ("gradio_api/call/edit", {"data": []})):
        assert served.post(f"/{path}", body, origin="http://localhost:3000").status_code == 403, path
    with page("--cors", "http://localhost:3000") as other:
        assert other.post("/gradio_api/call/edit", {"data": []}, origin="http://localhost:3000").status_code != 403
    assert served.get("/logout", **{"sec-fetch-site": "cross-site"}).status_code == 403
    assert served.get("/logout", referer="https://evil.test/").status_code == 403
    assert served.get("/logout", **{"sec-fetch-site": "same-origin"}).status_code != 403


def test_routes_of_gradio_that_the_page_does_not_use_are_not_there(served):
    for path in ("monitoring", "monitoring/summary", "gradio_api/proxy=http://x.hf.space", "gradio_api/vibe-code",
                 "gradio_api/runs", "gradio_api/deep_link", "gradio_api/stream/a/b/c/playlist.m3u8",
                 "gradio_api/dev/reload", "gradio_api/custom_component/a/b/c/d"):  # fmt: skip
        assert served.get(f"/{path}").status_code == 404, path
    for path in ("gradio_api/vibe-edit", "gradio_api/process_recording", "gradio_api/stream/x"):
        assert served.post(f"/{path}", {}).status_code == 404, path
    with pytest.raises(InvalidStatus):
        connect(f"ws://127.0.0.1:{served.port}/gradio_api/queue/join")


# Files


def test_the_page_opens_files_that_were_uploaded_to_it_and_no_others(served, tmp_path):
    private = tmp_path / "private.png"
    private.write_bytes(encode_png(grey(77)))
    link, pipe = served.folder / "link.png", served.folder / "pipe"
    link.symlink_to(private)
    os.mkfifo(pipe)
    (served.folder / "out").symlink_to(tmp_path)
    meta = {"meta": {"_type": "gradio.FileData"}}
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    told = [
        str(private), "/dev/zero", "/proc/self/environ", str(link), str(pipe), str(served.folder), str(tmp_path / "no"),
        str(served.folder / "out" / "private.png"), f"{served.folder}/../{tmp_path.name}/private.png", "private.png",
        "http://127.0.0.1:1/x.png", "file:///etc/passwd", "\0", "", 7, ["x"],
    ]  # fmt: skip
    for path in told:
        for extra in ({}, meta, {"meta": {}}, {"meta": {"_type": "x"}, "url": "http://127.0.0.1:1/y"}):
            answer = served.call([{"path": path, **extra}, "keep it", *SETTINGS])
            assert "event: error" in answer and "uploaded" in answer, (path, extra, answer)
    answer = served.call([{"path": None, "url": "http://127.0.0.1:1/x"}, "keep it", *SETTINGS])
    assert "event: error" in answer and "address" in answer
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert "event: complete" in served.call([{"path": served.uploaded}, "keep it", *SETTINGS])


def test_every_event_of_the_page_refuses_a_foreign_file_wherever_it_stands(served, tmp_path):
    private = tmp_path / "private.png"
    private.write_bytes(encode_png(grey(77)))
    bad = [{"path": str(private)}, {"video": {"path": str(private)}}, [{"image": {"path": str(private)}}]]
    for index, fn in served.demo.fns.items():
        if fn.fn is None:
            continue  # a script of the page
        for place in range(len(fn.inputs)):
            data = [None] * len(fn.inputs)
            data[place] = bad[(index + place) % 3]
            body = {"data": data, "fn_index": index, "session_hash": "s"}
            answer = served.post("/gradio_api/run/predict", body)
            assert answer.status_code >= 400 and "uploaded" in answer.text, (fn.api_name, answer.text)


def hard_link(served, private):
    link = served.folder / "hard.png"
    link.hardlink_to(private)
    return link


def pipe(served, private):
    path = served.folder / "waits.mp4"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    "name",
    [
        hard_link,
        pipe,
        lambda served, private: f"/proc/self/fd/{os.open(served.uploaded, os.O_RDONLY)}",
        lambda served, private: f"/proc/self/fd/{os.open(private, os.O_RDONLY)}",
        lambda served, private: f"/proc/self/root{served.uploaded}",
        lambda served, private: f"{served.folder}/x/../../{private.parent.name}/{private.name}",
        lambda served, private: f"{os.path.dirname(served.uploaded)}/../{served.uploaded.rsplit('/', 2)[1]}/in.png",
        lambda served, private: f"{served.folder}/" + "n" * 5000,
        lambda served, private: f"{served.folder}/" + "n/" * 50_000,
        lambda served, private: os.path.dirname(served.uploaded),
        lambda served, private: served.uploaded.replace("in.png", "%69n.png"),
        lambda served, private: f"{served.folder}/%2e%2e/{private.parent.name}/{private.name}",
    ],
    ids=["hard link", "pipe", "open file", "foreign open file", "root", "out", "out and in", "long", "deep", "folder", "encoded",
         "encoded out"],
)  # fmt: skip
def test_each_event_that_takes_a_file_refuses_every_other_name_of_one_in_a_sentence(served, tmp_path, name):
    private = tmp_path / "private.png"
    private.write_bytes(encode_png(grey(77)))
    path = str(name(served, private))
    try:
        asked = 0
        for index, fn in served.demo.fns.items():
            for place, block in enumerate(fn.inputs if fn.fn else ()):
                if not isinstance(block, (gr.Image, gr.Video, gr.File)):
                    continue
                data = [None] * len(fn.inputs)
                data[place] = [{"path": path}] if isinstance(block, gr.File) else {"path": path}
                body = {"data": data, "fn_index": index, "session_hash": "s"}
                answer = served.post("/gradio_api/run/predict", body)
                assert answer.status_code >= 400 and "not a file that was uploaded" in answer.text, (fn.api_name, answer.text)
                asked += 1
        assert asked >= 8
    finally:
        if path.startswith("/proc/self/fd/"):
            os.close(int(path.rpartition("/")[2]))
        elif name in (hard_link, pipe):
            os.unlink(path)


def test_a_file_that_is_put_in_the_place_of_the_one_that_was_checked_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "own"))
    upload, private = tmp_path / "own" / "in.mp4", tmp_path / "private"
    upload.parent.mkdir()
    for swap in (lambda: private.replace(upload), lambda: upload.symlink_to(private), lambda: os.mkfifo(upload)):
        upload.unlink(missing_ok=True)
        upload.write_bytes(b"mine")
        private.write_bytes(b"private")
        with uploads.open_upload(str(upload)) as file:
            assert file.read() == b"mine"

        def check_then_swap(path, check=uploads.check_upload, swap=swap):
            checked = check(path)
            upload.unlink()
            swap()
            return checked

        with monkeypatch.context() as racing:
            racing.setattr(uploads, "check_upload", check_then_swap)
            with pytest.raises(EditError, match="not a file that was uploaded"), uploads.open_upload(str(upload)):
                pass


def test_what_the_page_writes_no_other_user_of_the_machine_can_read(served):
    assert served.uploaded.startswith(str(served.folder))
    assert served.folder.stat().st_mode & 0o077 == 0


# Bodies


@pytest.mark.parametrize(
    "body",
    [
        b'{"data": [' + b"[]," * 10_000_000 + b"[]]}",
        b"{" + b",".join(b'"%d":1' % i for i in range(1_000_000)) + b"}",
        b'{"data": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"data": [' + b"9" * 100_000 + b"]}",
        '{"data": []}'.encode("utf-16"),
    ],
    ids=["brackets", "keys", "depth", "digits", "utf-16"],
)
def test_json_that_costs_too_much_to_parse_is_refused_before_it_is_parsed_while_others_are_served(served, body):
    for path in (
        "/edit",
        "/gradio_api/queue/join",
        "/gradio_api/call/edit",
        "/gradio_api/run/predict",
        "/gradio_api/reset",
    ):
        answers = []
        sender = threading.Thread(
            target=lambda path=path, answers=answers: answers.append(served.post(path, content=body))
        )
        started = time.process_time()
        sender.start()
        assert served.get("/ready").status_code == 200
        sender.join()
        assert answers[0].status_code in (400, 413), (path, answers[0].text[:200])
        assert time.process_time() - started < 5, path  # it was 30 s; sender and server together


def test_an_upload_is_bounded_in_bytes_and_in_files(served):
    url = f"{served.url}/gradio_api/upload"
    files = [("files", (f"{i}.png", b"x")) for i in range(200)]
    assert httpx.post(url, files=files, timeout=PATIENCE_S).status_code == 413
    declared = {"content-length": str(10**12), "content-type": "multipart/form-data; boundary=x"}
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        head = "".join(f"{k}: {v}\r\n" for k, v in declared.items())
        raw.sendall(f"POST /gradio_api/upload HTTP/1.1\r\nhost: localhost\r\n{head}\r\n".encode())
        assert b" 413 " in raw.recv(4096)


# Connections


def test_connections_that_send_no_whole_head_are_closed_and_leave_room_for_others(served, monkeypatch):
    monkeypatch.setattr(serving.connections, "HEAD_TIMEOUT_S", 1.0)
    silent = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(300)]
    for i, one in enumerate(silent):
        one.sendall((b"", b"GET / HTTP/1.1\r\nhost: loc", b"POST /edit HTTP/1.1\r\n")[i % 3])
    assert served.get("/ready").status_code == 200
    for one in silent:
        one.settimeout(PATIENCE_S)
        with contextlib.suppress(ConnectionResetError):
            assert one.recv(1) == b""
        one.close()


def test_a_crowd_of_silent_connections_gives_way_to_one_that_asks(served, monkeypatch):
    monkeypatch.setattr(served.demo.server.config.http_protocol_class, "most", 40)
    silent = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(100)]
    assert httpx.get(f"{served.url}/ready").status_code == 200  # on a connection of its own: idle ones had to give way
    assert len(served.demo.server.server_state.connections) <= 20  # half of them for one address
    for one in silent:
        one.close()


# The queue


def test_edits_that_no_one_listens_to_end_and_one_address_cannot_fill_the_queue(served, monkeypatch):
    served.pipeline.gate.clear()
    try:
        answers = [served.join(f"session-{i}") for i in range(serving.door.MAX_EVENTS + 4)]
        codes = [answer.status_code for answer in answers]
        assert codes == [200] * serving.door.MAX_EVENTS + [503] * 4, codes
        assert "Retry-After" in answers[-1].headers and "address" in answers[-1].json()["error"]
        monkeypatch.setattr(serving.door, "UNHEARD_S", 0.2)
    finally:
        served.pipeline.gate.set()
    wait_until(lambda: not served.demo._queue.event_ids_to_events, "the queue is empty")
    body = {"image": b64(grey()), "prompt": "keep it", "width": 64, "height": 64, "steps": 1}
    assert served.post("/edit", body).status_code == 200


def test_an_edit_that_someone_listens_to_stays(served, monkeypatch):
    served.pipeline.gate.clear()
    body = {"data": [{"path": served.uploaded}, "keep it", *SETTINGS]}
    event = served.post("/gradio_api/call/edit", body).json()["event_id"]
    with served.client.stream(
        "GET", f"{served.url}/gradio_api/call/edit/{event}"
    ) as answer:  # from its head on it listens
        monkeypatch.setattr(serving.door, "UNHEARD_S", 0.2)
        opener = threading.Timer(1.5, served.pipeline.gate.set)
        opener.start()
        assert "event: complete" in answer.read().decode()
    opener.join()


# Logins


def test_wrong_logins_are_slowed_by_address_and_all_together_and_right_ones_elsewhere_are_not():
    now = [0.0]
    guesses = Guesses(lambda: now[0])
    done = 0
    for _ in range(130):  # ten tries a second, for 13 s
        if not guesses.wait_s("a"):
            guesses.wrong("a")
            done += 1
        now[0] += 0.1
    assert FREE_TRIES <= done <= FREE_TRIES + 4, done
    assert guesses.wait_s("a") > 0 and guesses.wait_s("b") == 0
    for i in range(200):
        guesses.wrong(f"many {i}")
    assert guesses.wait_s("many 7") > 0 and guesses.wait_s("b") == 0
    now[0] += 4000
    assert guesses.wait_s("a") == 0


@pytest.fixture(scope="module")
def locked():
    with page("--auth", "ann:s3cret-word") as locked:
        yield locked


def log_in(locked, password, **headers):
    data = {"username": "ann", "password": password}
    return httpx.post(f"{locked.url}/login", data=data, headers=headers, timeout=PATIENCE_S)


def test_a_locked_page_opens_nothing_but_its_login_and_takes_no_orders_from_other_sites(locked):
    for path in ("/config", "/gradio_api/info", "/gradio_api/heartbeat/x", "/gradio_api/queue/data?session_hash=x",
                 "/gradio_api/upload_progress?upload_id=x", "/gradio_api/call/edit/abc"):  # fmt: skip
        assert locked.get(path).status_code == 401, path
    for path in ("upload", "queue/join", "reset", "cancel", "component_server", "run/predict"):
        assert locked.post(f"/gradio_api/{path}", {}).status_code == 401, path
    assert locked.get("/").status_code == 200
    answer = log_in(locked, "s3cret-word")
    assert answer.status_code == 200
    for cookie in answer.headers.get_list("set-cookie"):
        assert "httponly" in cookie.lower() and "samesite" in cookie.lower(), cookie
    cookie = {"cookie": "; ".join(f"{k}={v}" for k, v in answer.cookies.items())}
    files = {"files": ("in.png", encode_png(grey()), "image/png")}
    url = f"{locked.url}/gradio_api/upload"
    assert httpx.post(url, files=files, headers=cookie | {"origin": "https://evil.test"}).status_code == 403
    assert httpx.post(url, files=files, headers=cookie | {"origin": locked.url}).status_code == 200
    assert locked.get("/logout", **cookie, **{"sec-fetch-site": "cross-site"}).status_code == 403
    assert locked.get("/config", **cookie).status_code == 200


@pytest.mark.parametrize("proto", ["http", "https"])
def test_no_script_or_foreign_form_gets_the_logins_cookies_and_what_came_over_tls_stays_there(locked, proto):
    cookies = log_in(locked, "s3cret-word", **{"x-forwarded-proto": proto}).headers.get_list("set-cookie")
    assert len(cookies) == 2, cookies
    for cookie in cookies:
        said = {part.strip().lower() for part in cookie.split(";")[1:]}
        assert "httponly" in said and said & {"samesite=lax", "samesite=none"}, cookie
        # A browser sends the one that says None with requests of other sites too, over TLS: `Door` refuses those.
        assert "secure" in said if proto == "https" or "samesite=none" in said else "samesite=lax" in said, cookie
        assert len([part for part in cookie.lower().split(";") if part.strip() == "secure"]) <= 1


def test_guesses_of_every_kind_are_slowed_and_a_logged_in_page_is_not(locked):
    answer = log_in(locked, "s3cret-word")
    cookie = {"cookie": "; ".join(f"{k}={v}" for k, v in answer.cookies.items())}
    codes = [log_in(locked, f"wrong {i}").status_code for i in range(FREE_TRIES + 3)]
    assert codes[0] == 400 and codes[-1] == 429, codes
    for headers in ({"authorization": "Bearer x"}, {"x-api-key": "x"}, {"authorization": "Basic eDp5"}):
        answer = locked.get("/health", **headers)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0, headers
    assert log_in(locked, "s3cret-word").status_code == 429  # not even compared
    assert locked.get("/config", **cookie).status_code == 200


# The engine


def test_when_the_engines_thread_dies_every_caller_is_told_and_nothing_new_is_taken():
    with page() as served:
        stage, done = served.pipeline.denoise, []

        def die(*inputs, **options):
            stage(*inputs, **options)
            raise SystemExit("a library ended it")

        body = {"image": b64(grey()), "prompt": "keep it", "width": 64, "height": 64, "steps": 1}
        served.pipeline.gate.clear()
        served.pipeline.denoise = die
        callers = [threading.Thread(target=lambda: done.append(served.post("/edit", body))) for _ in range(3)]
        callers.append(
            threading.Thread(target=lambda: done.append(served.call([{"path": served.uploaded}, "k", *SETTINGS])))
        )
        with connect(f"ws://127.0.0.1:{served.port}/live") as idle:
            for caller in callers:
                caller.start()
            served.pipeline.await_start()
            served.pipeline.gate.set()
            for caller in callers:
                caller.join(PATIENCE_S)
            assert len(done) == 4
            for answer in done:
                if isinstance(answer, str):
                    assert "event: error" in answer and "SystemExit" in answer
                else:
                    assert answer.status_code in (500, 503) and "SystemExit" in answer.json()["error"], answer.text
            while (message := json.loads(idle.recv(PATIENCE_S)))["state"] != "failed":
                pass
            assert "SystemExit" in message["text"]
        ready, health = served.get("/ready"), served.get("/health").json()
        assert ready.status_code == 503 and ready.json()["state"] == health["state"] == "failed"
        assert "SystemExit" in health["text"]
        assert served.post("/edit", body).status_code == 503


def part(disposition: str) -> bytes:
    return f"--XX\r\n{disposition}\r\n\r\n".encode() + encode_png(grey()) + b"\r\n--XX--\r\n"


@pytest.mark.parametrize(
    "form, boundary",
    [
        (part('Content-Disposition: form-data; name="files"'), "XX"),
        (part('Content-Disposition: form-data; name="files"; filename=""'), "XX"),
        (part("Content-Disposition: form-data; name=\"files\"; filename*=UTF-8''x.png"), "XX"),
        (part('Content-Disposition: form-data; name="files"; filename=".."'), "XX"),
        (part('Content-Disposition: form-data; name="files"; filename="a/.."'), "XX"),
        (part('Content-Disposition: form-data; name="others"; filename="a.png"'), "XX"),
        (b"{}", "X" * 5000),
    ],
    ids=["no name", "empty name", "encoded name", "dots", "path of dots", "other field", "long boundary"],
)
def test_a_form_that_is_no_upload_is_refused_in_a_sentence_and_leaves_no_file(served, form, boundary):
    before = sorted(served.folder.rglob("*"))
    url, headers = f"{served.url}/gradio_api/upload", {"content-type": f"multipart/form-data; boundary={boundary}"}
    answer = served.client.post(url, content=form, headers=headers)
    assert answer.status_code == 400 and len(answer.text) > 30, answer.text
    assert sorted(served.folder.rglob("*")) == before


@pytest.mark.parametrize(
    "body, status",
    [
        ('{"data": [], "fn_index": -1}', 404), ('{"data": [], "fn_index": 9999}', 404), ('{"data": [], "fn_index": 1e9}', 404),
        ('{"data": [], "fn_index": true}', 404), ('{"data": null}', 400), ('{"data": {}}', 400), ("[]", 400),
        ('{"data": [NaN]}', 400), ('{"data": ["\\ud800"]}', 400), ('{"data": [1e999]}', 400),
    ],
)  # fmt: skip
def test_an_event_that_is_none_is_refused_before_gradio_fails_on_it(served, body, status):
    for path in ("call/edit", "run/edit", "api/edit"):
        answer = served.post(f"/gradio_api/{path}", content=body.encode())
        assert answer.status_code == status and answer.json()["error"], (path, answer.text)
    assert served.post("/gradio_api/queue/join", content=body.encode()).status_code in (400, 404)
    assert served.post("/gradio_api/call/nothing", {"data": []}).status_code == 404


@pytest.mark.parametrize("value", ["/etc/passwd", ["/etc/passwd"], 1e308, "data:image/png;base64,AAAA", True])
def test_a_value_that_is_no_picture_is_refused_in_a_sentence(served, value):
    assert "It takes: Image" in served.call([value, "keep it", *SETTINGS])
    assert "It takes: Image" in served.post("/gradio_api/run/edit", {"data": [value, "keep it", *SETTINGS]}).text

"""The program: flags, which model to load, and the page that the tabs of `webui/` make up.

    python webui_realtime.py                                     the best model this machine can run
    python webui_realtime.py --model Qwen/Qwen-Image-Edit-2509   the real one

The page is served first and the model is loaded behind it, in a thread that tells the page how far it has come: a
60 GB model takes minutes, and a person should see at once that the program runs. Flags are what holds for the
process; whatever a person changes while it runs is a control on the page.

Gradio carries the page, the uploads and the tabs for pictures and videos. The live view is its own markup and script
(`webui/live/`) over the socket of `server.py`: Gradio's own streaming shows fewer frames, later.
"""

import argparse
import logging
import os

if os.environ.get("SPACES_ZERO_GPU"):
    import spaces  # noqa: F401 # pyright: ignore[reportMissingImports] - on those Spaces only; before torch, which it changes: see `webui.zero`

# Read when torch is loaded. Its CPU threads otherwise spin while they wait for each other, and so keep each other from
# the cores that anything else needs too. Two cores: 8 % fewer frames when alone, ten times more beside a busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Memory that a GPU has left over in pieces can be put together: without it a 24 GB card runs out while a model is laid out.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# Read when Pillow is loaded: the blocks of a large picture. The C library gives blocks of more than 32 MB back to the system
# as soon as they are free, and keeps smaller ones: 400 MB after four pictures of 64 megapixels.
os.environ.setdefault("PILLOW_BLOCK_SIZE", "64m")

import shutil
import threading
import time
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from gradio.tunneling import CURRENT_TUNNELS
from starlette.middleware import Middleware

from server import MAX_FRAME_BYTES, EngineHolder, create_routes
from serving.connections import bound
from serving.door import Door
from serving.farewell import SERVER_S, TOLD_S, Farewell, close_engine, end
from serving.proxy import BehindProxy
from serving.startup import add_flags, check_flags, create_guard, load_engine, port_number, warn_if_open
from serving.version import VERSION
from webui.api import Endpoints, Page
from webui.composite import CompositeTab
from webui.controls import SHARE_SETTINGS, create_settings
from webui.full_disk import handle_full_disk
from webui.live import create_live
from webui.mcp import answer_in_full, mcp_missing
from webui.parts import asset, preset_chips
from webui.theme import create_theme
from webui.upload import UploadTab
from webui.uploads import own_folder, upload_folder
from webui.video import VideoTab
from webui.video_edit import MAX_BYTES
from webui.work import Jobs
from webui.zero import ONE_AT_A_TIME, ZeroEngine, zero_gpu

log = logging.getLogger("webui_realtime")

DEFAULT_PORT = 7865
TITLE = "Realtime image editor"
LOGIN_NOTE = (
    "Asked again after a right login? Then your browser has held its cookie back, as most do with a page inside the page "
    'of another site. <a href="./" target="_blank">Open this page in a tab of its own.</a>'
)
MOST_WAITING = 128  # events of all pages and callers together; over it Gradio answers 503


# ------------------------------------------------------------------------------------------------------------ the page


def create_demo(holder: EngineHolder, *, jobs: Jobs | None = None, streams: bool = True) -> gr.Blocks:
    """The page. Without `streams` (see `webui.zero`) it edits pictures only, and says so where the rest would be."""
    presets, pair_presets = preset_chips(1), preset_chips(2)
    jobs = jobs or Jobs(holder.decoder)

    def leave(request: gr.Request) -> None:
        jobs.stop(request.session_hash)  # nobody would look at what it still edits

    with Page(title=TITLE, delete_cache=(600, 4 * 3600)) as demo:
        Endpoints(holder, jobs)  # first: the endpoints' names are theirs
        gr.HTML(
            html_template=asset("header.html"), css_template=asset("header.css"),
            js_on_load=asset("header.js") + asset("paste.js") + asset("names.js"), apply_default_css=False, elem_id="header",
        )  # fmt: skip
        with gr.Row(elem_id="main"):
            with gr.Column(scale=4, min_width=320), gr.Tabs():
                with gr.Tab("Live", id="live"):
                    live = gr.Column()
                with gr.Tab("Upload", id="upload"):
                    upload = gr.Column()
                with gr.Tab("Composite", id="composite"):
                    composite = gr.Column()
                with gr.Tab("Video", id="video", visible=streams):
                    video = gr.Column()
            with gr.Column(scale=1, min_width=260, elem_id="settings"):
                settings = create_settings()
        with live:
            if streams:
                create_live(settings, presets)
            else:
                gr.Markdown(ONE_AT_A_TIME)
        with upload:
            UploadTab(holder, jobs, settings, presets)
        with composite:
            CompositeTab(holder, jobs, settings, presets, pair_presets)
        with video:
            VideoTab(holder, jobs, settings, presets)
        demo.load(fn=None, inputs=settings.all(), js=SHARE_SETTINGS, api_visibility="private")
        demo.unload(leave)
    return demo


# --------------------------------------------------------------------------------------------------------- the program


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    # A Hugging Face Space says in these variables where it expects the page.
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    port = port_number(os.environ.get("GRADIO_SERVER_PORT", str(DEFAULT_PORT)))
    parser = argparse.ArgumentParser(description="Edit a camera, a photo or two by instruction, in real time.")
    add_flags(parser, host=host, port=port)
    parser.add_argument("--share", action="store_true", help="also make a public HTTPS link through Gradio's service")
    parser.add_argument("--mcp", action="store_true", help="offer both kinds of edit to language models over MCP")
    options = parser.parse_args(argv)
    check_flags(parser, options)
    if options.mcp and (why := mcp_missing()) is not None:
        parser.error(f"--mcp: {why}")
    if options.mcp and (options.auth or options.api_key):
        # Gradio's MCP calls the page's own endpoints without the caller's login, so every call would be refused.
        parser.error("--mcp cannot be locked: leave out --auth and --api-key, and listen on this machine only")
    return options


def serve_within_bounds(config: uvicorn.Config) -> None:
    """Gradio makes its own server and takes no settings for it; each connection reads them when it opens."""
    bound(config)
    config.ws_max_size = 2 * MAX_FRAME_BYTES
    config.ws_per_message_deflate = False
    config.ws_ping_interval = config.ws_ping_timeout = 10.0
    config.timeout_graceful_shutdown = SERVER_S


def launch(holder: EngineHolder, options: argparse.Namespace) -> gr.Blocks:
    """Serves the page and the routes, and returns as soon as they answer."""
    os.environ["GRADIO_SSR_MODE"] = "false"  # its Node proxy would answer our routes with a page and hang our sockets
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["FORWARDED_ALLOW_IPS"] = ""  # uvicorn must leave the peer's address to `BehindProxy`
    guard, jobs = create_guard(options, local_pages=False), Jobs(holder.decoder)
    warn_if_open(options.host, locked=guard.locked, share=options.share)
    demo = create_demo(holder, jobs=jobs, streams=not zero_gpu())
    routes = create_routes(holder, guard=guard)
    door = Middleware(
        Door,
        guard=guard,
        own=frozenset(route.path for route in routes),
        blocks=lambda: demo,
        folder=upload_folder(),
        max_file_bytes=MAX_BYTES,
        abandon=jobs.stop,
    )
    demo.queue(max_size=MOST_WAITING).launch(
        server_name=options.host,
        server_port=options.port,
        share=options.share,
        auth=guard.login if guard.locked else None,  # the login, or any name with the key as the password
        auth_message=LOGIN_NOTE if guard.locked else None,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        ssl_verify=False,  # concerns only Gradio's own look at its page: a certificate of one's own is fine
        root_path=options.root_path,
        app_kwargs={
            "routes": routes,
            "middleware": [
                Middleware(BehindProxy, trusted=options.forwarded_allow_ips, root_path=options.root_path),
                door,
            ],
            "exception_handlers": handle_full_disk(),
        },
        max_file_size=MAX_BYTES,  # of a video; what a picture may have is said by `webui.work`
        mcp_server=options.mcp,
        theme=create_theme(),
        css=asset("page.css"),
        footer_links=[],
        run_history=False,  # it would keep people's pictures in the browser
        ssr_mode=False,
        prevent_thread_lock=True,
        quiet=True,
    )
    serve_within_bounds(demo.server.config)
    if options.share and demo.share_url:
        guard.let_in(urlsplit(demo.share_url).netloc)
    log.info("the page is at %s", demo.local_url)
    if options.mcp:
        answer_in_full(demo)
        log.info("MCP is at %sgradio_api/mcp/", demo.local_url)
    if options.share:
        log.info("and for everybody who knows this link at %s", demo.share_url or "nowhere: no link could be made")
    return demo


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    log.info("version %s", VERSION)
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    holder = EngineHolder()
    if zero_gpu():  # there the model must be in its place when the page is launched
        holder.page_only = ONE_AT_A_TIME
        load_engine(holder, options, ZeroEngine)
    folder = own_folder()
    with Farewell() as farewell:
        try:
            demo = launch(holder, options)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            if "empty port" not in str(error):
                raise
            where = f"{options.host}:{options.port}"
            raise SystemExit(f"{where} is in use, or no address here: see --port, --host.") from None
        if not zero_gpu():
            # Only now: importing diffusers takes both cores for seconds, and the page comes first.
            threading.Thread(target=load_engine, args=(holder, options), name="loader", daemon=True).start()
        farewell.asked.wait()
        stop(demo, holder)
        shutil.rmtree(folder, ignore_errors=True)
        end()


def stop(demo: gr.Blocks, holder: EngineHolder) -> None:
    """Every edit and every socket is told, then the server ends."""
    holder.leave()
    close_engine(holder)  # every edit in the queue fails now, with a sentence that its caller reads
    time.sleep(TOLD_S)
    demo.close(verbose=False)
    holder.decoder.close()
    for tunnel in CURRENT_TUNNELS:
        tunnel.kill()


if __name__ == "__main__":
    main()

"""The program: flags, which model to load, and the page with its three tabs.

    python webui_realtime.py                                     the best model this machine can run
    python webui_realtime.py --model Qwen/Qwen-Image-Edit-2509   the real one

The page is served first and the model is loaded behind it, in a thread that tells the page how far it has come: a
60 GB model takes minutes, and a person should see at once that the program runs. Flags are what holds for the
process; whatever a person changes while it runs is a control on the page.

Gradio carries the page, the uploads and the two tabs for still pictures. The live view is its own markup and script
(`webui/live.*`) over the socket of `server.py`: Gradio's own streaming shows fewer frames, later. The settings are
shared by all tabs: they are ordinary Gradio controls whose changes a listener without a Python side copies to
`window.editSettings`, so that they reach the live socket without a round trip through Gradio's queue.

Uploaded files are opened by `images.open_image` and by nothing else: Gradio's own reading of a picture fails on odd
files with a message nobody can act on, and drops alpha, depth and rotation in its own ways.
"""

import argparse
import html
import logging
import os

# Read when torch is loaded. Its CPU threads otherwise spin while they wait for each other, and so keep each other from
# the cores that anything else needs too. Two cores: 8 % fewer frames when alone, ten times more beside a busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import queue
import random
import re
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import gradio as gr
import numpy as np

from images import EditError, encode_png, open_image
from pocket_model.edits import EDITS, preset_prompts
from qwen_realtime import LIMITS, EditParams, EditResult, RealtimeEngine
from server import EngineHolder, Guard, create_routes, fitted, output_size
from startup import add_flags, check_flags, load_engine, port_number, warn_if_open

log = logging.getLogger("webui_realtime")

HERE = Path(__file__).resolve().parent
DEFAULT_PORT = 7865
SIZES = (128, 192, 256, 320, 384, 512, 640, 768, 1024)
TITLE = "Realtime image editor"
MAX_UPLOAD = "64mb"


# --------------------------------------------------------------------------------------------- editing still pictures


def read_picture(path: str | None, name: str = "a picture") -> np.ndarray:
    if path is None:
        raise EditError(f"Choose {name} first: drop a file, paste one, or press the upload field.")
    return open_image(Path(path).read_bytes())


def edit_params(prompt, mode, ratio, picture: np.ndarray, side: int, settings: list) -> EditParams:
    """The page's controls as EditParams for this first picture. `side` is the model's own size."""
    steps, size, shape, seed, locked, cfg_scale, negative_prompt = settings
    side = size or side
    width, height = (side, side) if shape != "keep" else output_size(picture.shape[1], picture.shape[0], side)
    return EditParams(
        prompt=prompt or "",
        negative_prompt=negative_prompt or "",
        steps=steps,
        width=width,
        height=height,
        seed=(seed or 0) if locked else random.randrange(int(LIMITS["seed"][1]) + 1),
        cfg_scale=cfg_scale,
        fit="pad" if shape == "pad" else "crop",
        mode=mode,
        blend_ratio=ratio,
    )


def wait_for_engine(holder: EngineHolder, progress) -> RealtimeEngine:
    status = holder.status()
    while status["state"] == "loading":
        progress(status["fraction"], desc=f"The model is loading: {status['text']}")
        status = holder.wait(1.0)
    if status["state"] == "failed":
        raise EditError(f"The model could not be loaded: {status['text']}")
    return holder.engine


def run_edit(engine: RealtimeEngine, images: list[np.ndarray], params: EditParams, progress) -> EditResult:
    """One edit with its steps shown. `on_step` comes on the engine's thread, Gradio's progress wants this one."""
    steps: queue.SimpleQueue = queue.SimpleQueue()
    with engine.open_session() as session:
        number = session.submit(images, params, on_step=lambda step, of: steps.put((step, of)))
        progress(0.0, desc="Reading the prompt and the picture")
        while True:
            try:
                return session.result(number, timeout=0.1)
            except TimeoutError:
                while not steps.empty():
                    step, of = steps.get()
                    progress((step, of), desc="Editing")


def save_png(result: EditResult, model: str) -> str:
    """A PNG with a telling name, its settings inside, in Gradio's cache: served from there, deleted with it."""
    params = result.params
    words = re.sub(r"[^a-z0-9]+", "-", params.prompt.lower()).strip("-")[:48].strip("-") or "edited"
    cache = Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio")
    cache.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=cache)) / f"{words}-{params.seed}.png"
    text = {name: str(value) for name, value in asdict(params).items()} | {"model": model}
    path.write_bytes(encode_png(result.image, text))
    return str(path)


def describe(result: EditResult) -> str:
    stages = result.stages_ms
    parts = " · ".join(f"{name.replace('_', ' ')} {ms:.0f}" for name, ms in stages.items() if name != "total")
    height, width = result.image.shape[:2]
    steps = f"{result.params.steps} step{'s' if result.params.steps > 1 else ''}"
    return f"{stages.get('total', 0):.0f} ms: {parts}<br>{width}×{height} · {steps} · seed {result.params.seed}"


def toast(error: EditError):
    """Shows the text in a corner of the page and leaves every output as it was: gr.Error would cover the last result."""
    gr.Warning(html.escape(str(error)), duration=12)
    return gr.skip()


# ------------------------------------------------------------------------------------------------------------ the page


def asset(name: str) -> str:
    return (HERE / "webui" / name).read_text(encoding="utf-8")


def create_theme() -> gr.themes.Base:
    light_and_dark = {
        "block_border_width": ("1px", "1px"),
        "input_border_width": ("1px", "1px"),
        "button_border_width": ("1px", "1px"),
        "checkbox_label_border_width": ("1px", "1px"),
        "body_background_fill": ("*neutral_50", "*neutral_950"),
        "block_background_fill": ("white", "*neutral_900"),
        "border_color_primary": ("*neutral_200", "*neutral_700"),
        "input_background_fill": ("white", "*neutral_800"),
        "input_border_color": ("*neutral_300", "*neutral_700"),
        "checkbox_border_color": ("*neutral_400", "*neutral_500"),
        "button_secondary_border_color": ("*neutral_300", "*neutral_600"),
        "button_primary_background_fill": ("*primary_600", "*primary_600"),
        "button_primary_background_fill_hover": ("*primary_700", "*primary_500"),
        "block_title_background_fill": ("transparent", "transparent"),
        "block_title_text_color": ("*body_text_color", "*body_text_color"),
        "block_label_background_fill": ("*background_fill_primary", "*background_fill_secondary"),
        "block_label_text_color": ("*body_text_color", "*body_text_color"),
        # The theme's own greys for these are too pale to read.
        "body_text_color_subdued": ("*neutral_500", "*neutral_400"),
        "block_info_text_color": ("*neutral_500", "*neutral_400"),
        "input_placeholder_color": ("*neutral_500", "*neutral_400"),
    }
    values = {name: light for name, (light, _) in light_and_dark.items()}
    values |= {f"{name}_dark": dark for name, (_, dark) in light_and_dark.items()}
    values |= dict.fromkeys(
        ("block_shadow", "input_shadow", "checkbox_label_shadow", "button_secondary_shadow"), "none"
    )
    return gr.themes.Soft(
        primary_hue="blue",
        secondary_hue="blue",
        neutral_hue="slate",
        radius_size="lg",
        font="Inter ui-sans-serif system-ui -apple-system Roboto sans-serif".split(),  # none fetched
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
    ).set(**values, block_title_padding="0")


@dataclass(frozen=True)
class Settings:
    """The controls that all tabs share, in the order in which `edit_params` takes their values."""

    steps: gr.Slider
    size: gr.Dropdown
    shape: gr.Radio
    seed: gr.Number
    locked: gr.Checkbox
    cfg_scale: gr.Slider
    negative_prompt: gr.Textbox

    def all(self) -> list:
        return list(vars(self).values())


# The live view reads what the shared controls say from here; see sendParams in webui/live.js.
SHARE_SETTINGS = """(steps, size, shape, seed, locked, cfg_scale, negative_prompt) => {
  window.editSettings = {steps, size, shape, seed: seed ?? 0, cfg_scale, negative_prompt};
  window.dispatchEvent(new CustomEvent("edit-settings"));
}"""


def create_settings() -> Settings:
    defaults = EditParams(prompt="-")
    gr.Markdown("## Settings")
    steps = gr.Slider(
        *LIMITS["steps"], value=defaults.steps, step=1, label="Steps", info="More is slower, often finer."
    )
    size = gr.Dropdown(
        [("The model's own", 0), *((f"{side} × {side}", side) for side in SIZES)],
        value=0,
        label="Size",
        info="Area of the result in pixels.",
    )
    shape = gr.Radio(
        [("As the picture", "keep"), ("Square, cropped", "crop"), ("Square, padded", "pad")],
        value="keep",
        label="Shape",
        info="Pictures are never stretched.",
    )
    seed = gr.Number(defaults.seed, label="Seed", precision=0, elem_id="seed")  # EditParams says what is allowed
    info = "Otherwise each edit draws another. The live view keeps it always."
    locked = gr.Checkbox(False, label="Keep this seed", info=info, elem_id="seed-lock")
    dice = gr.Button("New seed", size="sm", elem_id="dice")
    with gr.Accordion("Guidance", open=False):
        cfg_scale = gr.Slider(
            *LIMITS["cfg_scale"],
            value=defaults.cfg_scale,
            step=0.1,
            label="CFG scale",
            info="1 is off. Above it every step takes twice as long.",
        )
        negative = gr.Textbox(
            defaults.negative_prompt, label="Negative prompt", info="What to avoid; needs a CFG scale above 1.", lines=2
        )
    settings = Settings(steps, size, shape, seed, locked, cfg_scale, negative)
    dice.click(
        fn=None,
        js="() => Math.floor(Math.random() * 4294967296)",
        outputs=seed,
        api_visibility="private",
    )
    gr.on(
        [control.change for control in settings.all()],
        fn=None,
        inputs=settings.all(),
        js=SHARE_SETTINGS,
        api_visibility="private",
    )
    return settings


def preset_chips(pictures: int) -> list[dict]:
    """The presets for that many pictures as {"label", "prompt"}. The real model understands them as well."""
    known = {phrasing for edit in EDITS if edit.pictures == pictures for phrasing in edit.phrasings}
    return [{"label": label, "prompt": prompt} for label, prompt in preset_prompts() if prompt in known]


def create_chips(presets: list[dict], prompt: gr.Textbox) -> None:
    chips = gr.HTML(
        value="",
        html_template=asset("chips.html"),
        js_on_load=asset("chips.js"),
        apply_default_css=False,
        presets=presets,
    )
    chips.click(fn=None, js="(text) => text", inputs=chips, outputs=prompt, api_visibility="private")


def create_picture(label: str, height: int) -> gr.Image:
    picture = gr.Image(
        label=label,
        alt_text=label,
        sources=["upload", "clipboard"],
        type="filepath",
        height=height,
        min_width=120,
    )
    # The handlers get the uploaded file as it is. (A subclass would say the same, but Gradio writes a .pyi file beside
    # every module that has one.)
    picture.preprocess = lambda payload: None if payload is None else payload.path
    return picture


def create_ask(name: str) -> tuple[gr.Textbox, gr.Button]:
    with gr.Column(elem_classes="area-ask"):
        placeholder = "Say what to change, or choose below."
        prompt = gr.Textbox(label="Prompt", placeholder=placeholder, lines=1, max_lines=4)
        button = gr.Button("Edit", variant="primary", elem_id=f"{name}-edit")
    return prompt, button


def create_outcome() -> tuple[gr.DownloadButton, gr.Markdown]:
    with gr.Column(elem_classes="area-outcome"):
        text = gr.Markdown("The time it took and the seed will be written here.", elem_classes="result-text")
        download = gr.DownloadButton("Download PNG", interactive=False)
    return download, text


def create_upload(holder: EngineHolder, settings: Settings, presets: list[dict]) -> None:
    with gr.Row(elem_classes="areas"):
        with gr.Column(elem_classes="area-source"):
            picture = create_picture("Photo", 380)
        prompt, button = create_ask("upload")
        with gr.Column(elem_classes="area-chips"):
            create_chips(presets, prompt)
        with gr.Column(elem_classes="area-result"):
            slider = gr.ImageSlider(
                label="Before and after",
                type="filepath",
                format="png",
                interactive=False,
                max_height=420,  # and no height, which would cut a portrait
                buttons=["fullscreen"],
            )
        download, text = create_outcome()

    def edit(path, prompt, *settings, progress=gr.Progress()):  # noqa: B008 - how Gradio wants it
        try:
            image = read_picture(path, "a photo")
            engine = wait_for_engine(holder, progress)
            params = edit_params(prompt, "edit", 0.5, image, engine.default_size, settings)
            images = fitted([image], params)
            result = run_edit(engine, images, params, progress)
        except EditError as error:
            return toast(error)
        path = save_png(result, engine.description["model"])
        return (images[0], path), gr.DownloadButton(value=path, interactive=True), describe(result), params.seed

    _on_edit(button, prompt, edit, [picture, prompt, *settings.all()], [slider, download, text, settings.seed])
    _on_upload(picture)


def create_composite(holder: EngineHolder, settings: Settings, presets: list[dict], pair_presets: list[dict]) -> None:
    with gr.Row(elem_classes="areas"):
        with gr.Column(elem_classes="area-source"):
            with gr.Row(elem_classes="pair"):
                first, second = create_picture("Picture 1", 230), create_picture("Picture 2", 230)
            mode = gr.Radio(
                [("Blend, then edit", "blend"), ("Both as references", "references")],
                value="blend",
                label="How the two are used",
            )
            ratio = gr.Slider(
                *LIMITS["blend_ratio"],
                value=EditParams(prompt="-").blend_ratio,
                step=0.01,
                label="Blend ratio",
                info="0 is picture 1 alone, 1 is picture 2 alone.",
            )
        prompt, button = create_ask("composite")
        with gr.Column(elem_classes="area-chips"):
            with gr.Column() as chips:  # in columns: a gr.HTML loses its presets when it is itself shown or hidden
                create_chips(presets, prompt)
            with gr.Column(visible=False) as pair_chips:
                create_chips(pair_presets, prompt)
        with gr.Column(elem_classes="area-result"):
            output = gr.Image(
                label="Result",
                alt_text="Edited picture",
                type="filepath",
                format="png",
                interactive=False,
                height=380,
                buttons=["fullscreen"],
            )
        download, text = create_outcome()

    def edit(path_1, path_2, mode, ratio, prompt, *settings, progress=gr.Progress()):  # noqa: B008
        try:
            images = [read_picture(path_1, "picture 1"), read_picture(path_2, "picture 2")]
            engine = wait_for_engine(holder, progress)
            params = edit_params(prompt, mode, ratio, images[0], engine.default_size, settings)
            result = run_edit(engine, fitted(images, params), params, progress)
        except EditError as error:
            return toast(error)
        path = save_png(result, engine.description["model"])
        return path, gr.DownloadButton(value=path, interactive=True), describe(result), params.seed

    inputs = [first, second, mode, ratio, prompt, *settings.all()]
    _on_edit(button, prompt, edit, inputs, [output, download, text, settings.seed])
    _on_upload(first)
    _on_upload(second)
    mode.change(
        lambda mode: [gr.update(visible=mode == "blend")] * 2 + [gr.update(visible=mode != "blend")],
        mode,
        [ratio, chips, pair_chips],
        api_visibility="private",
        show_progress="hidden",
    )


# On a phone the result lies below the button that makes it.
SHOW_RESULT = """() => {
  const shown = [...document.querySelectorAll(".area-result")].find((area) => area.offsetParent);
  shown?.scrollIntoView({behavior: "smooth", block: "nearest"});
}"""


def _on_edit(button: gr.Button, prompt: gr.Textbox, edit, inputs: list, outputs: list) -> None:
    gr.on(
        [button.click, prompt.submit],
        edit,
        inputs,
        outputs,
        api_visibility="private",
        show_progress_on=outputs[0],
        concurrency_limit=16,  # waiting for the one inference thread, which is fair
        concurrency_id="edit",
        trigger_mode="once",
    )
    button.click(fn=None, js=SHOW_RESULT, api_visibility="private")


def _on_upload(picture: gr.Image) -> None:
    """A file that is no picture is refused when it comes; one that browsers cannot show is shown as they can."""

    def check(path: str):
        try:
            image = read_picture(path)
        except EditError as error:
            toast(error)
            return None
        if Path(path).suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif"):
            return path  # not gr.skip(): any update makes Gradio build the component anew, without our preprocess
        shown = Path(path).with_suffix(".png")
        shown.write_bytes(encode_png(image))
        return str(shown)

    picture.upload(check, picture, picture, api_visibility="private", show_progress="hidden", concurrency_limit=4)


def create_demo(holder: EngineHolder) -> gr.Blocks:
    presets, pair_presets = preset_chips(1), preset_chips(2)
    with gr.Blocks(title=TITLE, delete_cache=(600, 3600)) as demo:
        gr.HTML(
            html_template=asset("header.html"), css_template=asset("header.css"), js_on_load=asset("header.js") + asset("paste.js"),
            apply_default_css=False, elem_id="header",
        )  # fmt: skip
        with gr.Row(elem_id="main"):
            with gr.Column(scale=4, min_width=320), gr.Tabs():
                with gr.Tab("Live", id="live"):
                    gr.HTML(
                        html_template=asset("live.html"), css_template=asset("live.css"),
                        js_on_load=asset("live.js"), apply_default_css=False, presets=presets, first_prompt=presets[0]["prompt"], elem_id="live",
                    )  # fmt: skip
                with gr.Tab("Upload", id="upload"):
                    upload = gr.Column()
                with gr.Tab("Composite", id="composite"):
                    composite = gr.Column()
            with gr.Column(scale=1, min_width=260, elem_id="settings"):
                settings = create_settings()
        with upload:
            create_upload(holder, settings, presets)
        with composite:
            create_composite(holder, settings, presets, pair_presets)
        demo.load(fn=None, inputs=settings.all(), js=SHARE_SETTINGS, api_visibility="private")
    return demo


# --------------------------------------------------------------------------------------------------------- the program


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    # A Hugging Face Space says in these variables where it expects the page.
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    port = port_number(os.environ.get("GRADIO_SERVER_PORT", str(DEFAULT_PORT)))
    parser = argparse.ArgumentParser(description="Edit a camera, a photo or two by instruction, in real time.")
    add_flags(parser, host=host, port=port)
    parser.add_argument("--share", action="store_true", help="also make a public HTTPS link through Gradio's service")
    options = parser.parse_args(argv)
    check_flags(parser, options)
    return options


def launch(holder: EngineHolder, options: argparse.Namespace) -> gr.Blocks:
    """Serves the page and the routes, and returns as soon as they answer."""
    os.environ["GRADIO_SSR_MODE"] = "false"  # its Node proxy would answer our routes with a page and hang our sockets
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    guard = Guard(options.auth, options.api_key, origins=options.cors)
    warn_if_open(options.host, locked=guard.locked, share=options.share)
    demo = create_demo(holder)
    demo.launch(
        server_name=options.host,
        server_port=options.port,
        share=options.share,
        auth=guard.login if guard.locked else None,  # the login, or any name with the key as the password
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        ssl_verify=False,  # concerns only Gradio's own look at its page: a certificate of one's own is fine
        app_kwargs={"routes": create_routes(holder, guard=guard)},
        max_file_size=MAX_UPLOAD,
        theme=create_theme(),
        css=asset("page.css"),
        footer_links=[],
        run_history=False,  # it would keep people's pictures in the browser
        ssr_mode=False,
        prevent_thread_lock=True,
        quiet=True,
    )
    log.info("the page is at %s", demo.local_url)
    if options.share:
        log.info("and for everybody who knows this link at %s", demo.share_url or "nowhere: no link could be made")
    return demo


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    holder = EngineHolder()
    try:
        demo = launch(holder, options)
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise SystemExit(f"{options.host}:{options.port} is in use, or no address here: see --port, --host.") from None
    # Only now: importing diffusers takes both cores for seconds, and the page comes first.
    threading.Thread(target=load_engine, args=(holder, options), name="loader", daemon=True).start()
    try:
        demo.block_thread()
    finally:
        if holder.engine is not None:
            holder.engine.close()


if __name__ == "__main__":
    main()

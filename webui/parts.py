"""What the tabs share: pictures that take any file, prompts with presets, Edit and Stop, the result's text and download,
and the offer to take the settings over that a picture carries.
"""

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from pipeline.images import EditError, encode_png
from pocket_model.phrasings import WORDINGS
from qwen_realtime import EditParams
from serving.decoding import LIMITS
from webui.controls import Settings, control_values
from webui.uploads import read_upload
from webui.work import Job, Jobs, Stopped, check_chosen, new_folder, read_picture, settings_inside, writing

HERE = Path(__file__).resolve().parent
SHOWN_BY_BROWSERS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif")
EDITS_AT_A_TIME = 16  # waiting for the one inference thread, which is fair

# On a phone the result lies below the button that makes it.
SHOW_RESULT = """() => {
  const shown = [...document.querySelectorAll(".area-result")].find((area) => area.offsetParent);
  shown?.scrollIntoView({behavior: "smooth", block: "nearest"});
}"""


def asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def toast(error: EditError | str) -> None:
    """Shows the text in a corner of the page; gr.Error would cover the last result."""
    gr.Warning(html.escape(str(error)), duration=12)


def preset_chips(pictures: int) -> list[dict]:
    """The presets for that many pictures as {"label", "prompt"}. The real model understands them as well."""
    fitting = [wording for wording in WORDINGS.values() if wording.pictures == pictures]
    return [{"label": wording.label, "prompt": wording.preset} for wording in fitting]


def create_chips(presets: list[dict], prompt: gr.Textbox) -> None:
    chips = gr.HTML(
        value="",
        html_template=asset("chips.html"),
        js_on_load=asset("chips.js"),
        apply_default_css=False,
        presets=presets,
    )
    chips.click(fn=None, js="(text) => text", inputs=chips, outputs=prompt, api_visibility="private")


def create_picture(label: str, height: int, *, camera: bool) -> gr.Image:
    picture = gr.Image(
        label=label,
        alt_text=label,
        sources=["upload", "webcam", "clipboard"] if camera else ["upload", "clipboard"],
        webcam_options=gr.WebcamOptions(mirror=False),
        type="filepath",
        height=height,
        min_width=120,
    )
    take_file(picture)
    return picture


def take_file(component: gr.Image | gr.Video) -> None:
    """The handlers get the uploaded file as it is. (A subclass would say the same, but Gradio writes a .pyi file next to
    every module that has one.) Never answer such a component with gr.update or gr.skip: Gradio would build it again.
    """
    handlers: Any = component
    handlers.preprocess = lambda payload: None if payload is None else payload.path


def create_ask(name: str, jobs: Jobs) -> tuple[gr.Textbox, gr.Button, gr.Button]:
    """The prompt, the button that edits and the one that stops it."""
    with gr.Column(elem_classes="area-ask"):
        placeholder = "Say what to change, or choose below."
        prompt = gr.Textbox(label="Prompt", placeholder=placeholder, lines=1, max_lines=4)
        with gr.Row(elem_classes="buttons"):
            button = gr.Button("Edit", variant="primary", elem_id=f"{name}-edit", scale=3, min_width=120)
            stop = gr.Button("Stop", variant="stop", elem_id=f"{name}-stop", interactive=False, scale=1, min_width=90)

    def stop_job(request: gr.Request) -> None:
        jobs.stop(request.session_hash, name)

    stop.click(stop_job, api_visibility="private", show_progress="hidden", queue=False)
    return prompt, button, stop


def create_outcome(name: str, again_label: str) -> tuple[gr.DownloadButton, gr.Markdown, gr.Button]:
    """What is below a result: its text, its file, and the button that takes it as the next edit's picture."""
    text = gr.Markdown("The time it took and the seed will be written here.", elem_classes="result-text")
    with gr.Row(elem_classes="buttons"):
        download = gr.DownloadButton("Download PNG", interactive=False, min_width=140)
        again = gr.Button(again_label, interactive=False, elem_id=f"{name}-again", min_width=140)
    return download, text, again


def on_edit(button: gr.Button, prompt: gr.Textbox, edit: Callable, inputs: set, outputs: list) -> None:
    """Edit, by the button or by Enter in the prompt. The first of `outputs` shows the progress."""
    gr.on(
        [button.click, prompt.submit],
        edit,
        inputs,
        outputs,
        api_visibility="private",
        show_progress_on=outputs[0],
        concurrency_limit=EDITS_AT_A_TIME,
        concurrency_id="edit",
        trigger_mode="once",
    )
    button.click(fn=None, js=SHOW_RESULT, api_visibility="private")


class Offer:
    """Asks whether the settings that a picture carries shall be taken over; hidden until there are some."""

    def __init__(self, prompt: gr.Textbox, settings: Settings):
        self._found = gr.State()  # EditParams
        with gr.Group(visible=False, elem_classes="offer") as self._box:
            self._text = gr.Markdown()
            with gr.Row(elem_classes="buttons"):
                take = gr.Button("Use its settings", size="sm", variant="primary", min_width=120)
                leave = gr.Button("No, only the picture", size="sm", min_width=120)
        self.outputs = [self._found, self._box, self._text]

        def use(params: EditParams | None):
            if params is None:
                return [gr.skip()] * (len(settings.all()) + 2)
            return [gr.update(visible=False), params.prompt, *control_values(params)]

        take.click(
            use, self._found, [self._box, prompt, *settings.all()], api_visibility="private", show_progress="hidden"
        )
        leave.click(lambda: gr.update(visible=False), None, self._box, api_visibility="private", show_progress="hidden")

    def answer(self, path: str | None, read_text: Callable) -> list:
        """What `outputs` are to show for this file, whose text chunks `read_text` reads."""
        params = None if path is None else settings_inside(read_upload(path, LIMITS.file_bytes), read_text)
        if params is None:
            return [None, gr.update(visible=False), ""]
        steps = f"{params.steps} step{'s' if params.steps > 1 else ''}"
        text = f"This picture was made here: “{html.escape(params.prompt)}”, {steps}, seed {params.seed}."
        return [params, gr.update(visible=True), text]


def on_upload(picture: gr.Image, jobs: Jobs, offer: Offer | None = None) -> None:
    """A file that is no picture is refused when it comes; one that browsers cannot show is shown as they can."""

    def check(request: gr.Request, path: str):
        found = [] if offer is None else [None, gr.update(visible=False), ""]
        try:
            with jobs.start(request.session_hash, f"check {picture.elem_id or id(picture)}") as job:
                check_chosen(path, "a picture")
                if offer is not None:
                    found = offer.answer(path, job.text)
                return answered(shown(path, job), found)
        except EditError as error:
            toast(error)
        except Stopped:  # the page has closed, or another file has come
            pass
        return answered(None, found)

    def shown(path: str, job: Job) -> str:
        """A file with this picture that browsers can show."""
        image = read_picture(path, decode=job.open)
        if Path(path).suffix.lower() in SHOWN_BY_BROWSERS:
            return path
        with writing(new_folder() / f"{Path(path).stem}.png") as png:  # in the upload's folder another file may have that name
            png.write_bytes(encode_png(image))
        return str(png)

    def answered(path: str | None, found: list):
        return [path, *found] if found else path

    outputs = [picture, *([] if offer is None else offer.outputs)]
    picture.upload(check, picture, outputs, api_visibility="private", show_progress="hidden", concurrency_limit=4)

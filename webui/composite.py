"""The tab for two pictures: laid on each other, mixed, or both given to the model.

The first two make one flat picture, which the page draws while the controls move (`collage.js`) and which is then
edited like any other. With "Edit while I move things" each position is edited too, as fast as the engine can: Gradio
then runs one edit at a time and afterwards the newest position, so nothing queues up.
"""

import gradio as gr
import numpy as np

from engine.fitting import at_output_size
from pipeline.images import EditError
from qwen_realtime import LIMITS, EditParams
from serving.holder import EngineHolder
from webui.collage import LIMITS as PLACES
from webui.collage import collage
from webui.controls import Settings, edit_params
from webui.parts import (
    EDITS_AT_A_TIME,
    Offer,
    asset,
    create_ask,
    create_chips,
    create_outcome,
    create_picture,
    on_edit,
    on_upload,
    toast,
)  # fmt: skip
from webui.work import Jobs, Stopped, check_chosen, describe, read_picture, run_edit, save_png, wait_for_engine

# Puts the words at the cursor of the tab's prompt, as if they had been typed.
NAME_PICTURE = """(text) => {
  const field = [...document.querySelectorAll(".area-ask textarea, .area-ask input")].find((each) => each.offsetParent);
  const at = Math.min(field?.selectionStart ?? text.length, text.length);
  const before = text.slice(0, at), after = text.slice(at), words = "picture NUMBER";
  const gap = (side, letter) => side && letter && !/\\s/.test(letter) ? " " : "";
  const put = before + gap(before, before.at(-1)) + words + gap(after, after[0]) + after;
  setTimeout(() => { field?.focus(); field?.setSelectionRange(put.length - after.length, put.length - after.length); }, 60);
  return put;
}"""
SHARE_COLLAGE = """(first, second, mode, across, down, scale, opacity, ratio) => {
  window.collage = {first: first?.url, second: second?.url, mode, across, down, scale, opacity, ratio};
  window.dispatchEvent(new CustomEvent("collage"));
}"""


def flatten(first: np.ndarray, second: np.ndarray, mode: str, place: list[float], ratio: float) -> tuple[list, dict]:
    """(pictures, fields of EditParams) that the tab's controls ask for."""
    if mode == "collage":
        return [collage(first, second, **dict(zip(PLACES, place, strict=True)))], {"mode": "edit"}
    return [first, second], {"mode": mode, "blend_ratio": ratio}


def create_composite(
    holder: EngineHolder, jobs: Jobs, settings: Settings, presets: list[dict], pair_presets: list[dict]
) -> None:
    with gr.Row(elem_classes="areas"):
        with gr.Column(elem_classes="area-source"):
            with gr.Row(elem_classes="pair"):
                with gr.Column(elem_classes="slot slot-1", min_width=120):
                    first = create_picture("Picture 1", 230, camera=True)
                with gr.Column(elem_classes="slot slot-2", min_width=120):
                    second = create_picture("Picture 2", 230, camera=False)
            swap = gr.Button("⇄ Swap the pictures", size="sm", elem_id="composite-swap")
            offer_place = gr.Column()
            mode = gr.Radio(
                [("Blend, then edit", "blend"), ("Collage, then edit", "collage"), ("Both as references", "references")],
                value="blend",
                label="How the two are used",
            )
            with gr.Column() as flat:
                preview = gr.HTML(
                    html_template=asset("collage.html"), css_template=asset("collage.css"),
                    js_on_load=asset("collage.js"), apply_default_css=False,
                )  # fmt: skip
                ratio = gr.Slider(
                    *LIMITS["blend_ratio"],
                    value=EditParams(prompt="-").blend_ratio,
                    step=0.01,
                    label="Blend ratio",
                    info="0 is picture 1 alone, 1 is picture 2 alone.",
                )
                with gr.Column(visible=False) as place_controls:
                    across = gr.Slider(*PLACES["across"], value=0.5, step=0.01, label="Across", info="Of picture 2's middle.")
                    down = gr.Slider(*PLACES["down"], value=0.5, step=0.01, label="Down", info="Of picture 2's middle.")
                    scale = gr.Slider(*PLACES["scale"], value=0.4, step=0.01, label="Scale", info="Its width; 1 is picture 1's.")
                    opacity = gr.Slider(*PLACES["opacity"], value=1.0, step=0.01, label="Opacity", info="0 is unseen.")
                live = gr.Checkbox(False, label="Edit while I move things", elem_id="composite-live")
        prompt, button, stop = create_ask("composite", jobs)
        with offer_place:
            offer = Offer(prompt, settings)
        with gr.Column(elem_classes="area-chips"):
            with gr.Column() as chips:  # in columns: a gr.HTML loses its presets when it is itself shown or hidden
                create_chips(presets, prompt)
            with gr.Column(visible=False) as pair_chips:
                with gr.Row(elem_classes="buttons"):
                    names = [gr.Button(f"Name picture {number}", size="sm", min_width=120) for number in (1, 2)]
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
            download, text, again = create_outcome("composite", "Use as picture 1")

    place = [across, down, scale, opacity]
    shows = [output, download, text, settings.seed, button, stop, again]

    def made(request, path_1, path_2, mode, ratio, prompt, place, values, progress) -> dict:
        """What the tab is to show after this edit. Raises EditError, Stopped."""
        check_chosen(path_1, "picture 1")
        check_chosen(path_2, "picture 2")
        with jobs.start(request.session_hash, "composite") as job:
            engine = wait_for_engine(holder, job, progress)
            pictures = [(path_1, "picture 1"), (path_2, "picture 2")]
            images, own = flatten(*(read_picture(*each, job.open) for each in pictures), mode, place, ratio)
            params = edit_params(prompt, images[0].shape[1::-1], engine.default_size, values, **own)
            progress(0.0, desc="Reading the prompt and the pictures")
            pictures = at_output_size(images, params, engine.default_size, engine.config.max_pixels)
            result = run_edit(
                engine, pictures, params, job,
                lambda step, of: progress((step, of), desc=f"Step {step} of {of}"),
            )  # fmt: skip
        path = save_png(result, engine.description["model"])
        download_button = gr.update(value=path, interactive=True)
        return {
            output: path,
            download: download_button,
            text: describe(result),
            settings.seed: params.seed,
            again: gr.update(interactive=True),
        }

    def edit(request: gr.Request, path_1, path_2, mode, ratio, prompt, *values, progress=gr.Progress()):  # noqa: B008
        yield {button: gr.update(interactive=False), stop: gr.update(interactive=True)}
        answer = {}
        try:
            answer = made(request, path_1, path_2, mode, ratio, prompt, values[:4], values[4:], progress)
        except EditError as error:
            toast(error)
        except Stopped:
            gr.Info("Stopped.")
        yield answer | {button: gr.update(interactive=True), stop: gr.update(interactive=False)}

    def edit_live(request: gr.Request, live, path_1, path_2, mode, ratio, prompt, *values):
        if not live or mode == "references" or path_1 is None or path_2 is None or not (prompt or "").strip():
            return {text: gr.skip()}
        seed, locked = settings.all().index(settings.seed) + 4, settings.all().index(settings.locked) + 4
        values = [*values[:locked], True, *values[locked + 1 :]]  # another seed at each place would flicker
        values[seed] = values[seed] or 0
        try:
            return made(request, path_1, path_2, mode, ratio, prompt, values[:4], values[4:], lambda *_, **__: None)
        except EditError as error:
            toast(error)
        except Stopped:
            pass  # Edit was pressed: its own result comes
        return {text: gr.skip()}

    inputs = [first, second, mode, ratio, prompt, *place, *settings.all()]
    on_edit(button, prompt, edit, inputs, shows)
    gr.on(
        [control.change for control in (first, second, mode, ratio, *place, live)],
        edit_live,
        [live, *inputs],
        [output, download, text, settings.seed, again],
        api_visibility="private",
        show_progress="hidden",
        concurrency_limit=EDITS_AT_A_TIME,
        concurrency_id="edit",
        trigger_mode="always_last",
    )
    _connect_in_the_browser(preview, first, second, mode, ratio, place, swap, again, output, names, prompt)
    on_upload(first, jobs, offer)
    on_upload(second, jobs, offer)
    mode.change(
        lambda mode: [gr.update(visible=visible) for visible in (
            mode != "references", mode == "blend", mode == "collage", mode != "references", mode == "references",
        )],
        mode,
        [flat, ratio, place_controls, chips, pair_chips],
        api_visibility="private",
        show_progress="hidden",
    )  # fmt: skip


def _connect_in_the_browser(preview, first, second, mode, ratio, place, swap, again, output, names, prompt) -> None:
    """What needs no server: the preview, which may move picture 2 itself, the swap, the way back, the names."""
    across, down, scale, _ = place
    shared = [first, second, mode, *place, ratio]
    gr.on([control.change for control in shared], fn=None, inputs=shared, js=SHARE_COLLAGE, api_visibility="private")
    preview.input(
        fn=None,
        js="(at) => [at.across, at.down, at.scale]",
        inputs=preview,
        outputs=[across, down, scale],
        api_visibility="private",
    )
    swap.click(
        fn=None, js="(a, b) => [b, a]", inputs=[first, second], outputs=[first, second], api_visibility="private"
    )
    again.click(fn=None, js="(file) => file", inputs=output, outputs=first, api_visibility="private")
    for number, button in enumerate(names, 1):
        js = NAME_PICTURE.replace("NUMBER", str(number))
        button.click(fn=None, js=js, inputs=prompt, outputs=prompt, api_visibility="private")

"""The tab for two pictures: one placed on the other, mixed, or both given to the model.

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


class CompositeTab:
    """The tab: its layout when it is made, then what its controls do."""

    def __init__(self, holder: EngineHolder, jobs: Jobs, settings: Settings, presets: list[dict], pair_presets: list[dict]):
        self._holder, self._jobs, self._settings = holder, jobs, settings
        with gr.Row(elem_classes="areas"):
            with gr.Column(elem_classes="area-source"):
                self._create_pictures()
                self._create_controls()
            self.prompt, self.button, self.stop = create_ask("composite", jobs)
            with self.offer_place:
                self.offer = Offer(self.prompt, settings)
            with gr.Column(elem_classes="area-chips"):
                self._create_presets(presets, pair_presets)
            with gr.Column(elem_classes="area-result"):
                self.output = gr.Image(
                    label="Result", alt_text="Edited picture", type="filepath", format="png", interactive=False, height=380,
                    buttons=["fullscreen"],
                )  # fmt: skip
                self.download, self.text, self.again = create_outcome("composite", "Use as picture 1")
        self._connect()
        self._connect_in_the_browser()

    # Layout

    def _create_pictures(self) -> None:
        with gr.Row(elem_classes="pair"):
            with gr.Column(elem_classes="slot slot-1", min_width=120):
                self.first = create_picture("Picture 1", 230, camera=True)
            with gr.Column(elem_classes="slot slot-2", min_width=120):
                self.second = create_picture("Picture 2", 230, camera=False)
        self.swap = gr.Button("⇄ Swap the pictures", size="sm", elem_id="composite-swap")
        self.offer_place = gr.Column()

    def _create_controls(self) -> None:
        """How the two are used, and where they lie."""
        self.mode = gr.Radio(
            [("Blend, then edit", "blend"), ("Collage, then edit", "collage"), ("Both as references", "references")],
            value="blend",
            label="How the two are used",
        )
        with gr.Column() as self.flat:
            self.preview = gr.HTML(
                html_template=asset("collage.html"), css_template=asset("collage.css"),
                js_on_load=asset("collage.js"), apply_default_css=False,
            )  # fmt: skip
            self.ratio = gr.Slider(
                *LIMITS["blend_ratio"],
                value=EditParams(prompt="-").blend_ratio,
                step=0.01,
                label="Blend ratio",
                info="0 is picture 1 alone, 1 is picture 2 alone.",
            )
            with gr.Column(visible=False) as self.place_controls:
                across = gr.Slider(*PLACES["across"], value=0.5, step=0.01, label="Across", info="Of picture 2's middle.")
                down = gr.Slider(*PLACES["down"], value=0.5, step=0.01, label="Down", info="Of picture 2's middle.")
                scale = gr.Slider(*PLACES["scale"], value=0.4, step=0.01, label="Scale", info="Its width; 1 is picture 1's.")
                opacity = gr.Slider(*PLACES["opacity"], value=1.0, step=0.01, label="Opacity", info="0 is unseen.")
            self.place = {"across": across, "down": down, "scale": scale, "opacity": opacity}
            self.live = gr.Checkbox(False, label="Edit while I move things", elem_id="composite-live")

    def _create_presets(self, presets: list[dict], pair_presets: list[dict]) -> None:
        with gr.Column() as self.chips:  # in columns: a gr.HTML loses its presets when it is itself shown or hidden
            create_chips(presets, self.prompt)
        with gr.Column(visible=False) as self.pair_chips:
            with gr.Row(elem_classes="buttons"):
                self.names = [gr.Button(f"Name picture {number}", size="sm", min_width=120) for number in (1, 2)]
            create_chips(pair_presets, self.prompt)

    # What happens

    def _connect(self) -> None:
        made = [self.output, self.download, self.text, self._settings.seed, self.again]
        pictures = [self.first, self.second, self.mode, self.ratio, *self.place.values()]
        inputs = {self.prompt, *pictures, *self._settings.all()}
        on_edit(self.button, self.prompt, self._edit, inputs, [*made, self.button, self.stop])
        gr.on(
            [control.change for control in (*pictures, self.live)],
            self._edit_live,
            {self.live, *inputs},
            made,
            api_visibility="private",
            show_progress="hidden",
            concurrency_limit=EDITS_AT_A_TIME,
            concurrency_id="edit",
            trigger_mode="always_last",
        )
        on_upload(self.first, self._jobs, self.offer)
        on_upload(self.second, self._jobs, self.offer)
        self.mode.change(
            lambda mode: [gr.update(visible=visible) for visible in (
                mode != "references", mode == "blend", mode == "collage", mode != "references", mode == "references",
            )],
            self.mode,
            [self.flat, self.ratio, self.place_controls, self.chips, self.pair_chips],
            api_visibility="private",
            show_progress="hidden",
        )  # fmt: skip

    def _connect_in_the_browser(self) -> None:
        """What needs no server: the preview, which may move picture 2 itself, the swap, the way back, the names."""
        pair, place = [self.first, self.second], self.place
        shared = [*pair, self.mode, *place.values(), self.ratio]
        gr.on([control.change for control in shared], fn=None, inputs=shared, js=SHARE_COLLAGE, api_visibility="private")
        self.preview.input(
            fn=None,
            js="(at) => [at.across, at.down, at.scale]",
            inputs=self.preview,
            outputs=[place["across"], place["down"], place["scale"]],
            api_visibility="private",
        )
        self.swap.click(fn=None, js="(a, b) => [b, a]", inputs=pair, outputs=pair, api_visibility="private")
        self.again.click(fn=None, js="(file) => file", inputs=self.output, outputs=self.first, api_visibility="private")
        for number, button in enumerate(self.names, 1):
            js = NAME_PICTURE.replace("NUMBER", str(number))
            button.click(fn=None, js=js, inputs=self.prompt, outputs=self.prompt, api_visibility="private")

    def _edit(self, values: dict, request: gr.Request, progress=gr.Progress()):  # noqa: B008 - how Gradio wants it
        yield {self.button: gr.update(interactive=False), self.stop: gr.update(interactive=True)}
        answer = {}
        try:
            answer = self._made(values, request, progress)
        except EditError as error:
            toast(error)
        except Stopped:
            gr.Info("Stopped.")
        yield answer | {self.button: gr.update(interactive=True), self.stop: gr.update(interactive=False)}

    def _edit_live(self, values: dict, request: gr.Request) -> dict:
        """For each change of a control, if that is wanted and all is there."""
        there = values[self.first] is not None and values[self.second] is not None and (values[self.prompt] or "").strip()
        if not values[self.live] or values[self.mode] == "references" or not there:
            return {self.text: gr.skip()}
        settings = self._settings
        steady = {settings.locked: True, settings.seed: values[settings.seed] or 0}  # another seed at each place would flicker
        try:
            return self._made(values | steady, request, lambda *_, **__: None)
        except EditError as error:
            toast(error)
        except Stopped:
            pass  # Edit was pressed: its own result comes
        return {self.text: gr.skip()}

    def _made(self, values: dict, request: gr.Request, progress) -> dict:
        """What the tab is to show after this edit. Raises EditError, Stopped."""
        files = [(values[self.first], "picture 1"), (values[self.second], "picture 2")]
        for path, name in files:
            check_chosen(path, name)
        place = [values[control] for control in self.place.values()]
        with self._jobs.start(request.session_hash, "composite") as job:
            engine = wait_for_engine(self._holder, job, progress)
            first, second = (read_picture(path, name, job.open) for path, name in files)
            images, own = flatten(first, second, values[self.mode], place, values[self.ratio])
            settings = self._settings.values_in(values)
            params = edit_params(values[self.prompt], images[0].shape[1::-1], engine.default_size, settings, **own)
            progress(0.0, desc="Reading the prompt and the pictures")
            pictures = at_output_size(images, params, engine.default_size, engine.config.max_pixels)
            result = run_edit(
                engine, pictures, params, job,
                lambda step, of: progress((step, of), desc=f"Step {step} of {of}"),
            )  # fmt: skip
        path = save_png(result, engine.description["model"])
        return {
            self.output: path,
            self.download: gr.update(value=path, interactive=True),
            self.text: describe(result),
            self._settings.seed: params.seed,
            self.again: gr.update(interactive=True),
        }

"""The settings that all tabs share, and what they and a tab's own controls say as `EditParams`.

They are ordinary Gradio controls. A listener without a Python side copies each change to `window.editSettings`, so that
it reaches the live socket without a round trip through Gradio's queue.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr

from engine.fitting import size_in_shape
from qwen_realtime import LIMITS, EditParams

SIZES = (128, 192, 256, 320, 384, 512, 640, 768, 1024)


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

    def values_in(self, values: dict) -> list:
        """These controls' values, in the same order, of a handler's {component: value}."""
        return [values[control] for control in self.all()]


# The live view reads what the shared controls say from here; see sendParams in live/settings.js.
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


def edit_params(prompt: str | None, picture: tuple[int, int], side: int, settings: Sequence, **own) -> EditParams:
    """The shared controls' values as EditParams; `own` are fields that the tab sets itself. `picture` is the first one's
    (width, height), `side` the model's own size. Raises EditError.
    """
    steps, size, shape, seed, locked, cfg_scale, negative_prompt = settings
    side = size or side
    width, height = (side, side) if shape != "keep" else size_in_shape(picture, side)
    return EditParams(
        prompt=prompt or "",
        negative_prompt=negative_prompt or "",
        steps=steps,
        width=width,
        height=height,
        seed=(seed or 0) if locked else random.randrange(int(LIMITS["seed"][1]) + 1),
        cfg_scale=cfg_scale,
        fit="pad" if shape == "pad" else "crop",
        **own,
    )


def control_values(params: EditParams) -> list:
    """What the shared controls must say for `edit_params` to give these params: the way back, in the same order.

    The size is the nearest that the page offers; the seed stays the same, or the next edit would draw another.
    """
    width, height = params.width or 0, params.height or 0
    area = (width * height) ** 0.5
    size = min(SIZES, key=lambda side: abs(side - area)) if area else 0
    square = "pad" if params.fit == "pad" else "crop"
    shape = square if width == height and area else "keep"
    return [params.steps, size, shape, params.seed, True, params.cfg_scale, params.negative_prompt]

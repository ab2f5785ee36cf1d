"""The live view's part of the page: its own markup and script over the socket of `serving/live.py`, because Gradio's own
streaming shows fewer frames, later. What the script does where is said at the top of `elements.js`.
"""

import json
from dataclasses import asdict
from pathlib import Path

import gradio as gr

from pipeline.images import EditError
from qwen_realtime import LIMITS, EditParams
from webui.controls import Settings, control_values
from webui.parts import toast

HERE = Path(__file__).resolve().parent
# One script, in this order: what a file does while it is read needs only what stands before it.
SCRIPTS = (
    "elements", "stage", "settings", "sources", "weight", "beat", "frames", "links", "pictures", "truth", "png", "gallery", "start",
)  # fmt: skip


def create_live(settings: Settings, presets: list[dict]) -> None:
    live = gr.HTML(
        value="",
        html_template=(HERE / "live.html").read_text(encoding="utf-8"),
        css_template=(HERE / "live.css").read_text(encoding="utf-8"),
        js_on_load="\n".join((HERE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS),
        apply_default_css=False,
        elem_id="live",
        presets=presets,
        first_prompt=presets[0]["prompt"],
        defaults=asdict(EditParams(prompt="-")),
        limits=LIMITS,
    )

    def take_over(text: str) -> list:
        """The shared controls as the settings say that a snapshot carried."""
        try:
            return control_values(EditParams.from_dict(json.loads(text)))
        except (EditError, ValueError) as error:
            toast(f"The snapshot's settings cannot be used. {error}")
            return [gr.skip()] * len(settings.all())

    live.submit(take_over, live, settings.all(), api_visibility="private", show_progress="hidden")

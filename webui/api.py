"""What programs may call through `gradio_client`, and through MCP: one endpoint for one picture, one for two.

    from gradio_client import Client, handle_file
    client = Client("http://127.0.0.1:7865")
    path, about = client.predict(handle_file("photo.jpg"), "make it a pencil sketch", api_name="/edit")

Every other event of the page is private: it belongs to one page and its layout. The names and the defaults are those of
POST /edit. As there, pictures come with the call: Gradio would fetch a picture's address for its caller, and `Page`
refuses that for every event.
"""

import logging

import gradio as gr

from engine.fitting import at_output_size
from pipeline.images import EditError
from qwen_realtime import CHOICES, EditParams
from serving.access import plain
from serving.holder import EngineHolder
from webui.collage import LIMITS as PLACES
from webui.composite import flatten
from webui.full_disk import DISK_FULL, disk_full
from webui.mcp import with_own_files
from webui.parts import EDITS_AT_A_TIME, take_file
from webui.uploads import check_files
from webui.work import Jobs, Stopped, read_picture, run_edit, save_png, wait_for_engine

log = logging.getLogger(__name__)

MODES = ("references", "blend", "collage")


class Page(gr.Blocks):
    """The page. It opens what was uploaded to it and nothing else, and nothing is fetched for its callers."""

    async def preprocess_data(self, block_fn, inputs, state, explicit_call=False):
        inputs = [with_own_files(value) for value in inputs]
        try:
            check_files(inputs)
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except EditError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # the caller's values, read by Gradio
            log.info("an event's values cannot be read: %s: %s", type(error).__name__, error)
            wanted = ", ".join(type(block).__name__ for block in block_fn.inputs)
            raise gr.Error(f"The {len(inputs)} values do not fit this event. It takes: {wanted}.", print_exception=False) from None

    async def postprocess_data(self, block_fn, predictions, state):
        try:  # Gradio copies each file that an event answers
            return await super().postprocess_data(block_fn, predictions, state)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise gr.Error(disk_full(error), print_exception=False) from None


class Endpoints:
    """Two endpoints over components that no one sees: they say the types and the defaults."""

    def __init__(self, holder: EngineHolder, jobs: Jobs):
        self._holder, self._jobs = holder, jobs
        self._create()

    def _create(self) -> None:
        with gr.Column(visible=False):
            image, ref_image = gr.Image(label="Picture", type="filepath"), gr.Image(label="Picture 2", type="filepath")
            take_file(image)
            take_file(ref_image)
            prompt = gr.Textbox(label="Prompt")
            common = _common_components()
            mode = gr.Dropdown(MODES, value="references", label="Mode", allow_custom_value=True)
            ratio = gr.Number(EditParams.blend_ratio, label="Blend ratio")
            middles = {"across": 0.5, "down": 0.5, "scale": 0.4, "opacity": 1.0}
            place = [gr.Number(middles[name], label=name.capitalize()) for name in PLACES]
            picture, about = gr.Image(label="Edited picture", type="filepath", format="png"), gr.JSON(label="About it")
            for name, function, inputs in (
                ("edit", self.edit, [image, prompt, *common]),
                ("composite", self.composite, [image, ref_image, prompt, mode, ratio, *place, *common]),
            ):
                gr.Button(name).click(
                    function, inputs, [picture, about], api_name=name, concurrency_limit=EDITS_AT_A_TIME, concurrency_id="edit",
                )  # fmt: skip

    def _made(self, request: gr.Request, name: str, pictures: list, prompt, flat, settings: dict) -> tuple[str, dict]:
        try:
            with self._jobs.start(request.session_hash or "", f"api {name} {id(request)}") as job:
                engine = wait_for_engine(self._holder, job, lambda *_, **__: None)
                images, own = flat([read_picture(path, which, job.open) for path, which in pictures])
                params = EditParams(prompt=prompt or "", **settings, **own)
                fitted = at_output_size(images, params, engine.default_size, engine.config.max_pixels)
                result = run_edit(engine, fitted, params, job, lambda step, of: None)
            saved = save_png(result, engine.description["model"])
        except EditError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except Stopped:
            raise gr.Error("The caller has left.", print_exception=False) from None
        about = {
            "width": result.picture.shape[1],
            "height": result.picture.shape[0],
            "seed": params.seed,
            "stages_ms": {name: round(ms, 1) for name, ms in result.stages_ms.items()},
            "age_ms": round(result.age_ms, 1),
            "notes": list(result.notes),
        }
        return saved, plain(about)

    def edit(
        self, request: gr.Request, image, prompt, steps, width, height, seed, cfg_scale, negative_prompt, fit, reference_area
    ):
        """Edits a picture by an instruction in words.

        Args:
            image: The picture, as an uploaded file; over MCP by its address on this server, or as data:image/png;base64,... (nothing is fetched).
            prompt: What to change, for example "make it a pencil sketch". At most 2000 characters.
            steps: Denoising steps, 1 to 8. More is slower, often finer.
            width: Of the result in pixels, 1 to 2048; 0: it follows from the height and the picture's shape, 0 in both: also the area is the model's own.
            height: As the width.
            seed: The same seed, picture and settings give the same result.
            cfg_scale: True CFG, 1 to 10. 1 is off; above it every step takes twice as long.
            negative_prompt: What not to do; read when cfg_scale is above 1.
            fit: How a picture of another shape meets a width and height that are both given: "crop" cuts it to fill, "pad" shows it whole on black.
            reference_area: The size at which the model sees the picture: the "output"'s, or the megapixel of the "stock" pipeline.

        Returns:
            The edited picture as a PNG file with its settings inside, and its size, seed, timings and notes.
        """
        settings = _settings(steps, width, height, seed, cfg_scale, negative_prompt, fit, reference_area)
        return self._made(request, "edit", [(image, "a picture")], prompt, lambda images: (images, {}), settings)

    def composite(
        self, request: gr.Request, image, ref_image, prompt, mode, blend_ratio, across, down, scale, opacity,
        steps, width, height, seed, cfg_scale, negative_prompt, fit, reference_area,
    ):  # fmt: skip
        """Edits two pictures together by an instruction in words.

        Args:
            image: Picture 1, as an uploaded file; over MCP by its address on this server, or as data:image/png;base64,... (nothing is fetched).
            ref_image: Picture 2, likewise.
            prompt: What to do; with mode "references" it may speak of picture 1 and picture 2.
            mode: "references": the model sees both, each whole and in its own shape; "blend": they are mixed by blend_ratio, then edited; "collage": picture 2 is laid on picture 1, then the flat result is edited.
            blend_ratio: For mode "blend": 0 is picture 1 alone, 1 is picture 2 alone.
            across: For mode "collage": where picture 2's middle lies, 0 (left) to 1 (right) of picture 1.
            down: For mode "collage": the same from 0 (top) to 1 (bottom).
            scale: For mode "collage": picture 2's width, 1 is as wide as picture 1. 0.05 to 2.
            opacity: For mode "collage": 0 is unseen, 1 covers.
            steps: Denoising steps, 1 to 8. More is slower, often finer.
            width: Of the result in pixels, 1 to 2048; 0: it follows from the height and picture 1's shape, 0 in both: also the area is the model's own.
            height: As the width.
            seed: The same seed, pictures and settings give the same result.
            cfg_scale: True CFG, 1 to 10. 1 is off; above it every step takes twice as long.
            negative_prompt: What not to do; read when cfg_scale is above 1.
            fit: How a picture of another shape meets a width and height that are both given: "crop" cuts it to fill, "pad" shows it whole on black.
            reference_area: The size at which the model sees the pictures: the "output"'s, or the megapixel of the "stock" pipeline.

        Returns:
            The edited picture as a PNG file with its settings inside, and its size, seed, timings and notes.
        """

        def flat(images: list):
            if mode not in MODES:
                raise EditError(f"mode is {mode!r}. Allowed: {', '.join(MODES)}.")
            first, second = images
            return flatten(first, second, mode, [across, down, scale, opacity], blend_ratio)

        settings = _settings(steps, width, height, seed, cfg_scale, negative_prompt, fit, reference_area)
        return self._made(request, "composite", [(image, "picture 1"), (ref_image, "picture 2")], prompt, flat, settings)


def _common_components() -> list:
    """For the parameters that both endpoints have, in the order of `_settings`."""
    return [
        gr.Number(EditParams.steps, label="Steps"),
        gr.Number(0, label="Width"),
        gr.Number(0, label="Height"),
        gr.Number(EditParams.seed, label="Seed"),
        gr.Number(EditParams.cfg_scale, label="CFG scale"),
        gr.Textbox(EditParams.negative_prompt, label="Negative prompt"),
        gr.Dropdown(CHOICES["fit"], value=EditParams.fit, label="Fit", allow_custom_value=True),
        gr.Dropdown(CHOICES["reference_area"], value=EditParams.reference_area, label="Area", allow_custom_value=True),
    ]


def _settings(steps, width, height, seed, cfg_scale, negative_prompt, fit, reference_area) -> dict:
    return {
        "steps": steps,
        "width": width or None,
        "height": height or None,
        "seed": seed,
        "cfg_scale": cfg_scale,
        "negative_prompt": negative_prompt or "",
        "fit": fit,
        "reference_area": reference_area,
    }

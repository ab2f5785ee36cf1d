"""The tab for photos: one, or several in a row. Every result stays below while the page is open."""

import zipfile
from pathlib import Path

import gradio as gr

from engine.fitting import at_output_size
from pipeline.images import EditError, encode_png
from serving.holder import EngineHolder
from webui.controls import Settings, edit_params
from webui.parts import (
    EDITS_AT_A_TIME,
    SHOW_RESULT,
    Offer,
    create_ask,
    create_chips,
    create_outcome,
    create_picture,
    on_edit,
    on_upload,
    toast,
)  # fmt: skip
from webui.work import (
    Jobs,
    Stopped,
    check_chosen,
    describe,
    new_folder,
    read_picture,
    run_edit,
    save_png,
    wait_for_engine,
    writing,
)  # fmt: skip

MOST_FILES = 50
MOST_KEPT = 60  # results on one page


class UploadTab:
    """The tab: its layout when it is made, then what its controls do."""

    def __init__(self, holder: EngineHolder, jobs: Jobs, settings: Settings, presets: list[dict]):
        self._holder, self._jobs, self._settings = holder, jobs, settings
        with gr.Row(elem_classes="areas"):
            with gr.Column(elem_classes="area-source"):
                self.picture = create_picture("Photo", 380, camera=True)
                offer_place = gr.Column()
                with gr.Accordion("Several photos in a row", open=False):
                    self.files = gr.File(label="Photos", file_count="multiple", file_types=["image"], height=180)
                    self.edit_all = gr.Button("Edit all", elem_id="upload-edit-all")
            self.prompt, self.button, self.stop = create_ask("upload", jobs)
            with offer_place:
                self.offer = Offer(self.prompt, settings)
            with gr.Column(elem_classes="area-chips"):
                create_chips(presets, self.prompt)
            with gr.Column(elem_classes="area-result"):
                self.slider = gr.ImageSlider(
                    label="Before and after",
                    type="filepath",
                    format="png",
                    interactive=False,
                    max_height=420,  # and no height, which would cut a portrait
                    buttons=["fullscreen"],
                )
                self.download, self.text, self.again = create_outcome("upload", "Use as the photo")
            with gr.Column(elem_classes="area-kept"):
                self.gallery = gr.Gallery(
                    label="Results so far", columns=6, height="auto", object_fit="cover", interactive=False, visible=False,
                    allow_preview=False, buttons=[],
                )  # fmt: skip
                self.zipped = gr.DownloadButton("Download all of them", visible=False)
        self.results = gr.State([])  # of {"before", "after", "text"}: the newest last
        self._connect()

    def _connect(self) -> None:
        shown = [self.slider, self.download, self.text, self.again]
        shows = [*shown, self._settings.seed, self.button, self.edit_all, self.stop, self.results, self.gallery, self.zipped]
        asked = {self.prompt, self.results, *self._settings.all()}
        on_edit(self.button, self.prompt, self._edit, {self.picture, *asked}, shows)
        self.edit_all.click(
            self._edit_all, {self.files, *asked}, shows, api_visibility="private", show_progress_on=self.slider,
            concurrency_limit=EDITS_AT_A_TIME, concurrency_id="edit", trigger_mode="once",
        )  # fmt: skip
        self.edit_all.click(fn=None, js=SHOW_RESULT, api_visibility="private")
        self.gallery.select(self._show_again, self.results, shown, api_visibility="private", show_progress="hidden")
        # In the browser alone: the file is where it is shown from.
        pick = "(pair) => pair?.[1] ?? null"
        self.again.click(fn=None, js=pick, inputs=self.slider, outputs=self.picture, api_visibility="private")
        on_upload(self.picture, self._jobs, self.offer)

    # What happens

    def _edit(self, values: dict, request: gr.Request, progress=gr.Progress()):  # noqa: B008 - how Gradio wants it
        yield self._busy(True)
        answer = {}
        try:
            with self._jobs.start(request.session_hash, "upload") as job:
                one, seed = self._edit_one(values[self.picture], "The photo", values, job, progress, 0.0, 1.0)
            answer = self._shown(one) | self._with(values[self.results], one) | {self._settings.seed: seed}
        except EditError as error:
            toast(error)
        except Stopped:
            gr.Info("Stopped.")
        yield answer | self._busy(False)

    def _edit_all(self, values: dict, request: gr.Request, progress=gr.Progress()):  # noqa: B008
        yield self._busy(True)
        made, paths = [], values[self.files] or []
        try:
            if not 1 <= len(paths) <= MOST_FILES:
                raise EditError(f"{len(paths)} photos were chosen. Allowed in a row: 1 to {MOST_FILES}.")
            with self._jobs.start(request.session_hash, "upload") as job:
                for number, path in enumerate(paths):
                    name = f"Photo {number + 1} of {len(paths)}"
                    try:
                        one, _ = self._edit_one(path, name, values, job, progress, number / len(paths), 1 / len(paths))
                    except EditError as error:  # the others are edited all the same
                        toast(f"{name} ({Path(path).name}): {error}")
                        continue
                    made.append(one)
                    yield self._shown(one) | self._with(values[self.results], one)
        except EditError as error:
            toast(error)
        except Stopped:
            gr.Info(f"Stopped after {len(made)} of {len(paths)} photos.")
        answer = {}
        if len(made) > 1:
            try:
                answer = {self.zipped: gr.update(value=_zip(made), visible=True)}
            except EditError as error:
                toast(error)
        yield answer | self._busy(False)

    def _edit_one(self, path: str, name: str, values: dict, job, progress, done: float, share: float) -> tuple[dict, int]:
        """(the result, the seed) of one file; `share` of the progress is its, from `done` on."""
        check_chosen(path, "a photo")
        engine = wait_for_engine(self._holder, job, progress)
        image = read_picture(path, "a photo", job.open)
        settings = self._settings.values_in(values)
        params = edit_params(values[self.prompt], image.shape[1::-1], engine.default_size, settings)
        fitted = at_output_size([image], params, engine.default_size, engine.config.max_pixels)
        progress(done, desc=f"{name}: reading the prompt and the picture")
        result = run_edit(
            engine, fitted, params, job,
            lambda step, of: progress(done + share * step / of, desc=f"{name}: step {step} of {of}"),
        )  # fmt: skip
        after = save_png(result, engine.description["model"])
        before = Path(after).parent / "before.png"
        with writing(before):
            before.write_bytes(encode_png(fitted.images[0]))
        return {"before": str(before), "after": after, "text": describe(result)}, params.seed

    # What is shown then

    def _busy(self, on: bool) -> dict:
        edits = {self.button: gr.update(interactive=not on), self.edit_all: gr.update(interactive=not on)}
        return edits | {self.stop: gr.update(interactive=on)}

    def _shown(self, one: dict) -> dict:
        return {
            self.slider: (one["before"], one["after"]),
            self.download: gr.update(value=one["after"], interactive=True),
            self.text: one["text"],
            self.again: gr.update(interactive=True),
        }

    def _with(self, results: list[dict], one: dict) -> dict:
        """The gallery with one more result."""
        results.append(one)
        del results[:-MOST_KEPT]
        captions = [(each["after"], Path(each["after"]).stem) for each in results]
        return {self.results: results, self.gallery: gr.update(value=captions, visible=len(results) > 1)}

    def _show_again(self, results: list[dict], chosen: gr.SelectData) -> dict:
        return self._shown(results[chosen.index]) if chosen.index < len(results) else {self.text: gr.skip()}


def _zip(made: list[dict]) -> str:
    """All results as one file; PNGs are not made smaller by packing."""
    path = new_folder() / "edited.zip"
    with writing(path), zipfile.ZipFile(path, "w") as archive:
        for number, one in enumerate(made, 1):
            archive.write(one["after"], f"{number:02d}-{Path(one['after']).name}")
    return str(path)

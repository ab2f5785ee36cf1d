"""The tab for photos: one, or several in a row. Every result is kept below while the page is open."""

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


def create_upload(holder: EngineHolder, jobs: Jobs, settings: Settings, presets: list[dict]) -> None:
    with gr.Row(elem_classes="areas"):
        with gr.Column(elem_classes="area-source"):
            picture = create_picture("Photo", 380, camera=True)
            offer_place = gr.Column()
            with gr.Accordion("Several photos in a row", open=False):
                files = gr.File(label="Photos", file_count="multiple", file_types=["image"], height=180)
                edit_all = gr.Button("Edit all", elem_id="upload-edit-all")
        prompt, button, stop = create_ask("upload", jobs)
        with offer_place:
            offer = Offer(prompt, settings)
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
            download, text, again = create_outcome("upload", "Use as the photo")
        with gr.Column(elem_classes="area-kept"):
            kept_pictures = gr.Gallery(
                label="Results so far", columns=6, height="auto", object_fit="cover", interactive=False, visible=False,
                allow_preview=False, buttons=[],
            )  # fmt: skip
            zipped = gr.DownloadButton("Download all of them", visible=False)
    kept = gr.State([])  # of {"before", "after", "text"}: the newest last

    shows = [slider, download, text, settings.seed, button, edit_all, stop, again, kept, kept_pictures, zipped]

    def edit_one(path: str, name: str, prompt: str, values: tuple, job, progress, done: float, share: float):
        """(what is to be kept, seed) of one file; `share` of the progress is its, from `done` on."""
        check_chosen(path, "a photo")
        engine = wait_for_engine(holder, job, progress)
        image = read_picture(path, "a photo", job.open)
        params = edit_params(prompt, image.shape[1::-1], engine.default_size, values)
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

    def busy(on: bool) -> dict:
        return {button: gr.update(interactive=not on), edit_all: gr.update(interactive=not on), stop: gr.update(interactive=on)}  # fmt: skip

    def shown(one: dict) -> dict:
        return {
            slider: (one["before"], one["after"]),
            download: gr.update(value=one["after"], interactive=True),
            text: one["text"],
            again: gr.update(interactive=True),
        }

    def with_kept(results: list[dict], one: dict) -> dict:
        results.append(one)
        del results[:-MOST_KEPT]
        captions = [(each["after"], Path(each["after"]).stem) for each in results]
        return {kept: results, kept_pictures: gr.update(value=captions, visible=len(results) > 1)}

    def edit(request: gr.Request, path, prompt, results, *values, progress=gr.Progress()):  # noqa: B008 - how Gradio wants it
        yield busy(True)
        answer = {}
        try:
            with jobs.start(request.session_hash, "upload") as job:
                one, seed = edit_one(path, "The photo", prompt, values, job, progress, 0.0, 1.0)
            answer = shown(one) | with_kept(results, one) | {settings.seed: seed}
        except EditError as error:
            toast(error)
        except Stopped:
            gr.Info("Stopped.")
        yield answer | busy(False)

    def edit_row(request: gr.Request, paths, prompt, results, *values, progress=gr.Progress()):  # noqa: B008
        yield busy(True)
        made = []
        try:
            if not paths or len(paths) > MOST_FILES:
                raise EditError(f"{len(paths or [])} photos were chosen. Allowed in a row: 1 to {MOST_FILES}.")
            with jobs.start(request.session_hash, "upload") as job:
                for number, path in enumerate(paths):
                    name = f"Photo {number + 1} of {len(paths)}"
                    try:
                        one, _ = edit_one(path, name, prompt, values, job, progress, number / len(paths), 1 / len(paths))
                    except EditError as error:  # the others are edited all the same
                        toast(f"{name} ({Path(path).name}): {error}")
                        continue
                    made.append(one)
                    yield shown(one) | with_kept(results, one)
        except EditError as error:
            toast(error)
        except Stopped:
            gr.Info(f"Stopped after {len(made)} of {len(paths)} photos.")
        answer = {}
        if len(made) > 1:
            try:
                answer = {zipped: gr.update(value=_zip(made), visible=True)}
            except EditError as error:
                toast(error)
        yield answer | busy(False)

    def show_again(results: list[dict], chosen: gr.SelectData):
        return shown(results[chosen.index]) if chosen.index < len(results) else {text: gr.skip()}

    on_edit(button, prompt, edit, [picture, prompt, kept, *settings.all()], shows)
    edit_all.click(
        edit_row, [files, prompt, kept, *settings.all()], shows, api_visibility="private", show_progress_on=slider,
        concurrency_limit=EDITS_AT_A_TIME, concurrency_id="edit", trigger_mode="once",
    )  # fmt: skip
    edit_all.click(fn=None, js=SHOW_RESULT, api_visibility="private")
    kept_pictures.select(show_again, kept, [slider, download, text, again], api_visibility="private", show_progress="hidden")
    # In the browser alone: the file is where it is shown from.
    again.click(fn=None, js="(pair) => pair?.[1] ?? null", inputs=slider, outputs=picture, api_visibility="private")
    on_upload(picture, jobs, offer)


def _zip(made: list[dict]) -> str:
    """All results as one file; PNGs are not made smaller by packing."""
    path = new_folder() / "edited.zip"
    with writing(path), zipfile.ZipFile(path, "w") as archive:
        for number, one in enumerate(made, 1):
            archive.write(one["after"], f"{number:02d}-{Path(one['after']).name}")
    return str(path)

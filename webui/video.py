"""The tab for videos: edited frame by frame through one session of the engine, which keeps still parts steady."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import gradio as gr
import numpy as np

from engine.fitting import Fitted, notes, sized
from pipeline.images import EditError, encode_jpeg
from qwen_realtime import LIMITS, EditParams, Session
from serving.holder import EngineHolder
from webui.controls import Settings, edit_params
from webui.parts import SHOW_RESULT, create_ask, create_chips, take_file, toast
from webui.uploads import open_upload
from webui.video_edit import MAX_BYTES, MAX_SECONDS, Outcome, Progress, Stop, VideoInfo, counted, edit_video, probe
from webui.work import Job, Jobs, Stopped, new_folder, telling_name, wait_for_engine, writing

VIDEOS_AT_A_TIME = 2  # each takes its turn with all other edits, frame by frame
SHOW_EVERY_S = 0.5  # a preview is a file that the browser fetches
BLEND_STILL = 0.8  # pocket model, still scene with camera noise: 0.4 of the flicker; nothing lost where all moves
START_FROM_PREVIOUS = 0.0


class VideoTab:
    """The tab: its layout when it is made, then what its controls do."""

    def __init__(self, holder: EngineHolder, jobs: Jobs, settings: Settings, presets: list[dict]):
        self._holder, self._jobs, self._settings = holder, jobs, settings
        with gr.Row(elem_classes="areas"):
            with gr.Column(elem_classes="area-source"):
                self._create_source()
            self.prompt, self.button, self.stop = create_ask("video", jobs)
            with gr.Column(elem_classes="area-chips"):
                create_chips(presets, self.prompt)
            with gr.Column(elem_classes="area-result"):
                self.preview = gr.Image(
                    label="The frame that was edited last", alt_text="The frame that was edited last", format="jpeg",
                    interactive=False, height=320, buttons=["fullscreen"],
                )  # fmt: skip
                self.video = gr.Video(label="Edited video", interactive=False, visible=False, height=320)
                self.text = gr.Markdown("Progress will be written here.", elem_classes=["result-text", "video-progress"])
                self.download = gr.DownloadButton("Download the video", interactive=False)
        self._connect()

    def _create_source(self) -> None:
        self.source = gr.Video(label="Video", sources=["upload"], height=320)
        take_file(self.source)
        limits = f"At most {MAX_SECONDS / 60:g} minutes and {MAX_BYTES // 2**20} MB. The sound is kept as it is."
        gr.Markdown(limits, elem_classes="result-text")
        with gr.Accordion("Steadiness", open=False):
            self.blend_still = gr.Slider(
                *LIMITS["blend_still"], value=BLEND_STILL, step=0.05, label="Hold still parts",
                info="How much of the last result stays where the picture does not move.",
            )  # fmt: skip
            self.start = gr.Slider(
                *LIMITS["start_from_previous"], value=START_FROM_PREVIOUS, step=0.05, label="Start from the last result",
                info="More is steadier, and follows changes later.",
            )  # fmt: skip
            info = "Faster where little moves. An approximation."
            self.reuse = gr.Checkbox(False, label="Compute only what changes", info=info)

    def _connect(self) -> None:
        gr.on(
            [self.button.click, self.prompt.submit],
            self._edit,
            {self.source, self.prompt, self.blend_still, self.start, self.reuse, *self._settings.all()},
            [self.preview, self.video, self.text, self.download, self._settings.seed, self.button, self.stop],
            api_visibility="private",
            show_progress_on=self.text,  # over the preview it would hide what is being made
            concurrency_limit=VIDEOS_AT_A_TIME,
            concurrency_id="video",
            trigger_mode="once",
        )
        self.button.click(fn=None, js=SHOW_RESULT, api_visibility="private")

    # What happens

    def _edit(self, values: dict, request: gr.Request, progress=gr.Progress()):  # noqa: B008 - how Gradio wants it
        yield {
            self.button: gr.update(interactive=False), self.stop: gr.update(interactive=True),
            self.preview: gr.update(value=None, visible=True), self.video: gr.update(value=None, visible=False),
            self.download: gr.update(interactive=False), self.text: "",
        }  # fmt: skip
        try:
            with self._jobs.start(request.session_hash, "video") as job:
                yield from self._edited(job, values, progress)
        except EditError as error:
            toast(error)
        except Stopped:
            gr.Info("Stopped before the first frame.")
        yield {self.button: gr.update(interactive=True), self.stop: gr.update(interactive=False)}

    def _edited(self, job: Job, values: dict, progress):
        """What the tab shows while the video is edited, and at its end."""
        if values[self.source] is None:
            raise EditError("Choose a video first: drop a file, or press the upload field.")
        with open_upload(values[self.source]) as video:
            yield from self._edited_file(job, video, values, progress)

    def _edited_file(self, job: Job, video: BinaryIO, values: dict, progress):
        info = probe(video)
        engine = wait_for_engine(self._holder, job, progress)
        own = steadiness(values[self.blend_still], values[self.start], values[self.reuse])
        settings = self._settings.values_in(values)
        params = edit_params(values[self.prompt], (info.width, info.height), engine.default_size, settings, **own)
        folder = new_folder()
        try:
            with job.session(engine) as session:
                edit = editor(session, params, job)
                frames = edit_video(video, folder, edit, telling_name(params), stopped=lambda: job.stopped)
                yield from self._shown(frames, folder / "frame.jpg", info, params, progress)
        finally:
            (folder / "frame.jpg").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the edited video is in it
                folder.rmdir()

    def _shown(self, frames, preview_file: Path, info: VideoInfo, params: EditParams, progress):
        started = shown = time.monotonic()
        for step in frames:
            now = time.monotonic()
            if isinstance(step, Outcome):
                yield self._finished(step, params, now - started)
            elif step.number == 1 or now - shown >= SHOW_EVERY_S:
                shown = now
                progress(step.share or 0.0, desc=how_far(step, info.frames, now - started))
                with writing(preview_file):  # Gradio itself would leave half a file on a full disk
                    preview_file.write_bytes(encode_jpeg(step.picture))
                yield {self.preview: str(preview_file)}

    def _finished(self, outcome: Outcome, params: EditParams, seconds: float) -> dict:
        speed = f"{counted(outcome.frames)} in {seconds:.1f} s · {outcome.frames / seconds:.1f} frames/s"
        said = f"{speed} · {params.width}×{params.height} · seed {params.seed}"
        return {
            self.preview: gr.update(visible=False),
            self.video: gr.update(value=str(outcome.path), visible=True),
            self.download: gr.update(value=str(outcome.path), interactive=True),
            self.text: "<br>".join([said, *outcome.notes]),
            self._settings.seed: params.seed,
        }


def steadiness(blend_still: float = BLEND_STILL, start: float = START_FROM_PREVIOUS, reuse: bool = False) -> dict:
    """The fields of EditParams that keep a video's still parts from flickering."""
    return {
        "blend_still": blend_still,
        "start_from_previous": start,
        "motion_aware": True,  # what moves is not held back by the two above
        "reuse": "frames" if reuse else "off",
    }


def editor(session: Session, params: EditParams, job: Job) -> Callable[[np.ndarray], np.ndarray]:
    """The function that edits one frame for `edit_video`, at the size that `params` name."""
    assert params.width is not None and params.height is not None
    size = params.width, params.height

    def edit(picture: np.ndarray) -> np.ndarray:
        try:
            pictures = Fitted(sized([picture], params, *size), size, notes([picture], params, size))
            return session.result(session.submit(pictures, params)).picture
        except EditError:
            if job.stopped:  # closing the session is what made it fail
                raise Stop from None
            raise

    return edit


def how_far(step: Progress, frames: int | None, seconds: float) -> str:
    of = "" if not frames else f" of about {max(frames, step.number)}"
    left = "" if not step.share else f" · {seconds / step.share - seconds:.0f} s left"
    return f"Frame {step.number}{of} · {step.number / seconds:.1f} frames/s{left}"

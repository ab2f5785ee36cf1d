"""What is behind the page's tabs, without a browser: jobs and their stop, settings in pictures, the collage, ZeroGPU."""

import sys
import threading
import types
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
from PIL import Image
from support import ROOT
from support.http import StubPipeline, serving

from pipeline.images import EditError, encode_png
from qwen_realtime import EditParams, EditResult, EngineConfig, RealtimeEngine
from server import EngineHolder
from serving.decoding import Limits
from serving.startup import load_engine
from webui.collage import collage
from webui.controls import SIZES, control_values, edit_params
from webui.work import Job, Jobs, Stopped, read_picture, run_edit, save_png, settings_inside, wait_for_engine
from webui.zero import ONE_AT_A_TIME, ZeroEngine
from webui_realtime import create_demo, parse_args

PATIENCE_S = 60  # no claim: only how long broken code may hang before the test fails


@pytest.fixture
def stub():
    return StubPipeline()


@pytest.fixture
def engine(stub):
    with RealtimeEngine(stub, EngineConfig(max_sessions=2)) as engine:
        yield engine
        stub.gate.set()


PARAMS = EditParams(prompt="negative", width=64, height=64, steps=4)


# Jobs


def in_thread(work) -> tuple[threading.Thread, list]:
    """Runs `work`; the list gets what it returned or raised."""
    got = []

    def run():
        try:
            got.append(work())
        except Exception as error:
            got.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, got


def test_each_step_is_told_and_the_picture_is_the_edited_one(engine, photo):
    steps = []
    result = run_edit(engine, [photo(64, 64)], PARAMS, Job(), lambda step, of: steps.append((step, of)))
    assert np.array_equal(result.image, 255 - photo(64, 64))
    assert set(steps) <= {(step, 4) for step in range(4)} and steps == sorted(steps)


def test_stop_ends_a_running_edit_within_a_step_and_frees_its_session(engine, stub, photo):
    stub.gate.clear()  # the model is held before its first step
    job, steps = Job(), []
    thread, got = in_thread(lambda: run_edit(engine, [photo(64, 64)], PARAMS, job, lambda *step: steps.append(step)))
    stub.await_start()
    job.stop()
    thread.join(PATIENCE_S)  # at once for the page: it does not wait for the model
    assert isinstance(got[0], Stopped) and engine.stats().sessions == 0
    stub.gate.set()
    after = run_edit(engine, [photo(64, 64)], PARAMS, Job(), lambda *step: None)  # the next edit works
    assert after.image is not None and engine.stats().frames == 1 and steps == []


def test_a_job_that_was_stopped_before_it_had_a_session_gets_none(engine, photo):
    job = Job()
    job.stop()
    with pytest.raises(Stopped):
        run_edit(engine, [photo(64, 64)], PARAMS, job, lambda *step: None)
    with pytest.raises(Stopped):
        wait_for_engine(EngineHolder(), job, lambda *_, **__: None)
    assert engine.stats().sessions == 0


def test_an_error_of_the_model_is_told_as_it_is_not_as_a_stop(engine, stub, photo):
    stub.denoise = lambda *args, **options: 1 / 0
    with pytest.raises(EditError, match="ZeroDivisionError"):
        run_edit(engine, [photo(64, 64)], PARAMS, Job(), lambda *step: None)


def test_stop_reaches_the_pages_own_tab_only_and_a_closed_page_all_of_its_tabs():
    jobs = Jobs()
    with jobs.start("ann", "upload") as one, jobs.start("ann", "video") as two, jobs.start("ben", "upload") as other:
        jobs.stop("ann", "upload")
        assert (one.stopped, two.stopped, other.stopped) == (True, False, False)
        jobs.stop("ann")
        assert (two.stopped, other.stopped) == (True, False)
        with jobs.start("ben", "upload") as newer:  # the older one's result would not be looked at any more
            assert other.stopped and not newer.stopped


def test_a_picture_too_large_to_be_one_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))  # only what lies there may be opened
    monkeypatch.setattr("webui.work.LIMITS", Limits(file_bytes=10))
    (tmp_path / "a.png").write_bytes(b"x" * 11)
    with pytest.raises(EditError, match="11 bytes"):
        read_picture(str(tmp_path / "a.png"))


# Settings inside pictures


def saved(params: EditParams, photo) -> str:
    return save_png(EditResult(1, photo(64, 64), None, params, {}, 0.0, 0, 0.0), "pocket")


@pytest.mark.parametrize(
    "params",
    [
        EditParams(prompt="a"),
        EditParams(prompt='über "x"\n<b>', negative_prompt="n", steps=8, width=320, height=208, seed=2**32 - 1,
                   cfg_scale=2.5, fit="pad", reuse="frames", motion_aware=True, blend_still=0.25),
    ],
    ids=["defaults", "everything"],
)  # fmt: skip
def test_what_a_picture_carries_is_read_back_as_it_was(params, photo):
    followed = {"width": params.width or 64, "height": params.height or 64}  # from the picture, where nothing was asked for
    assert settings_inside(Path(saved(params, photo)).read_bytes()) == params.replace(**followed)


def test_a_picture_from_the_browser_carries_the_same_names_and_is_read_back(tmp_path, photo):
    text = {"prompt": "p", "seed": "7", "steps": "3", "width": "256", "height": "null", "motion_aware": "true", "model": "x"}
    (tmp_path / "a.png").write_bytes(encode_png(photo(64, 64), text))
    assert settings_inside((tmp_path / "a.png").read_bytes()) == EditParams(prompt="p", seed=7, steps=3, width=256, motion_aware=True)


@pytest.mark.parametrize(
    "text",
    [{}, {"prompt": "p"}, {"prompt": "p", "seed": "x", "steps": "2"}, {"prompt": "p", "seed": "1", "steps": "99"},
     {"prompt": "", "seed": "1", "steps": "2"}],
)  # fmt: skip
def test_other_programs_pictures_offer_nothing(tmp_path, photo, text):
    (tmp_path / "a.png").write_bytes(encode_png(photo(64, 64), text))
    assert settings_inside((tmp_path / "a.png").read_bytes()) is None


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\x00" * 40])
def test_a_broken_file_offers_nothing(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    assert settings_inside((tmp_path / "a.png").read_bytes()) is None


@pytest.mark.parametrize("picture", [(256, 256), (320, 200), (100, 250)])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", ["keep", "crop", "pad"])
def test_settings_taken_over_give_the_edit_that_made_the_picture(picture, size, shape):
    made = edit_params("x", picture, 256, [3, size, shape, 5, True, 1.5, "no"])
    again = edit_params("x", picture, 999, control_values(made))
    assert again == made, (made, again)


# The collage


def test_picture_2_lies_where_it_is_put_in_its_own_shape_and_nowhere_else():
    below, above = np.full((100, 200, 3), 10, np.uint8), np.full((30, 60, 3), 200, np.uint8)
    flat = collage(below, above, across=0.25, down=0.5, scale=0.2, opacity=1.0)
    covered = np.argwhere(flat[:, :, 0] == 200)
    assert flat.shape == below.shape
    assert covered.min(0).tolist() == [40, 30] and covered.max(0).tolist() == [59, 69]  # 40 by 20, middle at (50, 50)
    assert (flat == 200).sum() + (flat == 10).sum() == flat.size


def test_opacity_mixes_and_what_lies_outside_is_cut_off():
    below, above = np.full((50, 50, 3), 0, np.uint8), np.full((50, 50, 3), 200, np.uint8)
    half = collage(below, above, across=0.0, down=0.0, scale=1.0, opacity=0.5)
    assert np.abs(half[:25, :25].astype(int) - 100).max() <= 1 and half[25:].max() == half[:, 25:].max() == 0
    assert np.array_equal(collage(below, above, across=0.5, down=0.5, scale=1.0, opacity=0.0), below)
    assert np.array_equal(collage(below, above, across=0.5, down=0.5, scale=2.0, opacity=1.0), above)


def test_a_part_that_hangs_over_the_edge_is_not_squeezed_into_the_picture(photo):
    above = photo(64, 64)
    flat = collage(np.zeros((64, 64, 3), np.uint8), above, across=0.0, down=0.5, scale=1.0, opacity=1.0)
    assert np.abs(flat[:, :32].astype(int) - above[:, 32:]).max() <= 1


def test_a_tall_picture_at_the_largest_scale_costs_no_more_than_what_is_seen(photo):
    tall = np.asarray(Image.fromarray(photo(16, 64)).resize((100, 20_000)))
    flat = collage(photo(2048, 2048), tall, across=0.5, down=0.5, scale=2.0, opacity=1.0)
    assert flat.shape == (2048, 2048, 3)


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"across": 1.5}, {"opacity": float("nan")}, {"down": -0.1}])
def test_a_place_outside_the_limits_is_an_edit_error_that_names_it(photo, wrong):
    good = {"across": 0.5, "down": 0.5, "scale": 1.0, "opacity": 1.0}
    with pytest.raises(EditError, match=next(iter(wrong))):
        collage(photo(64, 64), photo(64, 64), **good | wrong)


# A Space that lends a GPU for a call


@pytest.fixture
def zero(monkeypatch):
    """As on ZeroGPU; `calls` has what was decorated and called. The real package forks a process for each."""
    calls = []
    spaces = types.ModuleType("spaces")
    spaces.GPU = lambda duration: lambda function: lambda *args: calls.append(duration) or function(*args)
    monkeypatch.setitem(sys.modules, "spaces", spaces)
    return calls


def test_on_zerogpu_each_edit_is_a_call_of_its_own_and_no_thread_stays(zero, photo):
    engine = ZeroEngine(StubPipeline(), EngineConfig())
    threads = set(threading.enumerate())
    result = run_edit(engine, [photo(64, 64)], PARAMS, Job(), lambda *step: None)
    assert np.array_equal(result.image, 255 - photo(64, 64))
    assert len(zero) == 1 and not set(threading.enumerate()) - threads
    assert engine.stats().frames == 0  # in this process


def test_on_zerogpu_an_error_crosses_to_the_page_and_streams_are_refused_with_the_reason(zero, photo):
    stub = StubPipeline()
    stub.denoise = lambda *args, **options: 1 / 0
    engine = ZeroEngine(stub, EngineConfig())
    with pytest.raises(EditError, match="ZeroDivisionError"):
        run_edit(engine, [photo(64, 64)], PARAMS, Job(), lambda *step: None)
    with pytest.raises(EditError, match="one edit at a time"):
        engine.open_session()


def test_on_zerogpu_the_model_is_loaded_through_the_same_code_and_no_call_is_spent_on_it(zero, monkeypatch):
    monkeypatch.setattr("cached_pipeline.load_pipeline", lambda model, **settings: StubPipeline())
    holder = EngineHolder()
    load_engine(holder, parse_args(["--model", "pocket", "--device", "cpu"]), ZeroEngine)
    assert holder.status()["state"] == "ready" and isinstance(holder.engine, ZeroEngine) and zero == []


def test_on_zerogpu_post_edit_is_refused_with_the_reason(zero):
    holder = EngineHolder(ZeroEngine(StubPipeline(), EngineConfig()))
    holder.page_only = ONE_AT_A_TIME
    with serving(holder) as address:
        answer = httpx.post(f"http://{address}/edit", json={}, timeout=PATIENCE_S)
        assert (answer.status_code, answer.json()) == (503, {"error": ONE_AT_A_TIME, "kind": "page_only", "detail": ONE_AT_A_TIME})
        assert httpx.get(f"http://{address}/health", timeout=PATIENCE_S).json()["stats"]["frames"] == 0


def test_on_zerogpu_the_page_says_why_there_is_no_live_view_and_has_no_video_tab():
    demo = create_demo(EngineHolder(), streams=False)
    tabs = {block.label: block for block in demo.blocks.values() if isinstance(block, gr.Tab)}
    assert not tabs["Video"].visible and tabs["Upload"].visible
    said = [block.value for block in demo.blocks.values() if isinstance(block, gr.Markdown)]
    assert ONE_AT_A_TIME in said
    assert not any('class="live"' in str(getattr(block, "html_template", "")) for block in demo.blocks.values())


def test_a_name_of_a_file_never_leaves_its_folder(photo, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    path = Path(saved(EditParams(prompt="../../etc/passwd"), photo))
    assert tmp_path in path.parents and path.name == "etc-passwd-0.png"


def test_a_space_finds_in_the_front_matter_what_is_here():
    front = dict(line.split(": ", 1) for line in (ROOT / "README.md").read_text().split("---")[1].splitlines() if ": " in line)
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split() if "==" in line)
    assert front["sdk"] == "gradio" and front["sdk_version"] == pins["gradio"]
    assert (ROOT / front["app_file"]).is_file() and "license" in front
    assert len(front["short_description"]) <= 60  # longer ones are refused

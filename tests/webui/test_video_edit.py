"""Videos made here, with sound, edited and looked into: times, sound, pictures, and what must not be opened."""

import contextlib
import fractions
import itertools
import random
import struct
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from playwright.sync_api import expect
from support.page import PATIENCE_S, UNNAMED
from support.pictures import answer, assert_edited, held_out, psnr_db

from pipeline.images import EditError, fit
from qwen_realtime import EditParams, EditResult, EngineConfig, RealtimeEngine
from webui import video_edit
from webui.video import editor, steadiness
from webui.video_edit import Outcome, Progress, Stop, edit_video, probe, upright
from webui.work import Job, save_png

MILLISECOND = fractions.Fraction(1, 1000)


def make_video(path: Path, pictures: list[np.ndarray], *, steps_ms=(100,), sound: str | None = "aac") -> Path:
    """H.264 at these gaps between frames, in turn, and a tone of the same length."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=10, options={"crf": "8", "bf": "0"})
        video.height, video.width = pictures[0].shape[:2]
        video.pix_fmt, video.codec_context.time_base = "yuv420p", MILLISECOND
        audio = None if sound is None else out.add_stream(sound, rate=48000)
        at = 0
        for picture, step in zip(pictures, itertools.cycle(steps_ms)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = at, MILLISECOND
            at += step
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if audio is not None:
            tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(48 * at) / 48000)
            samples = av.AudioFrame.from_ndarray(tone.astype(np.float32)[None], format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 48000, 0
            out.mux(audio.encode(samples))
            out.mux(audio.encode(None))
    return path


def moving(count: int, width: int = 96, height: int = 64) -> list[np.ndarray]:
    """A photograph that drifts by a pixel a frame."""
    wide = held_out("coffee.png", width + count, height)
    return [np.ascontiguousarray(wide[:, shift : shift + width]) for shift in range(count)]


def frames(path: Path) -> list[tuple[float, np.ndarray]]:
    with av.open(str(path)) as container:
        return [(frame.time, upright(frame)) for frame in container.decode(video=0)]


def sound(path: Path) -> list[tuple[bytes, fractions.Fraction]]:
    """The packets of the sound, undecoded, with their times."""
    with av.open(str(path)) as container:
        return [(bytes(packet), packet.pts * packet.time_base) for packet in container.demux(audio=0) if packet.dts is not None]


def run(path: Path, folder: Path, edit=lambda picture: 255 - picture) -> tuple[list[Progress], Outcome]:
    folder.mkdir(exist_ok=True)
    *steps, outcome = edit_video(path, folder, edit)
    return steps, outcome


@pytest.mark.parametrize("steps_ms", [(100,), (40, 160, 90)], ids=["constant rate", "variable rate"])
@pytest.mark.parametrize("name, codec", [("in.mp4", "aac"), ("in.mkv", "libopus"), ("in.mov", "alac")])
def test_times_length_sound_and_pictures_come_out_as_they_went_in(tmp_path, steps_ms, name, codec):
    source = make_video(tmp_path / name, moving(20), steps_ms=steps_ms, sound=codec)
    steps, outcome = run(source, tmp_path / "out")
    before, after = frames(source), frames(outcome.path)
    assert outcome.path.suffix == ".mp4" and outcome.notes == () and outcome.frames == len(steps) == 20
    assert [packet for packet, _ in sound(source)] == [packet for packet, _ in sound(outcome.path)]
    # A tick of the target's sound clock, 1/48000 s, and of a source's whole milliseconds.
    assert max(abs(a - b) for (_, a), (_, b) in zip(sound(source), sound(outcome.path), strict=True)) <= MILLISECOND
    assert np.abs(np.array([at for at, _ in before]) - [at for at, _ in after]).max() <= 0.001
    with av.open(str(source)) as one, av.open(str(outcome.path)) as two:
        assert abs(one.duration - two.duration) / av.time_base <= 0.1, "the two differ by more than a frame"
    # Half of the colour's resolution is lost in H.264 as it is written here, once on each way.
    assert max(np.abs(255 - a[1].astype(int) - b[1]).mean() for a, b in zip(before, after, strict=True)) < 5
    assert [round(step.share, 1) for step in (steps[0], steps[-1])] == [pytest.approx(0.05, abs=0.06), 1.0]


def test_colours_are_those_of_the_pictures_and_the_file_says_how_they_are_coded(tmp_path):
    red = np.full((64, 64, 3), (255, 0, 0), np.uint8)
    _, outcome = run(make_video(tmp_path / "in.mp4", moving(2)), tmp_path / "out", lambda picture: red)
    with av.open(str(outcome.path)) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (1, 1)  # BT.709, limited
        luma = np.frombuffer(bytes(frame.planes[0]), np.uint8)[0]
        assert abs(int(luma) - (16 + 219 * 0.2126)) <= 1, luma  # by BT.601 it would be 81
    assert np.abs(frames(outcome.path)[0][1].astype(int) - red).max() <= 3


def test_a_turned_video_is_edited_and_written_upright(tmp_path):
    source = make_video(tmp_path / "in.mp4", moving(3))
    data = bytearray(source.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    quarter = (0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30)  # clockwise, as a telephone held upright writes it
    data[matrix : matrix + 36] = struct.pack(">9i", *quarter)
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(data)
    info = probe(turned)
    assert (info.width, info.height) == (64, 96)
    seen = []
    _, outcome = run(turned, tmp_path / "out", lambda picture: seen.append(picture) or picture)
    assert np.array_equal(seen[0], np.rot90(frames(source)[0][1], -1))
    assert frames(outcome.path)[0][1].shape == (96, 64, 3)
    with av.open(str(outcome.path)) as container:
        assert next(container.decode(video=0)).rotation == 0


@pytest.mark.parametrize("width, height, said", [(75, 53, "column and the last row"), (75, 54, "column"), (74, 53, "row")])
def test_odd_sides_are_made_even_by_the_edge_and_the_notes_say_so(tmp_path, width, height, said):
    source = make_video(tmp_path / "in.mp4", moving(2))
    shown, outcome = run(source, tmp_path / "out", lambda picture: fit(picture, width, height))
    written = frames(outcome.path)[0][1]
    assert written.shape == (height + height % 2, width + width % 2, 3)
    assert np.abs(written[:height, :width].astype(int) - shown[0].picture).mean() < 6, "nothing moved"
    assert outcome.notes == (f"The last {said} is there twice in the file: H.264 wants even sides.",)


def test_wide_pixels_are_made_square(tmp_path):
    with av.open(str(tmp_path / "in.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = fractions.Fraction(3, 2)
        out.mux(stream.encode(av.VideoFrame.from_ndarray(fit(moving(1)[0], 64, 64), format="rgb24")))
        out.mux(stream.encode(None))
    info = probe(tmp_path / "in.mp4")
    assert (info.width, info.height) == (96, 64)


def test_sound_that_mp4_does_not_carry_goes_into_matroska_and_a_silent_video_stays_silent(tmp_path):
    source = make_video(tmp_path / "in.mkv", moving(3), sound="pcm_s16le")
    _, outcome = run(source, tmp_path / "out")
    assert outcome.path.suffix == ".mkv" and "pcm_s16le" in outcome.notes[0]
    assert b"".join(packet for packet, _ in sound(source)) == b"".join(packet for packet, _ in sound(outcome.path))
    _, outcome = run(make_video(tmp_path / "silent.mp4", moving(3), sound=None), tmp_path / "out")
    with av.open(str(outcome.path)) as container:
        assert not container.streams.audio and outcome.frames == 3


def test_stop_keeps_what_is_done(tmp_path):
    source, count = make_video(tmp_path / "in.mp4", moving(10)), itertools.count()

    def edit(picture):
        if next(count) == 4:
            raise Stop
        return picture

    steps, outcome = run(source, tmp_path / "out", edit)
    assert len(steps) == outcome.frames == len(frames(outcome.path)) == 4
    assert outcome.notes == ("Stopped after 4 frames.",)


def test_an_error_of_the_model_ends_the_video_and_is_told(tmp_path):
    source, count = make_video(tmp_path / "in.mp4", moving(6)), itertools.count()

    def edit(picture):
        if next(count) == fail_at:
            raise EditError("Out of memory at 64x64.")
        return picture

    fail_at = 2
    _, outcome = run(source, tmp_path / "out", edit)
    assert outcome.frames == 2 and "Out of memory" in outcome.notes[0]
    fail_at, count = 0, itertools.count()
    with pytest.raises(EditError, match="Out of memory"):
        run(source, tmp_path / "out", edit)


def test_a_video_that_breaks_off_is_edited_as_far_as_it_goes(tmp_path):
    whole = make_video(tmp_path / "in.ts", moving(30)).read_bytes()
    broken = tmp_path / "broken.ts"
    broken.write_bytes(whole[: len(whole) // 2])
    steps, outcome = run(broken, tmp_path / "out")
    assert 0 < len(steps) < 30 and len(frames(outcome.path)) == outcome.frames == len(steps)


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("a.mp4", b"", "0 bytes"),
        ("a.mp4", b"no video at all" * 100, "not a video"),
        # Lists of other files: FFmpeg would open what they name.
        ("a.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://%s\n#EXT-X-ENDLIST\n", "not a video"),
        ("a.mp4", b"ffconcat version 1.0\nfile '%s'\n", "not a video"),
        ("a.avi", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n", "not a video"),
        ("a.mpd", b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>", "not a video"),
    ],
    ids=["empty", "text", "playlist", "concat", "addresses", "dash"],
)  # fmt: skip
def test_what_is_no_video_is_refused_and_opens_nothing_else(tmp_path, name, data, says):
    target = make_video(tmp_path / "target.ts", moving(3))
    (tmp_path / name).write_bytes(data.replace(b"%s", str(target).encode()))
    with pytest.raises(EditError, match=says):
        probe(tmp_path / name)


@pytest.mark.parametrize(
    "limit, value, says", [("MAX_BYTES", 100, "Allowed: 1 to 100"), ("MAX_SECONDS", 0.5, "Allowed: 0 s"),
                           ("MAX_FRAMES", 5, "Allowed: 5"), ("MAX_PIXELS", 96 * 64 - 1, "96x64")],
)  # fmt: skip
def test_limits_are_said_before_any_frame_is_edited(tmp_path, monkeypatch, limit, value, says):
    source = make_video(tmp_path / "in.mp4", moving(10))
    monkeypatch.setattr(video_edit, limit, value)
    with pytest.raises(EditError, match=says):
        run(source, tmp_path / "out", lambda picture: pytest.fail("a frame was edited"))


def test_a_video_longer_than_it_says_ends_at_the_limit(tmp_path, monkeypatch):
    source = make_video(tmp_path / "in.ts", moving(10), sound=None)
    monkeypatch.setattr(video_edit, "MAX_FRAMES", 6)
    monkeypatch.setattr(video_edit, "_length", lambda container, stream: (None, None))  # a file may claim what it likes
    steps, outcome = run(source, tmp_path / "out")
    assert len(steps) == outcome.frames == 6 and "ends here" in outcome.notes[0]


def test_a_file_with_sound_alone_is_refused(tmp_path):
    with av.open(str(tmp_path / "tone.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=48000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 48000
        out.mux(stream.encode(samples))
        out.mux(stream.encode(None))
    with pytest.raises(EditError, match="no video in it"):
        probe(tmp_path / "tone.mp4")


def test_every_frame_is_the_right_edit_and_a_stopped_session_ends_the_video(tmp_path, pocket):
    """Through one session of the real engine with still parts held, as the page does it."""
    source = make_video(tmp_path / "in.mp4", moving(4, 128, 128))
    params = EditParams(prompt="make it black and white", width=128, height=128, **steadiness())
    job = Job()
    with RealtimeEngine(pocket, EngineConfig()) as engine, job.session(engine) as session:
        _, outcome = run(source, tmp_path / "out", editor(session, params, job))
        for (_, before), (_, after) in zip(frames(source), frames(outcome.path), strict=True):
            assert_edited(after, "black and white", before, at_least_db=17.0)  # H.264 costs a little more
        stopped = edit_video(source, tmp_path / "out", editor(session, params, job), "stopped")
        assert next(stopped).number == 1
        job.stop()
        outcome = next(stopped)
        assert isinstance(outcome, Outcome) and outcome.frames == 1 and "Stopped" in outcome.notes[0]


def test_a_still_scene_flickers_half_as_much_as_without_and_a_moving_one_loses_nothing(tmp_path, pocket):
    draw = np.random.default_rng(0)
    scene = held_out("coffee.png", 128, 128)
    still = [np.clip(scene + draw.normal(0, 6, scene.shape), 0, 255).astype(np.uint8) for _ in range(6)]
    sources = {"still": make_video(tmp_path / "still.mp4", still), "moving": make_video(tmp_path / "moving.mp4", moving(4, 128, 128))}
    flicker, right = {}, {}
    with RealtimeEngine(pocket, EngineConfig()) as engine:
        for name, own in {"plain": {}, "steady": steadiness()}.items():
            params = EditParams(prompt="make it black and white", width=128, height=128, **own)
            for scene_name, source in sources.items():
                with Job().session(engine) as session:
                    steps, _ = run(source, tmp_path / "out", editor(session, params, Job()))
                pictures = [step.picture.astype(float) for step in steps]
                if scene_name == "still":
                    flicker[name] = np.mean([np.abs(b - a).mean() for a, b in itertools.pairwise(pictures)])
                else:
                    answers = [answer("black and white", picture) for _, picture in frames(source)]
                    right[name] = np.mean([psnr_db(a, b) for a, b in zip(pictures, answers, strict=True)])
    assert flicker["steady"] <= 0.5 * flicker["plain"], flicker
    assert right["steady"] >= right["plain"] - 1.0, right


def test_the_page_edits_a_video_stops_when_told_and_gives_it_with_its_sound(ready, open_page, tmp_path):
    source = make_video(tmp_path / "in.mp4", moving(4, 128, 128))
    page = open_page(ready.url)
    page.get_by_role("tab", name="Video").click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.get_by_role("button", name="Edit", exact=True).click()
    expect(page.get_by_text("Choose a video first").first).to_be_visible()
    page.get_by_label("Size", exact=True).click()
    page.get_by_role("option", name="128 × 128").click()
    panel.locator("input[type=file]").first.set_input_files(source)
    expect(panel.locator(".area-source video")).to_be_visible()
    panel.get_by_role("button", name="Negative", exact=True).click()
    panel.get_by_role("button", name="Edit", exact=True).click()
    text = panel.locator(".prose.video-progress")
    expect(text).to_contain_text("4 frames in")
    expect(panel.locator(".area-result video")).to_be_visible()
    assert page.evaluate(UNNAMED) == []
    with page.expect_download() as download:
        panel.get_by_role("button", name="Download the video").click()
    edited = tmp_path / download.value.suggested_filename
    download.value.save_as(edited)
    assert edited.name.startswith("invert-the-colors-") and edited.suffix == ".mp4"
    assert [packet for packet, _ in sound(source)] == [packet for packet, _ in sound(edited)]
    for (_, before), (_, after) in zip(frames(source), frames(edited), strict=True):
        assert_edited(after, "negative", before, at_least_db=15.0)

    # Stop: the session is closed at once, and what is done can be had.
    long = make_video(tmp_path / "long.mp4", moving(64, 128, 128))
    panel.get_by_label("Clear").first.click()
    panel.locator("input[type=file]").first.set_input_files(long)
    expect(panel.locator(".area-source video")).to_be_visible()
    served = ready.health()["stats"]["frames"]
    panel.get_by_role("button", name="Edit", exact=True).click()
    ready.until(lambda health: health["stats"]["frames"] >= served + 2, "two frames are edited")
    panel.get_by_role("button", name="Stop", exact=True).click()
    ready.until(lambda health: health["stats"]["sessions"] == 0, "the session is closed")
    expect(text).to_contain_text("Stopped after", timeout=PATIENCE_S * 1000)


def damaged(folder: Path, count: int, seed: int):
    """Copies of small videos in four containers, with 1 to 256 of their bits turned."""
    rng = random.Random(seed)
    sources = [make_video(folder / name, moving(8), sound=codec) for name, codec in
               (("a.mp4", "aac"), ("b.mkv", "libopus"), ("c.mov", "alac"), ("d.avi", "mp3"))]  # fmt: skip
    for number in range(count):
        source = sources[number % 4]
        data = bytearray(source.read_bytes())
        for _ in range(rng.choice((1, 4, 16, 64, 256))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path = folder / f"damaged{source.suffix}"
        path.write_bytes(data)
        yield path


def test_of_120_damaged_videos_each_is_edited_or_refused_in_a_sentence_and_no_half_file_is_left(tmp_path):
    edited = refused = 0
    for path in damaged(tmp_path, 120, seed=5):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        try:
            probe(path)
            *_, outcome = edit_video(path, out, lambda picture: 255 - picture)
            assert frames(outcome.path) and all(10 < len(note) < 300 for note in outcome.notes)
            outcome.path.unlink()
            edited += 1
        except EditError as error:
            assert 20 < len(str(error)) < 300, error
            refused += 1
        assert list(out.iterdir()) == []
    assert edited > 60 and refused > 10, (edited, refused)


def rewritten(data: bytes, box: bytes, at: int, fmt: str, *values) -> bytes:
    """An MP4 in whose first box of this name these values stand, `at` bytes after the name."""
    changed = bytearray(data)
    struct.pack_into(fmt, changed, data.find(box) + 4 + at, *values)
    return bytes(changed)


@pytest.mark.parametrize(
    "box, at, fmt, values",
    [
        (b"mvhd", 12, ">II", (1, 2**32 - 1)),  # 136 years
        (b"mdhd", 12, ">I", (1,)),  # a time unit of a second
        (b"mdhd", 12, ">I", (2**31 - 1,)),
        (b"stts", 4, ">III", (1, 8, 0)),  # no time between frames
        (b"stts", 4, ">III", (1, 8, 2**31 - 1)),
        (b"stts", 4, ">III", (1, 2**31 - 1, 1)),
        (b"avc1", 24, ">HH", (16384, 16384)),
        (b"avc1", 24, ">HH", (0, 0)),
        (b"avc1", -4, ">4s", (b"zzzz",)),  # an unknown codec
        (b"stsz", 4, ">II", (0, 2**31 - 1)),
        (b"hdlr", 8, ">4s", (b"soun",)),
        (b"elst", 8, ">ii", (2**31 - 1, -(2**31) + 1)),
    ],
)
def test_absurd_lengths_rates_sizes_and_codecs_end_in_a_sentence_or_a_whole_video(tmp_path, box, at, fmt, values):
    source = make_video(tmp_path / "in.mp4", moving(8))
    data = source.read_bytes()
    assert data.find(box) > 0
    source.write_bytes(rewritten(data, box, at, fmt, *values))
    (tmp_path / "out").mkdir()
    try:
        probe(source)
        *_, outcome = edit_video(source, tmp_path / "out", lambda picture: picture)
        assert 1 <= len(frames(outcome.path)) <= 8
    except EditError as error:
        assert 20 < len(str(error)) < 300, error
        assert not list((tmp_path / "out").iterdir())


def test_a_frame_that_grows_beyond_what_is_allowed_is_not_decoded(tmp_path, monkeypatch):
    small = make_video(tmp_path / "a.ts", moving(80), sound=None)  # longer than what FFmpeg looks at in advance
    large = make_video(tmp_path / "b.ts", moving(4, 960, 640), sound=None)
    (tmp_path / "in.ts").write_bytes(small.read_bytes() + large.read_bytes())
    monkeypatch.setattr(video_edit, "MAX_PIXELS", 96 * 64)
    seen = []
    _, outcome = run(tmp_path / "in.ts", tmp_path / "out", lambda picture: seen.append(picture.shape) or picture)
    assert set(seen) == {(64, 96, 3)} and len(seen) <= 80 and outcome.frames == len(seen)


def test_a_video_without_frames_is_given_up_after_a_while_or_when_told(tmp_path, monkeypatch):
    source = make_video(tmp_path / "in.mp4", moving(8))
    with pytest.raises(EditError, match="Stopped after 0 frames"):
        list(edit_video(source, tmp_path, lambda picture: picture, stopped=lambda: True))
    monkeypatch.setattr(video_edit, "MAX_READ_SECONDS", -1.0)
    with pytest.raises(EditError, match="no frame comes"):
        list(edit_video(source, tmp_path, lambda picture: picture))


@pytest.fixture(params=["a full disk", "a limit on files"])
def full(request, tmp_path):
    """(folder, what to enter) in which no file of more than about 40 kB can be written."""
    folder = tmp_path / "full"
    folder.mkdir()
    if request.param == "a limit on files":
        resource = pytest.importorskip("resource")

        @contextlib.contextmanager
        def limited():
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        yield folder, limited
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder, contextlib.nullcontext
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("count", [3, 40])
def test_a_video_for_which_the_disk_has_no_room_is_refused_in_a_sentence_and_leaves_nothing(full, tmp_path, count):
    folder, limited = full
    source = make_video(tmp_path / "in.mp4", moving(count, 320, 320))
    noise = np.random.default_rng(0)
    with limited(), pytest.raises(EditError, match=r"disk is full|may write"):
        list(edit_video(source, folder, lambda picture: noise.integers(0, 255, picture.shape, np.uint8)))
    assert list(folder.iterdir()) == []


def test_a_picture_for_which_the_disk_has_no_room_is_refused_in_a_sentence_and_leaves_nothing(full, monkeypatch):
    folder, limited = full
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    result = EditResult(1, noise, None, EditParams(prompt="noise"), {"total": 1.0}, 1.0, 0, 1.0)
    with limited(), pytest.raises(EditError, match=r"disk is full|may write"):
        save_png(result, "pocket")
    assert list(folder.iterdir()) == []

"""What measures the techniques: the videos are what they say, figures are right on known cases, every technique gets
its row, and the soak sees what it must see."""

import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import catalogue, techniques, videos
from benchmarks.catalogue import TECHNIQUES, Technique
from benchmarks.serving import soak
from benchmarks.tables import quantized_tables, tables, technique_tables, write_tables
from benchmarks.techniques import differences, main, psnr_db, right_answer
from cached_pipeline import load_pipeline
from engine.policies import changed_tokens
from pipeline import placement
from pipeline.images import EditError
from qwen_realtime import EditParams, EditResult, EngineConfig, RealtimeEngine

ROW_KEYS = set(
    "technique video against settings edits subject weights width height steps cfg references reference_area batch "
    "quantize attention_quantize text_encoder_quantize vlm changed_in_video changed_tokens skip_rate frames fps median_ms p95_ms "
    "camera_frames first_ms longest_ms prepared psnr_db loss_db psnr_to_plain_db flicker flicker_ratio jump "
    "peak_memory_gb stages_ms tflops notes wall_s".split()
)

# Videos ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", videos.SCENES)
def test_a_video_is_the_same_for_the_same_seed_only(name):
    first, again, other = (list(videos.video(name, 64, 48, 6, seed)) for seed in (1, 1, 2))
    assert all(frame.shape == (48, 64, 3) and frame.dtype == np.uint8 for frame in first) and len(first) == 6
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def shares(name: str, size: int, frames: int = 12) -> list[float]:
    return [videos.changed_share(*pair) for pair in itertools.pairwise(videos.scene(name, size, size, frames))]


@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize("share", videos.SHARES)
def test_a_video_changes_the_stated_share_of_its_tokens(share, size):
    found = shares(f"{share:.0%} changed", size)
    assert np.mean(found) == pytest.approx(share, abs=0.02), found
    assert max(found) - min(found) < 0.08, "in every frame, not only on average"


def test_scenes_move_as_much_as_they_say():
    assert set(shares("still", 128)) == {0.0}
    assert min(shares("pan", 256) + shares("zoom", 256)) > 0.95
    talking = shares("talking", 256)
    assert min(talking) > 0.01 and max(talking) < 0.08, talking
    cut = shares("cut", 128, 10)
    assert cut[4] == 1.0 and sum(cut) == 1.0, cut
    moving = shares("moving", 256, 24)
    assert min(moving[:15]) > 0.95 and max(moving[16:]) < 0.3, moving


def test_the_changed_share_is_that_of_the_tokens_in_which_something_moved():
    before = np.zeros((64, 64, 3), np.uint8)
    after = before.copy()
    after[:16, :16] = 1
    after[40, 40] = 100  # one pixel of 256: 0.39 levels on its token's mean, as little as what noise leaves
    assert videos.changed_share(before, after) == 1 / 16
    after[40, 41] = 100
    assert videos.changed_share(before, after) == 2 / 16


def test_the_camera_adds_noise_that_no_default_takes_for_motion():
    frames = list(videos.video("still", 256, 256, 6))
    noise = np.std([frame.astype(float) for frame in frames], axis=0).mean()
    assert 1.0 < noise < 4.0, f"{noise:.2f} levels: no webcam in a room"
    threshold = EditParams(prompt="-").reuse_threshold
    assert not any(changed_tokens(b, a, threshold).any() for a, b in itertools.pairwise(frames))


def test_an_unknown_video_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'storm'.*still, moving"):
        videos.scene("storm", 64, 64, 1)


# Figures --------------------------------------------------------------------------------------------------------------


def test_psnr_and_flicker_are_right_on_known_pictures():
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert psnr_db(black, white) == pytest.approx(0.0) and psnr_db(white, black) == pytest.approx(0.0)
    assert psnr_db(black, black + 1) == pytest.approx(48.13, abs=0.01)
    assert psnr_db(white, white) == techniques.SAME_DB
    assert differences([black, black, black + 3, white]) == [0.0, 3.0, 252.0]


def test_the_right_answer_is_that_of_the_frame_as_it_came():
    frame = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(right_answer("upside down", frame), frame[::-1])
    smaller = techniques.at_size_of(np.full((2, 2, 3), 7, np.uint8), frame)
    assert smaller.shape == frame.shape and (smaller == 7).all()


# The program ----------------------------------------------------------------------------------------------------------


def run_small(tmp_path, *arguments: str) -> tuple[int, dict]:
    out = tmp_path / "techniques.json"
    common = f"--device cpu --size 64 --steps 1 --frames {techniques.WARMUP + 3} --edits sepia --live-seconds 0.1 --videos still"
    status = main([*common.split(), "--out", str(out), *arguments])
    return status, json.loads(out.read_text())


@pytest.fixture
def loaded(pocket, monkeypatch):
    """The program runs on the suite's pocket model."""
    monkeypatch.setattr(techniques, "load_pipeline", lambda *args, **options: pocket)
    monkeypatch.setattr(techniques, "WARMUP", 1)  # on a CPU nothing is recorded
    yield pocket
    pocket.disable_fast_path()


def test_every_technique_gets_its_row(tmp_path, capsys, loaded):
    status, result = run_small(tmp_path, "--commit", "abc1234")
    assert status == 0 and result["left_out"] == {}
    assert result["kind"] == "techniques" and result["commit"] == "abc1234" and result["device"]
    rows = {row["technique"]: row for row in result["rows"]}
    assert set(rows) == {technique.name for technique in TECHNIQUES} and len(rows) == len(result["rows"])
    for row in rows.values():
        assert row.keys() == ROW_KEYS, row.keys() ^ ROW_KEYS
        assert row["fps"] > 0 and row["p95_ms"] >= row["median_ms"] > 0
        assert row["frames"] == 3 and row["camera_frames"] > 1 and row["prepared"] == 0
        assert row["first_ms"] > 0 and row["longest_ms"] > 0 and row["quantize"] == "none"
    assert [rows["plain"][key] for key in ("loss_db", "flicker_ratio", "skip_rate")] == [0.0, 1.0, 0.0]
    assert rows["similarity filter: frame"]["skip_rate"] > 0.2
    assert rows["guidance 4: one pass of two"]["psnr_to_plain_db"] > 45, "the same arithmetic in another order"
    assert rows["no pipelining"]["psnr_to_plain_db"] > 60
    assert rows["reuse: over frames"]["changed_tokens"] < 0.5, "a still scene"
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["rows"] == len(TECHNIQUES)


def test_a_technique_that_fails_costs_its_own_row_and_those_compared_with_it(tmp_path, monkeypatch, loaded):
    bad = Technique("bad", {"steps": 99})
    monkeypatch.setattr(catalogue, "TECHNIQUES", (Technique("plain"), bad, Technique("after bad", against="bad")))
    status, result = run_small(tmp_path)
    assert status == 1 and [row["technique"] for row in result["rows"]] == ["plain"]
    assert result["left_out"]["bad: still"].startswith("failed: EditError: steps is 99")
    assert result["left_out"]["after bad: still"] == "what it is compared with, bad, was not measured"


@pytest.mark.parametrize("weights", ["pocket", "random"])
def test_quantised_layers_are_measured_and_named(tmp_path, monkeypatch, weights):
    made = []

    def small(*args, **options):
        made.append(load_pipeline("pocket", **options))
        return made[0]

    monkeypatch.setattr(techniques, "load_pipeline", lambda model, **options: small(**options))
    monkeypatch.setattr(techniques, "random_pipeline", small)
    status, result = run_small(tmp_path, "--weights", weights, "--only", "VLM once a", "--quantize", "int8")
    assert status == 0 and [row["quantize"] for row in result["rows"]] == ["int8", "int8"]
    assert len(made) == 1 and placement.quantization(made[0].transformer) == "int8"
    assert (result["rows"][0]["psnr_db"] is None) == (weights == "random"), "only the pocket model's answers are known"


def test_a_video_in_which_something_is_prepared_is_streamed_again_and_what_it_costs_is_told(pocket, monkeypatch):
    """On a CPU nothing is recorded: here a counter pretends it, in frames of the first pass, of the first two, of all."""
    monkeypatch.setattr(techniques, "WARMUP", 1)
    frames, seen = list(videos.video("still", 64, 64, 5)), []

    def pretended(pipeline) -> int:
        seen.append(1)
        return sum(len(seen) >= n for n in rises)

    monkeypatch.setattr(techniques, "prepared", pretended)
    params = [EditParams(prompt="make it sepia", steps=1, width=64, height=64)] * len(frames)
    with RealtimeEngine(pocket, EngineConfig(fast_path=False)) as engine:
        for rises, passes, left in (((1,), 1, 0), ((3,), 2, 0), ((3, 8), 3, 0), ((3, 8, 13, 18), 4, 1)):
            seen.clear()
            with engine.open_session() as session:
                run = techniques.stream_until_steady(session, pocket, frames, params)
            assert len(seen) == passes * len(frames), rises
            assert run.prepared == left and len(run.counted) == 4
            assert run.longest_ms >= run.span_s / 4 * 1000 and run.first_ms > 0
            assert not any(np.array_equal(s.result.image, run.shots[0].result.image) for s in run.shots[1:]), "all new"


def test_time_that_is_over_leaves_a_valid_file(tmp_path, loaded):
    status, result = run_small(tmp_path, "--seconds", "0")
    assert status == 0 and result["rows"] == [] and set(result["left_out"].values()) == {"the time given was over"}


def test_asked_for_alone_a_technique_brings_what_it_is_compared_with():
    found = {technique.name: names for technique, names in catalogue.chosen(["self-negative"], ["still"], [])}
    assert found == {"plain": ("still",), catalogue.GUIDED: ("still",), "guidance 4: self-negative": ("still",)}
    assert next(technique.name for technique, _ in catalogue.chosen([], [], [])) == "plain"
    more = {technique.name: names for technique, names in catalogue.chosen(["pace"], [], ["30% changed"])}
    assert more["pace: 1.5 times plain's rate"] == ("still", "moving", "30% changed")
    assert more["plain"] == ("still", "moving", "30% changed")


def test_impossible_arguments_are_refused(capsys):
    refused_ones = ("--only magic", "--frames 5", "--edits corner", "--videos storm", "--quantize int3")
    for arguments in map(str.split, refused_ones):
        with pytest.raises(SystemExit) as refused:
            main(arguments)
        assert refused.value.code == 2 and arguments[0] in capsys.readouterr().err


# The tables -----------------------------------------------------------------------------------------------------------


def known_files(folder) -> None:
    versions = {"torch": "2", "diffusers": "0.42", "commit": "abc"}
    head = {"kind": "techniques", **versions, "left_out": {"pace: still": "failed: X"}}
    common = {"weights": "pocket", "width": 256, "height": 256, "steps": 2, "edits": ["sepia"], "quantize": "none"}
    common |= {"skip_rate": 0.0, "changed_tokens": 1.0}

    def row(technique, video, fps, loss, **more):
        figures = {"fps": fps, "median_ms": 300.0, "p95_ms": 341.2, "loss_db": loss, "flicker_ratio": 0.5}
        return {**common, "technique": technique, "video": video, **figures, **more}

    gpu = {"weights": "random", "width": 512, "height": 512}
    files = {
        "a": ("CPU X", [row("plain", "still", 3.04, 0.0), row("plain", "moving", 2.96, 0.0),
                        row("reuse", "still", 9.0, 0.0, changed_tokens=0.06), row("reuse", "10% changed", 6.1, 0.456)]),
        "b": ("GPU Y", [row("plain", "still", 24.0, None, **gpu),
                        row("reuse", "100% changed", 21.0, None, **gpu),
                        row("reuse", "30% changed", 22.0, None, **gpu)]),
        "b2": ("GPU Y", [row("plain", "30% changed", 36.0, None, quantize="fp8", **gpu)]),
    }  # fmt: skip
    for name, (device, rows) in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"device": device, "rows": rows, **head}))
    memory = {"after_warm_up": 700.0, "end": 701.4, "most": 710.0}
    run = {"frames": 10001, "sessions": 321, "seconds": 200.4, "resident_mb": memory, "complaints": []}
    (folder / "c.json").write_text(json.dumps({"kind": "soak", "device": "CPU X", **versions, **run}))
    (folder / "d.json").write_text(json.dumps({"rows": [{"case": "of another program"}]}))
    (folder / "e.json").write_text(json.dumps({"layers": []}))


def test_the_table_of_known_files_has_a_row_for_each_technique_and_the_machines_beside_each_other(tmp_path):
    known_files(tmp_path)
    lines = technique_tables(tmp_path).splitlines()
    machine = "(1) **CPU X**, torch 2, diffusers 0.42, commit abc (`a.json`)"
    quantised = "weights pocket, layers none, attention none, 256x256"
    assert lines[0] == f"{machine}: {quantised}, steps 2, edits sepia; still, moving, 10% changed.  "
    assert lines[1].startswith("(2) **GPU Y**")
    assert lines[2].startswith("(3) **GPU Y**") and "weights random, layers fp8, attention none, 512x512" in lines[2]
    speeds = " | ".join(f"({n}) frames/s | ({n}) p50 ms | ({n}) p95 ms" for n in (1, 2, 3))
    assert lines[4] == f"| technique | loss, dB | flicker | skipped | computed | {speeds} |"
    assert lines[6:8] == [
        "| plain | 0.0 / 0.0 | 0.50x / 0.50x | 0% / 0% | 100% / 100% "
        "| 3.0 / 3.0 | 300 / 300 | 341 / 341 | 24.0 | 300 | 341 | - / - / 36.0 | - / - / 300 | - / - / 341 |",
        "| reuse | 0.0 | 0.50x | 0% | 6% | 9.0 | 300 | 341 | - / 22.0 | - / 300 | - / 341 | - | - | - |",
    ]
    speeds = " | ".join(f"({n}) computed | ({n}) frames/s | ({n}) p50 ms | ({n}) p95 ms" for n in (1, 2))
    assert lines[9] == f"| technique | changed | loss, dB | flicker | {speeds} |"
    assert lines[11:14] == [
        "| reuse | 10% | 0.5 | 0.50x | 100% | 6.1 | 300 | 341 | - | - | - | - |",
        "| reuse | 30% | - | 0.50x | - | - | - | - | 100% | 22.0 | 300 | 341 |",
        "| reuse | 100% | - | 0.50x | - | - | - | - | 100% | 21.0 | 300 | 341 |",
    ]
    assert "Not measured: " + "; ".join(f"({n}) pace: still (failed: X)" for n in (1, 2, 3)) + "." in lines
    assert lines[-1] == (
        "Soak: 10,001 frames of 321 sessions in 200 s on **CPU X**, torch 2, diffusers 0.42, commit abc (`c.json`): "
        "resident memory 700 MB after warm-up, 701 MB at the end; no newest frame lost, nothing crossed."
    )


SECTIONS = {"benchmarks": tables, "quantized": quantized_tables, "techniques": technique_tables}


def test_both_sections_are_written_and_a_readme_without_a_place_for_results_is_an_error(tmp_path):
    known_files(tmp_path)
    readme = tmp_path / "README.md"
    first, second = (f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\n" for name in ("benchmarks", "techniques"))
    readme.write_text(f"a\n{first}b\n{second}c\n")
    write_tables({readme: SECTIONS}, tmp_path)
    text = readme.read_text()
    assert text.startswith("a\n<!-- benchmarks: begin -->\n\n<!-- benchmarks: end -->\nb\n")
    assert "b\n<!-- techniques: begin -->\n(1) **CPU X**" in text
    assert text.endswith("nothing crossed.\n<!-- techniques: end -->\nc\n") and "old" not in text
    readme.write_text(first)
    with pytest.raises(ValueError, match="no place for results"):
        write_tables({readme: SECTIONS}, tmp_path)


# The soak -------------------------------------------------------------------------------------------------------------


def test_a_picture_tells_whose_it_is_through_noise_jpeg_and_inversion():
    for client, number, size in ((0, 0, 64), (65535, 1, 64), (4711, 65535, 128)):
        picture = soak.draw(client, number, size)
        assert soak.read(picture.mean(axis=2)) == (client, number, False)
        assert soak.read(255 - picture.mean(axis=2)) == (client, number, True)
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=50)
        assert soak.read(np.asarray(Image.open(file)).mean(axis=2)) == (client, number, False)
        half = np.concatenate([picture[: size // 2], soak.draw(client ^ 1, number, size)[size // 2 :]])
        assert soak.read(half.mean(axis=2)) is None, "a picture of two sessions is nobody's"
    assert soak.read(np.full((64, 64), 128.0)) is None


def test_a_short_soak_loses_and_crosses_nothing(pocket):
    report = soak.run(150, 100, pipeline=pocket, pocket_share=0.1)
    complaints = [text for text in report["complaints"] if "memory" not in text]  # 150 frames are all warm-up
    assert complaints == []
    assert report["frames"] >= 150 and report["pocket_frames"] >= 15 and report["checked"] > 50
    assert report["sessions"] >= 8 and report["dropped"] > 0 and report["asked_errors"] > 0
    assert report["resident_mb"]["most"] >= report["resident_mb"]["end"] > 0


class FixedSession:
    """Answers each frame with what the test says."""

    def __init__(self, answer):
        self.answer, self.sent = answer, 0

    def submit(self, images, params, on_step=None):
        if images[0].ndim != 3:
            raise EditError("no picture")
        self.sent += 1
        self.last = images[0], params
        return self.sent

    def latest(self):
        return None

    def cancel(self):
        pass

    def result(self, number, timeout):
        image, error = self.answer(*self.last)
        if error is not None:
            raise error
        return EditResult(number, image, None, self.last[1], {}, 1.0, 0, 1.0)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda image, params: (None, EditError("dropped")), "a newest frame was lost"),
        (lambda image, params: (None, TimeoutError()), "a newest frame was lost"),
        (lambda image, params: (soak.draw(77, 1, len(image)), None), "crossed: another session's picture"),
        (lambda image, params: (255 - image, None), "crossed: another prompt's picture"),
        (lambda image, params: (soak.draw(1, 999, len(image)), None), "another frame's picture"),
        (lambda image, params: (image // 8 + 100, None), None),  # dim, but its own
        (lambda image, params: (image[::-1], None), "unreadable"),
        (lambda image, params: (np.concatenate([image, image]), None), "another size"),
    ],
)
def test_the_soak_complains_of_what_is_lost_or_crossed(answer, complaint):
    report = soak.Report()
    kind = soak.Kind("pocket", None, {"make it sepia": False}, ({},), 1, 1)
    client = soak.Client(kind, report, soak.random.Random(0))
    client._params = lambda: EditParams(prompt="make it sepia", width=64, height=64)
    client._failing_frame = lambda session, params: None
    client._burst(FixedSession(answer))
    if complaint is None:
        assert not report.complaints and report.counts["checked"] > 0
    else:
        assert report.complaints and all(complaint in text for text in report.complaints), report.complaints


def test_memory_that_rises_is_a_complaint_and_flat_memory_is_none():
    report = soak.Report()
    flat = [(i / 100, 500.0 + i % 3) for i in range(101)]
    assert soak._flatness(report, "memory", flat) == {"after_warm_up": 501.0, "end": 501.0, "most": 502.0}
    assert not report.complaints
    soak._flatness(report, "memory", [(i / 100, 500.0 + i) for i in range(101)])
    assert "memory rose from 530 to 590 MB" in report.complaints

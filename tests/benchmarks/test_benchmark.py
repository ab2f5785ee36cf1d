"""The benchmark program: what it writes is whole, right for known numbers, and says what it left out."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image
from support import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import benchmark, instruments, probes, subjects
from benchmarks.benchmark import MIN_RUNS, SUITES, ResultFile, Trial, main, measure, plan, products
from benchmarks.instruments import Clock, Memory, ceiling_tflops, denoise_flop, pictures
from benchmarks.subjects import NEGATIVE_PROMPT, PROMPT, Case, LeftOutError, Models, Ours, Stock, as_run
from benchmarks.tables import (
    DOCUMENTS,
    attack_counts,
    figures,
    kind_of,
    quantized_tables,
    tables,
    technique_tables,
    write_tables,
)

ROW_KEYS = set(
    "subject weights width height steps cfg references reference_area batch quantize attention_quantize text_encoder_quantize vlm "
    "changed_tokens median_ms p95_ms fps peak_memory_gb stages_ms tflops resident_memory_gb tokens ceiling_share "
    "first_frame_s runs blocks_run".split()
)
CPU = torch.device("cpu")
SMALL = Case(64, 64, 1, 1.0, 1, 64 * 64, 1, "fresh")


@pytest.fixture
def small_stock(monkeypatch):
    """Stock's megapixel references take seconds each on a CPU."""
    monkeypatch.setattr(stock, "VAE_IMAGE_SIZE", 64 * 64)


@pytest.fixture
def models(pocket, pocket_copy):
    yield Models(pocket, lambda: pocket_copy().transformer)
    pocket.caches_enabled = True


def run_small(tmp_path, *arguments: str) -> tuple[int, dict]:
    out = tmp_path / "result.json"
    status = main(["--device", "cpu", "--sizes", "64", "--steps", "1", "--warmup", "1", "--out", str(out), *arguments])
    return status, json.loads(out.read_text())


def test_a_run_writes_every_subject_with_every_key(tmp_path, capsys, small_stock):
    status, result = run_small(tmp_path, "--runs", "3", "--vlm", "fresh", "cached", "--commit", "abc1234")
    assert status == 0, result["left_out"]
    asked = [(row["subject"], row["vlm"]) for row in result["rows"]]
    # Stock embeds every picture whatever is asked: once is enough.
    assert asked == [("stock", "fresh"), ("plain", "fresh"), ("plain", "cached"), ("fast", "fresh"), ("fast", "cached")]
    assert result["commit"] == "abc1234" and result["torch"] == torch.__version__ and result["left_out"] == {}
    assert [phase["subjects"] for phase in result["phases"]] == [["stock", "plain"], ["fast"]]
    assert result["ceiling_tflops"] > 0 and {"load_s", "fast_path_s"} <= result["start"].keys()
    assert {"name", "applied", "reason"} == result["fast_path"][0].keys()
    for row in result["rows"]:
        assert row.keys() == ROW_KEYS, row.keys() ^ ROW_KEYS
        assert list(row["stages_ms"]) == ["encode_prompt", "encode_references", "denoise", "decode"]
        assert 0.5 < sum(row["stages_ms"].values()) / row["median_ms"] < 2, row  # medians of each, three runs
        assert row["runs"] == 3 and row["p95_ms"] >= row["median_ms"] > 0 and row["fps"] > 0
        assert row["tokens"]["noise"] == row["tokens"]["reference"] == 16 and row["tokens"]["text"] > 16
        assert row["blocks_run"] == 1.0 and row["tflops"] > 0 and row["first_frame_s"] > 0
    by_name = {(row["subject"], row["vlm"]): row["stages_ms"]["encode_prompt"] for row in result["rows"]}
    assert by_name["plain", "cached"] < 0.2 * by_name["plain", "fresh"], by_name
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["rows"] == 5


def test_guidance_and_batches_are_run_and_stock_says_why_it_is_missing(tmp_path):
    status, result = run_small(
        tmp_path, "--runs", "3", "--cfg", "4", "--batch", "2", "--subjects", "stock", "plain", "--references", "2"
    )
    [row] = result["rows"]
    assert status == 0 and row["subject"] == "plain" and row["tokens"]["negative_text"] > 16
    assert row["tokens"]["reference"] == 32  # two references of 16 tokens
    assert row["fps"] == pytest.approx(2e3 / row["median_ms"], rel=1e-2)
    [(what, why)] = result["left_out"].items()
    assert what.startswith("stock: 64x64") and "batch 2" in what and why == "stock diffusers refuses batches"


def test_what_is_not_installed_is_left_out_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    status, result = run_small(tmp_path, "--subjects", "torchao-int8", "cache-dit", "--steps", "4")
    assert status == 0 and result["rows"] == []
    assert result["left_out"]["torchao-int8"].startswith("torchao is not installed")
    assert result["left_out"]["cache-dit"].startswith("cache-dit is not installed")
    with pytest.raises(LeftOutError, match="masks for 4"):
        as_run("cache-dit", Case(64, 64, 2, 1.0, 1, 64 * 64, 1, "fresh"))


def test_each_quantised_subject_has_float_weights_to_begin_with_and_leaves_float_weights(tmp_path):
    status, result = run_small(tmp_path, "--runs", "3", "--subjects", "fast", "fast-int8", "fast-fp8", "--vlm", "cached")
    assert status == 0, result["left_out"]
    assert [(r["subject"], r["quantize"]) for r in result["rows"]] == [("fast", "none"), ("fast-fp8", "fp8"), ("fast-int8", "int8")]


def test_a_subject_that_fails_costs_the_others_nothing_and_the_program_its_status(tmp_path, monkeypatch):
    def broken(self, frames, case, clock):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(Stock, "edit", broken)
    status, result = run_small(tmp_path, "--runs", "3", "--subjects", "stock", "plain")
    assert status == 1 and [row["subject"] for row in result["rows"]] == ["plain"]
    [(what, why)] = result["left_out"].items()
    assert what.startswith("stock: 64x64") and why == "failed: RuntimeError: no kernel"


def test_time_that_is_over_leaves_a_valid_file_that_names_what_is_missing(tmp_path):
    status, result = run_small(tmp_path, "--seconds", "0", "--subjects", "plain", "fast")
    assert status == 0 and result["rows"] == [] and result["device"]
    assert {name.split(":")[0] for name in result["left_out"]} == {"plain", "fast"}
    assert set(result["left_out"].values()) == {"the time given was over"}


def test_a_case_past_its_deadline_stops_at_the_fewest_runs(models):
    trial = Trial("plain", Ours(models.ours), SMALL)
    measure([trial], SMALL, runs=9, warmup=5, deadline_s=0.0, clock=Clock(CPU))
    assert trial.failure is None and len(trial.times_ms) == MIN_RUNS
    trial = Trial("plain", Ours(models.ours), SMALL)
    measure([trial], SMALL, runs=5, warmup=1, deadline_s=float("inf"), clock=Clock(CPU))
    assert len(trial.times_ms) == 5


def test_a_killed_run_leaves_the_last_whole_file(tmp_path):
    result = ResultFile(tmp_path / "deep" / "r.json", {"device": "x"})
    result.write()
    result.data["rows"].append(object())  # cannot be written: as good as being killed in the middle
    with pytest.raises(TypeError):
        result.write()
    assert json.loads((tmp_path / "deep" / "r.json").read_text())["rows"] == []


def test_median_p95_and_tflops_are_right_for_known_times(pocket):
    times = [float(ms) for ms in range(1, 101)]
    trial = Trial("plain", Ours(pocket), SMALL, times_ms=times, first_frame_s=9.0, peak_gb=1.5, resident_gb=1.0)
    trial.stages_ms = [{"denoise": ms / 2, "decode": 1.0} for ms in times]
    trial.tokens = {"noise": 16, "reference": 16, "text": 20}
    row = trial.row("pocket", pocket.transformer.config, graphs_gb=0.25, ceiling=0.5)
    assert row["median_ms"] == 50.5 and row["p95_ms"] == pytest.approx(95.05) and row["fps"] == 19.802
    assert row["stages_ms"] == {"denoise": 25.25, "decode": 1.0}
    # What graphs hold between replays is taken, whatever the allocator says.
    assert row["peak_memory_gb"] == 1.75 and row["resident_memory_gb"] == 1.25
    flop = 6 * (24 * 256**2 * 52 + 4 * 52**2 * 256)
    assert row["tflops"] == pytest.approx(flop / 25.25e-3 / 1e12, abs=1e-3)
    assert row["ceiling_share"] == pytest.approx(row["tflops"] / 0.5, abs=2e-3)


def test_counted_operations_are_those_of_the_real_transformer(pocket):
    transformer, noise, reference, text = pocket.transformer, 64, 64, 40
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        transformer(
            hidden_states=torch.randn(1, noise + reference, 64),
            encoder_hidden_states=torch.randn(1, text, 192),
            timestep=torch.ones(1),
            img_shapes=[[(1, 8, 8), (1, 8, 8)]],
        )
    ours = denoise_flop(transformer.config, {"noise": noise, "reference": reference, "text": text}, steps=1, batch=1)
    # The counter does not know the CPU's attention kernel, hence the plain products. Not counted by us: modulation (a token's worth) and the layers into and out of the blocks.
    assert 0.95 < ours / counter.get_total_flops() < 1.0, (ours, counter.get_total_flops())
    guided = {"noise": noise, "reference": reference, "text": text, "negative_text": text}
    assert denoise_flop(transformer.config, guided, steps=3, batch=2) == pytest.approx(12 * ours)


def test_stages_of_the_clock_add_up_and_parts_of_one_name_are_added():
    clock = Clock(CPU)
    clock.start()
    for name in ("first", "second", "first"):
        clock.mark(name)
    total = clock.stop()
    assert list(clock.stages_ms()) == ["first", "second"]
    assert 0 < sum(clock.stages_ms().values()) <= total


def test_peak_memory_sees_what_was_freed_again():
    memory = Memory(CPU)
    if memory.resident_gb() is None:
        pytest.skip("process memory is read on Linux only")
    memory.reset_peak()
    before = memory.resident_gb()
    np.ones(25_000_000)  # 0.2 GB, given back at once
    assert memory.peak_gb() - before > 0.15
    memory.reset_peak()
    assert memory.peak_gb() - memory.resident_gb() < 0.05


def test_the_ceiling_is_two_operations_for_each_multiply_and_add_over_the_median_time(monkeypatch):
    """Of a clock that says 1, 3, 2 ms after a warm-up of 50: 2 x 2048^3 operations in 2 ms are 8.59 TFLOP/s."""
    spent = iter((50.0, 1.0, 3.0, 2.0))
    monkeypatch.setattr(instruments, "Clock", lambda device: SimpleNamespace(start=lambda: None, stop=lambda: next(spent)))
    monkeypatch.setattr(torch, "matmul", lambda a, b, out: made.append((a.shape, a.dtype)))
    made = []
    assert ceiling_tflops(CPU) == pytest.approx(8.589934592)
    assert made == [((2048, 2048), torch.float32)] * 4


def test_pictures_are_never_the_same():
    source = pictures(32, 16)
    first, second = next(source), next(source)
    assert first.shape == (16, 32, 3) and first.dtype == np.uint8 and not np.array_equal(first, second)


def test_marks_do_not_change_what_stock_paints(models, photo, small_stock):
    picture, case = photo(64, 64), Case(64, 64, 2, 4.0, 1, 64 * 64, 1, "fresh")
    marked = Stock(models.stock).edit([[picture]], case, Clock(CPU))
    plain = QwenImageEditPlusPipeline(**models.ours.components)
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        image=[Image.fromarray(picture)], prompt=PROMPT, negative_prompt=NEGATIVE_PROMPT, true_cfg_scale=4.0,
        width=64, height=64, num_inference_steps=2, generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    assert np.array_equal(marked[0], np.asarray(expected))


def test_phases_leave_the_modules_as_they_were(models):
    with subjects._compiled(models):
        assert all(block._compiled_call_impl is not None for block in models.blocks)
    assert all(block._compiled_call_impl is None for block in models.blocks)
    with subjects._fast(models):
        assert models.ours.single_frame_vae is not None and models.fast_path
    assert models.ours.single_frame_vae is None


def test_unknown_subjects_suites_and_areas_are_refused(capsys):
    for arguments in (["--subjects", "magic"], ["--suite", "all"], ["--areas", "big"], ["--runs", "0"]):
        with pytest.raises(SystemExit) as refused:
            main(arguments)
        assert refused.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_suites_ask_for_what_they_promise_and_nothing_twice():
    for name, blocks in SUITES.items():
        phases, _ = plan(blocks)
        done = [(subject, as_run(subject, case)) for _, todo in phases for case, names in todo for subject in names]
        assert len(done) == len(set(done)), name
        promised = {"fast", "fast-int8", "fast-fp8", "torchao-fp8"} if name == "quantized" else {"stock", "plain", "fast"}
        assert {subject for subject, _ in done} >= promised, name
    goals = {(case.width, case.steps, case.vlm) for case, _ in products(SUITES["goals"])}
    assert goals == {
        (w, s, v) for w, s in ((256, 1), (256, 2), (512, 1), (512, 2), (1024, 2)) for v in ("fresh", "cached")
    }
    seed = {(case.width, case.steps, case.cfg) for case, _ in products(SUITES["tables"])}
    assert seed == {(w, s, 1.0) for w in (256, 384, 512, 640, 768, 1024) for s in (2, 4)} | {(512, 28, 4.0)}
    args = benchmark.parse(["--suite", "goals", "--sizes", "128", "--vlm", "cached"])
    assert {(case.width, case.steps, case.vlm) for case, _ in products(args.blocks)} == {
        (128, 1, "cached"),
        (128, 2, "cached"),
    }


def known_file(folder, name: str = "known.json", **head) -> None:
    common = {"weights": "random", "height": 512, "steps": 2, "fps": 2.0}
    rows = [
        {**common, "subject": "stock", "width": 512, "vlm": "fresh", "median_ms": 600.0, "p95_ms": 612.4},
        {**common, "subject": "stock", "width": 256, "vlm": "fresh", "median_ms": 500.0, "p95_ms": 501.0},
        {**common, "subject": "fast", "width": 512, "vlm": "cached", "median_ms": 100.0, "p95_ms": 101.0,
         "tflops": 512.34, "ceiling_share": 0.656, "peak_memory_gb": 44.04},
        {**common, "subject": "fast", "width": 512, "vlm": "cached", "batch": 2, "median_ms": 150.0, "p95_ms": 151.0},
    ]  # fmt: skip
    file = {"device": "GPU X", "torch": "2", "diffusers": "0.42", "commit": "abc", "rows": rows, **head}
    (folder / name).write_text(json.dumps(file))


def test_tables_show_a_known_file_as_it_is(tmp_path):
    known_file(tmp_path, left_out={"torchao": "torchao is not installed", "fast: 512x512": "the time given was over"})
    lines = tables(tmp_path).splitlines()
    assert lines[0] == (
        "**GPU X**, torch 2, diffusers 0.42, commit abc (`known.json`). "
        "All rows: weights random, steps 2, CFG 1, references 1, quantised none."
    )
    assert lines[2] == (
        "| size | batch | VLM | subject | median ms | p95 ms | frames/s | against stock | TFLOPS (of ceiling) | peak GB |"
    )
    assert lines[4:8] == [
        "| 512x512 | 1 | fresh | stock | 600 | 612 | 2.00 | 1.0x | - | - |",
        "| 512x512 | 1 | cached | fast | 100 | 101 | 2.00 | 6.0x | 512 (66%) | 44.0 |",
        "| 256x512 | 1 | fresh | stock | 500 | 501 | 2.00 | 1.0x | - | - |",
        "| 512x512 | 2 | cached | fast | 150 | 151 | 2.00 | 8.0x | - | - |",  # two pictures, against stock one by one
    ]
    assert lines[-1] == "Not measured: torchao (torchao is not installed)."


SECTIONS = DOCUMENTS[ROOT / "benchmarks" / "README.md"]


def test_an_edited_table_and_a_stale_one_fail_the_check(tmp_path):
    known_file(tmp_path)
    document = tmp_path / "README.md"
    document.write_text("<!-- benchmarks: begin -->\n<!-- benchmarks: end -->\n")
    with pytest.raises(ValueError, match="does not show"):
        write_tables({document: SECTIONS}, tmp_path, check=True)
    assert "GPU X" not in document.read_text(), "a check writes nothing"
    write_tables({document: SECTIONS}, tmp_path)
    write_tables({document: SECTIONS}, tmp_path, check=True)
    document.write_text(document.read_text().replace("6.0x", "9.0x"))
    with pytest.raises(ValueError, match="does not show"):
        write_tables({document: SECTIONS}, tmp_path, check=True)


def test_the_documents_show_what_the_result_files_say():
    write_tables(check=True)
    rows = figures().splitlines()[2:]
    assert len(rows) == 8 and all(re.search(r"`benchmarks/results/[\w-]+\.json`", row) for row in rows)


def test_only_what_is_between_the_markers_of_the_readme_changes(tmp_path):
    known_file(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks: begin -->\nold\n<!-- benchmarks: end -->\nafter\n")
    write_tables({readme: SECTIONS}, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmarks: begin -->\n**GPU X**") and "old" not in text
    assert text.endswith("|\n<!-- benchmarks: end -->\nafter\n")


def test_tables_can_be_made_of_the_files_in_the_project():
    quantized, techniques = quantized_tables(), technique_tables()
    texts = {"benchmark": tables(), **dict.fromkeys(("memory", "linear", "quality"), quantized)}
    texts |= dict.fromkeys(("techniques", "soak"), techniques) | {"attacks": attack_counts()}
    for path in ROOT.glob("benchmarks/results/*.json"):
        kind = kind_of(json.loads(path.read_text()))
        assert kind is None or f"(`benchmarks/results/{path.name}`)" in texts[kind]


def test_the_probes_tell_an_exact_path_from_a_wrong_one(pocket, monkeypatch):
    monkeypatch.setattr(probes, "SIZE", 64)
    pocket.caches_enabled = False
    known = probes.plain(pocket)
    assert 0 < known["shuffled"]["latents"] < 1e-5 and 0 < known["shuffled"]["embeddings"] < 1e-5
    pocket.enable_fast_path()
    try:
        assert max(probes.compare(pocket, known)["fast"].values()) < 1e-5
        pocket.fused_transformer.blocks[2].norms.mul_(1.1)
        wrong = probes.compare(pocket, known)["fast"]
        assert wrong["latents"] > 1e-3 and wrong["embeddings"] < 1e-5
        assert [entry["text_tokens"] for entry in probes.new_prompts(pocket)] == sorted(
            {entry["text_tokens"] for entry in probes.new_prompts(pocket)}
        ), "every prompt is of another length"
    finally:
        pocket.disable_fast_path()
        pocket.caches_enabled = True

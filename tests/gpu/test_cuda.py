"""The fast path as it runs on a GPU: kernels, CUDA graphs, weights moved out. The pocket model; needs CUDA."""

import threading

import numpy as np
import pytest
import torch

import fast_path
from cached_pipeline import load_pipeline
from fast_path.transformer import Sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
# float32 without TF32, other kernels: rounding.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def pipe():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipeline = load_pipeline("pocket", device="cuda", dtype=torch.float32)
    pipeline.caches_enabled = False
    return pipeline


@pytest.fixture(autouse=True)
def plain_again(request):
    yield
    if "pipe" in request.fixturenames:
        request.getfixturevalue("pipe").disable_fast_path()


def steps_of(pipe, pictures, prompt="make it a pencil sketch", side=128, steps=2, batch=1):
    """(embeddings, reference latents, denoised latents, bytes as int)"""
    embeds, mask = pipe.encode_prompt([prompt] * batch, pictures)
    references = pipe.encode_references(pictures, area=side * side)
    noise = pipe.initial_noise(side, side, list(range(batch)) if batch > 1 else 0, batch)
    latents = pipe.denoise(noise, references, embeds, mask, pipe.schedule(steps, side, side))
    return embeds, references.latents, latents, pipe.decode(latents, side, side).int()


def largest(a, b):
    return [(x.float() - y.float()).abs().max().item() for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("side, references, batch", [(128, 1, 1), (256, 1, 1), (128, 3, 1), (64, 1, 3)])
def test_recorded_and_replayed_the_fast_path_gives_the_plain_result(pipe, photo, side, references, batch):
    pictures = [photo(160, 120, seed) for seed in range(references)]
    expected = steps_of(pipe, pictures, side=side, batch=batch)
    report = pipe.enable_fast_path()
    assert [entry.name for entry in report if entry.applied] == [*fast_path.PARTS, "warm_up"], report
    for _ in range(3):  # run and recorded, replayed, replayed
        *tensors, levels = largest(steps_of(pipe, pictures, side=side, batch=batch), expected)
        assert max(tensors) < TOLERANCE and levels <= 1, (tensors, levels)


def test_a_replay_reads_the_new_picture_and_its_result_outlives_the_next(pipe, photo):
    one, two = photo(128, 128, 1), photo(128, 128, 2)
    expected = [steps_of(pipe, picture) for picture in (one, two)]
    pipe.enable_fast_path()
    steps_of(pipe, one)
    found = [steps_of(pipe, picture) for picture in (one, two)]
    for a, b in zip(found, expected, strict=True):
        *tensors, levels = largest(a, b)
        assert max(tensors) < TOLERANCE and levels <= 1, (tensors, levels)
    assert largest(*expected)[2] > 0.1, "the pictures differ"


def test_a_steady_stream_records_nothing(pipe, photo):
    pipe.enable_fast_path()
    graphs = pipe.fused_transformer.graphs
    steps_of(pipe, photo(128, 128, 1))
    recorded = graphs.recordings
    for seed in range(2, 6):
        steps_of(pipe, photo(128, 128, seed))
    assert graphs.recordings == recorded > 0
    steps_of(pipe, photo(128, 128, 9), prompt="a completely different and considerably longer instruction for it")
    assert graphs.recordings > recorded


def test_more_shapes_than_the_bound_still_give_the_right_result(pipe, photo):
    picture = photo(64, 64)
    sides = [64, 96, 128, 160]
    expected = {side: steps_of(pipe, picture, side=side) for side in sides}
    pipe.enable_fast_path()
    pipe.fused_transformer.graphs.max_entries = 3
    for side in sides * 2:
        *tensors, levels = largest(steps_of(pipe, picture, side=side), expected[side])
        assert max(tensors) < TOLERANCE and levels <= 1, side


def test_the_modulation_weights_leave_the_gpu_and_come_back(pipe, photo):
    expected = steps_of(pipe, photo(64, 64), side=64)
    resident = torch.cuda.memory_allocated()
    pipe.enable_fast_path()
    blocks = pipe.transformer.transformer_blocks
    assert {p.device.type for block in blocks for p in block.img_mod.parameters()} == {"cpu"}
    before = pipe.fused_transformer.modulations.get(123.0, (123.0,))[0]  # a time that no schedule had: from the CPU
    pipe.disable_fast_path()
    assert {p.device.type for p in pipe.transformer.parameters()} == {"cuda"}
    with torch.no_grad():
        embedded = pipe.transformer.time_text_embed(torch.tensor([0.123], device="cuda"), before)
        assert torch.equal(blocks[2].img_mod(embedded).view(6, -1), before[2, 1])
    *tensors, levels = largest(steps_of(pipe, photo(64, 64), side=64), expected)
    assert max(tensors) < TOLERANCE and levels <= 1
    assert torch.cuda.memory_allocated() < resident * 1.2


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_recording_that_breaks_off_tells_its_cause_and_the_next_one_works(pipe, photo):
    expected = steps_of(pipe, photo(64, 64), side=64)
    pipe.enable_fast_path()
    graphs, calls = pipe.fused_transformer.graphs, []

    def fails_when_recorded(x):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("there is no more")
        return x * 2

    with pytest.raises(torch.OutOfMemoryError, match="no more"):
        graphs.run("fails", fails_when_recorded, torch.ones(4, device="cuda"))
    pipe.release_memory()
    assert len(graphs) == 0
    for _ in range(2):
        *tensors, levels = largest(steps_of(pipe, photo(64, 64), side=64), expected)
        assert max(tensors) < TOLERANCE and levels <= 1


def test_another_thread_may_use_the_gpu_while_a_graph_is_recorded(pipe, photo):
    pipe.enable_fast_path()
    stop, failures = threading.Event(), []

    def busy():
        try:
            while not stop.is_set():
                x = torch.ones(64, 64, device="cuda")
                (x @ x).sum().item()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for side in (64, 96, 112, 144, 176):
            steps_of(pipe, photo(64, 64), side=side)
    finally:
        stop.set()
        thread.join()
    assert not failures, failures


def test_half_precision_stays_near(photo):
    exact = load_pipeline("pocket", device="cuda", dtype=torch.float32)
    half = load_pipeline("pocket", device="cuda", dtype=torch.bfloat16)
    picture = photo(256, 256)
    truth, plain = (steps_of(p, picture, side=256)[2].float() for p in (exact, half))
    half.enable_fast_path()
    fast = steps_of(half, picture, side=256)[2].float()
    errors = [((x - truth).norm() / truth.norm()).item() for x in (plain, fast)]
    assert errors[1] < 1.5 * errors[0], f"plain is off by {errors[0]:.4f}, fast by {errors[1]:.4f}"


def test_reused_tokens_recorded_and_replayed_are_those_of_the_cpu(pipe, photo):
    """The same frames and masks on both: full, changed here and there, new embeddings, full again."""
    masks = [None, None]
    for tokens in ([3], [3, 20, 21], range(20), [40], [41], [42]):
        masks.append(np.isin(np.arange(64), list(tokens)).reshape(8, 8))
    masks.append(None)
    found = []
    for p in (load_pipeline("pocket", dtype=torch.float32), pipe):
        p.enable_fast_path()
        cache, latents = p.token_cache(), []
        embeds, mask = p.encode_prompt("make it a pencil sketch", photo(128, 128))
        for i, changed in enumerate(masks):
            if i == 5:
                embeds = embeds * 1.01
            references = p.encode_references(photo(128, 128, i), area=128 * 128)
            cache.begin(changed)
            run = p.initial_noise(128, 128), references, embeds, mask, p.schedule(2, 128, 128)
            latents.append(p.denoise(*run, token_cache=cache).cpu())
        found.append(latents)
    for i, (cpu, cuda) in enumerate(zip(*found, strict=True)):
        assert (cpu - cuda).abs().max() < 1e-3, (i, (cpu - cuda).abs().max())
    assert cache._graphs.recordings >= 4
    held = torch.cuda.memory_allocated()
    pipe.release_memory()
    assert cache.nbytes == 0 and torch.cuda.memory_allocated() < held


def test_samples_of_different_kinds_share_a_recorded_forward(pipe, photo):
    pipe.enable_fast_path()
    fused, samples = pipe.fused_transformer, []
    for side, steps, prompt in ((128, 2, "sepia"), (64, 4, "make it a pencil sketch"), (128, 1, "turn it into an oil painting")):
        schedule, embeds = pipe.schedule(steps, side, side), pipe.encode_prompt(prompt, photo(side, side))[0]
        references, noise = pipe.encode_references(photo(side, side), area=side * side), pipe.initial_noise(side, side)
        shapes = ((1, side // 16, side // 16), *references.shapes)
        samples.append(Sample(noise, references.latents, embeds, shapes, schedule.times[-1], schedule.times))
    expected = [fused.velocity(*sample) for sample in samples]
    for _ in range(3):
        assert max(largest(fused.velocities(samples), expected)) < TOLERANCE

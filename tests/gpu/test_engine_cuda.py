"""The engine on a GPU: streams that wait for each other, pictures that are those of one stage after the other."""

import numpy as np
import pytest
import torch
from support.engine import PATIENCE_S, backlog, stream
from support.pictures import psnr_db

from cached_pipeline import load_pipeline
from fast_path.reuse import AHEAD_EVERY
from qwen_realtime import STAGES, EditParams, EngineConfig, RealtimeEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PARAMS = EditParams("make it sepia", width=256, height=256, steps=2, seed=1)
ROUNDS = 12


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("pocket", device="cuda")


def rounds(engine, photo, settings) -> list[list[np.ndarray]]:
    """One picture after the other through all sessions at once; every few rounds the picture changes."""
    sessions = [engine.open_session() for _ in settings]
    images = []
    for turn in range(ROUNDS):
        frame = photo(256, 256, turn // 3)
        results = backlog(engine, None, [(s, frame, p) for s, p in zip(sessions, settings, strict=True)])
        assert all(result.error is None for result in results), [str(result.error) for result in results]
        images.append([result.image for result in results])
    for session in sessions:
        session.close()
    return images


def test_overlapped_pictures_are_those_of_one_stage_after_the_other(pipe, photo):
    settings = [
        PARAMS,
        PARAMS.replace(
            prompt="make it a pencil sketch", seed=2, start_from_previous=0.3, blend_still=0.6, motion_aware=True
        ),
        PARAMS.replace(prompt="turn it into a watercolour", seed=3, reuse="frames", embeds="changed"),
    ]
    with RealtimeEngine(pipe, EngineConfig(pipelining=False)) as engine:
        assert not engine.description["pipelining"]["applied"]
        expected = rounds(engine, photo, settings)
    with RealtimeEngine(pipe) as engine:
        assert engine.description["pipelining"]["applied"]
        found = rounds(engine, photo, settings)
    for turn, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        for which, (image, other) in enumerate(zip(mine, theirs, strict=True)):
            assert psnr_db(image, other) > 45, (turn, which, psnr_db(image, other))


def test_a_stream_batch_gives_the_pictures_of_frames_alone(pipe, photo):
    frames = [photo(256, 256, seed) for seed in range(6)]
    with RealtimeEngine(pipe) as engine:
        alone = [engine.edit([frame], PARAMS, timeout=PATIENCE_S).image for frame in frames]
        with engine.open_session() as session:
            results = stream(session, [(frame, PARAMS.replace(stream_batch=True)) for frame in frames])
    for result, image in zip(results, alone, strict=True):
        assert psnr_db(result.image, image) > 38, psnr_db(result.image, image)


def test_embeddings_from_the_background_arrive_and_are_those_of_their_picture(pipe, photo):
    params = PARAMS.replace(embeds="every", embeds_every=1, embeds_background=True)
    with RealtimeEngine(pipe) as engine, engine.open_session() as session:
        picture = photo(256, 256, 1)
        session.result(session.submit([photo(256, 256, 2)], params), PATIENCE_S)
        first = session.memory.embeds
        results = [session.result(session.submit([picture], params), PATIENCE_S) for _ in range(6)]
        renewed = session.memory.embeds
        assert renewed is not first, "a renewal came through"
        fresh = engine.edit([picture], params.replace(embeds="fresh", embeds_background=False), timeout=PATIENCE_S)
    assert psnr_db(results[-1].image, fresh.image) > 40


def test_what_was_recorded_ahead_gives_the_cpu_s_latents_when_it_is_wanted(photo):
    """One unit of tokens for some time; then two and three, which nothing has asked for before."""
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    masks = [None] + [np.isin(np.arange(64), [t]).reshape(8, 8) for t in range(6 * AHEAD_EVERY)]
    masks += [np.isin(np.arange(64), range(8, 8 + changed)).reshape(8, 8) for changed in (7, 11, 3, 12)]
    found = []
    try:
        for device in ("cpu", "cuda"):
            p = load_pipeline("pocket", device=device, dtype=torch.float32)
            p.enable_fast_path()
            cache, latents, recordings, sizes = p.token_cache(), [], [], []
            embeds = p.encode_prompt("make it a pencil sketch", photo(128, 128))
            for i, changed in enumerate(masks):
                references = p.encode_references(photo(128, 128, i % 3), area=128 * 128)
                cache.begin(changed)
                run = p.initial_noise(128, 128), references, *embeds, p.schedule(2, 128, 128)
                before = cache.recordings
                latents.append(p.denoise(*run, token_cache=cache).cpu())
                recordings.append(cache.recordings - before)
                sizes.append(int(cache.computed.sum()))
                cache.record_ahead()
            found.append((latents, sizes))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    assert found[0][1] == found[1][1] and found[1][1][-4:] == [8, 12, 4, 12]
    for i, (cpu, cuda) in enumerate(zip(found[0][0], found[1][0], strict=True)):
        assert (cpu - cuda).abs().max() < 1e-3, (i, (cpu - cuda).abs().max())
    assert recordings[:2] == [2, 2] and not any(recordings[2:]), "all and one unit; later what was wanted was there"
    assert cache.recordings >= 8, "two and three units, a step at a time"


def test_a_stream_with_reuse_records_ahead_and_says_nothing_of_it(pipe, photo, caplog):
    params, still, patch = PARAMS.replace(reuse="frames", embeds="kept"), photo(256, 256, 1), photo(64, 64, 2)
    with RealtimeEngine(pipe) as engine, engine.open_session() as session:
        for t in range(8 * AHEAD_EVERY):
            picture = still.copy()
            picture[64:128, t : t + 64] = patch
            result = session.result(session.submit([picture], params), PATIENCE_S)
            assert result.error is None and result.notes == ()
        cache = session.memory.cache
        assert result.computed < 0.5 and cache.recordings > 6
        begun = cache.recordings
        for t in range(8 * AHEAD_EVERY, 10 * AHEAD_EVERY):
            picture = still.copy()
            picture[64:128, t : t + 64] = patch
            session.result(session.submit([picture], params), PATIENCE_S)
        assert cache.recordings <= begun + 2, "it comes to an end"
    assert not [record for record in caplog.records if "recorded ahead" in record.message]


def test_stages_are_measured_and_a_failed_frame_leaves_the_next_one_whole(pipe, photo, monkeypatch):
    with RealtimeEngine(pipe) as engine:
        first = engine.edit([photo(256, 256)], PARAMS, timeout=PATIENCE_S)
        assert min(first.stages_ms[stage] for stage in STAGES) > 0
        with engine.open_session() as session, engine.open_session() as other:
            with monkeypatch.context() as broken:
                broken.setattr(pipe, "encode_references", lambda *a, **o: torch.empty(2**46, device="cuda"))
                (failed,) = backlog(engine, None, [(session, photo(256, 256), PARAMS)])
            assert "Out of memory" in str(failed.error)
            results = backlog(engine, None, [(s, photo(256, 256), PARAMS) for s in (session, other)])
        for result in results:
            assert psnr_db(result.image, first.image) > 45

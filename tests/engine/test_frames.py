"""What a frame reuses of the ones before it: tokens, embeddings, latents; each on the embedded model."""

import itertools

import numpy as np
import pytest
import torch
from support.engine import PATIENCE_S, BatchingFake, Clock, serve
from support.pictures import psnr_db

from engine.embeddings import mixed_prompts, words_rows
from engine.frames import START_LEVELS, start_from, started_late
from fast_path import TokenCache
from qwen_realtime import EditParams, EngineConfig, RealtimeEngine

SIZE = 128
PARAMS = EditParams("make it sepia", width=SIZE, height=SIZE, steps=2, seed=3, embeds="kept")


def noisy(picture: np.ndarray, count: int) -> list[np.ndarray]:
    """A still scene as a camera gives it."""
    random = np.random.default_rng(0)
    return [(picture + random.normal(0, 3, picture.shape)).round().clip(0, 255).astype(np.uint8) for _ in range(count)]


@pytest.fixture(scope="module")
def fast(pocket):
    """An engine on the fast path, which reuse needs. The pipeline is shared: it gets its stock path back."""
    with RealtimeEngine(pocket) as engine:
        yield engine
    pocket.disable_fast_path()


def edit(engine, picture, params):
    return engine.edit([picture], params, timeout=PATIENCE_S).image


# Reuse of tokens


def test_a_frame_that_has_not_changed_costs_few_tokens_and_gives_the_same_picture(fast, photo):
    params = PARAMS.replace(reuse="frames")
    with fast.open_session() as session:
        first, again = serve(session, (photo(SIZE, SIZE, 1), params), (photo(SIZE, SIZE, 1), params))
    assert first.computed == 1.0 and again.computed <= 0.1, (first.computed, again.computed)
    assert first.notes == again.notes == ()
    assert psnr_db(again.image, first.image) > 45


def test_what_changed_is_computed_and_close_to_the_whole_frame(fast, photo):
    before = photo(SIZE, SIZE, 1)
    after = before.copy()
    after[32:64, 32:64] = photo(SIZE, SIZE, 2)[32:64, 32:64]  # 4 of 64 tokens, which have 12 neighbours
    params = PARAMS.replace(reuse="frames")
    with fast.open_session() as session:
        first, *results = serve(session, (before, params), *[(after, params)] * 4)
    assert [result.computed for result in results] == [1 / 16] * 4, "what was computed has seen the change"
    whole = edit(fast, after, PARAMS)
    found = [psnr_db(result.image, whole) for result in (first, *results)]
    assert found[1] > found[0] + 6 and found[4] > found[1] + 1, "first what changed, then its neighbours"


def test_a_recording_ahead_that_fails_is_logged_once_and_costs_no_frame(pocket, photo, monkeypatch, caplog):
    def fail(cache):
        raise RuntimeError("asked for")

    monkeypatch.setattr(TokenCache, "record_ahead", fail)
    params = PARAMS.replace(reuse="frames")
    with RealtimeEngine(pocket) as engine, engine.open_session() as session:
        results = serve(session, *[(photo(SIZE, SIZE, 1), params)] * 3)
    assert [result.error for result in results] == [None] * 3 and results[2].computed < 0.1
    assert [record.message.split(":")[0] for record in caplog.records] == ["nothing is recorded ahead any more"]


def test_above_reuse_most_the_whole_frame_is_computed(fast, photo):
    before = photo(SIZE, SIZE, 1)
    after = before.copy()
    after[32:96, 32:96] = 255 - after[32:96, 32:96]  # a quarter of the tokens
    for most, whole in ((0.2, True), (0.3, False)):
        params = PARAMS.replace(reuse="frames", reuse_most=most)
        with fast.open_session() as session:
            result = serve(session, (before, params), (after, params))[1]
        assert (result.computed == 1.0) == whole, (most, result.computed)


@pytest.mark.parametrize(
    "change",
    [{"prompt": "make it a pencil sketch"}, {"seed": 8}, {"steps": 3}, {"height": 96}, {"reuse_threshold": 9.0}],
)
def test_a_change_of_anything_but_the_picture_computes_everything(fast, photo, change):
    params = PARAMS.replace(reuse="frames", embeds="fresh")
    with fast.open_session() as session:
        results = serve(session, *[(photo(SIZE, SIZE, 1), p) for p in (params, params.replace(**change))])
    assert results[1].computed == 1.0 and not [note for note in results[1].notes if note.startswith("reuse")]
    with fast.open_session() as session:
        (alone,) = serve(session, (photo(SIZE, SIZE, 1), params.replace(**change)))
    assert np.array_equal(results[1].image, alone.image)


@pytest.mark.parametrize(
    "change, why",
    [({"cfg_scale": 3.0}, "guidance is on"), ({"stream_batch": True}, "the frame before is not there yet"),
     ({"reference_area": "stock"}, "not at the output's area")],
)  # fmt: skip
def test_where_tokens_cannot_be_reused_the_result_says_why(photo, change, why):
    params = PARAMS.replace(reuse="frames", **change)
    with RealtimeEngine(BatchingFake()) as engine, engine.open_session() as session:
        (result,) = serve(session, (photo(SIZE, SIZE, 1), params))
    (note,) = result.notes
    assert note.startswith("reuse: off") and why in note and result.computed == 1.0


def test_without_the_fast_path_the_result_says_why_nothing_is_reused(pocket, photo):
    pocket.disable_fast_path()
    with RealtimeEngine(pocket, EngineConfig(fast_path=False)) as engine, engine.open_session() as session:
        (result,) = serve(session, (photo(SIZE, SIZE, 1), PARAMS.replace(reuse="steps")))
    pocket.enable_fast_path()  # the module's engine is on it
    assert "fast path" in result.notes[0]


def test_only_so_many_sessions_hold_caches_and_an_idle_one_gives_way(pocket, photo):
    clock = Clock()
    params = PARAMS.replace(reuse="frames", width=64, height=64, steps=1)
    picture = photo(64, 64, 1)
    with RealtimeEngine(pocket, EngineConfig(reuse_sessions=1), clock=clock) as engine:
        one, two = engine.open_session(), engine.open_session()
        serve(one, (picture, params))
        (refused,) = serve(two, (picture, params))
        assert "1 other sessions hold the 1 places" in refused.notes[0] and two.memory.cache is None
        clock.now += 10
        (taken,) = serve(two, (picture, params))
        assert taken.notes == () and two.memory.cache is not None and one.memory.cache is None
        clock.now += 10
        (back,) = serve(one, (picture, params))
        assert "another session had this one's place" in back.notes[0] and back.computed == 1.0
        one.close()
        assert serve(two, (picture, params))[0].notes[0].startswith("reuse: all is computed"), (
            "a closed session holds none"
        )


def test_a_failed_frame_leaves_nothing_to_reuse(fast, photo, monkeypatch):
    params = PARAMS.replace(reuse="frames", blend_still=0.5, start_from_previous=0.3)
    picture = photo(SIZE, SIZE, 1)
    with fast.open_session() as session:
        (first,) = serve(session, (picture, params))
        with monkeypatch.context() as broken:
            broken.setattr(fast.pipeline, "decode", lambda *a: (_ for _ in ()).throw(RuntimeError("out of memory")))
            number = session.submit([picture], params)
            with pytest.raises(ValueError, match="Out of memory"):
                session.result(number, PATIENCE_S)
        (after,) = serve(session, (picture, params))
    assert after.computed == 1.0 and np.array_equal(after.image, first.image)


# Temporal consistency


def test_blending_what_is_still_halves_the_flicker_of_a_still_scene(fast, photo):
    frames = noisy(photo(SIZE, SIZE, 1), 6)

    def flicker(params):
        with fast.open_session() as session:
            images = [r.image.astype(np.float32) for r in serve(session, *[(frame, params) for frame in frames])]
        return np.mean([np.abs(b - a).mean() for a, b in itertools.pairwise(images[1:])])

    plain, blended = flicker(PARAMS), flicker(PARAMS.replace(blend_still=0.6))
    assert blended < 0.5 * plain, (blended, plain)


def test_blending_leaves_what_moves_alone(fast, photo):
    scene = photo(2 * SIZE, SIZE, 1)
    frames = [np.ascontiguousarray(scene[:, x : x + SIZE]) for x in range(0, 40, 8)]
    params = PARAMS.replace(blend_still=0.6)
    with fast.open_session() as session:
        results = serve(session, *[(frame, params) for frame in frames])
    for frame, result in zip(frames[1:], results[1:]):
        assert psnr_db(result.image, edit(fast, frame, PARAMS)) > 35


def test_a_start_from_the_last_result_is_on_the_line_from_picture_to_noise(pocket):
    noise, picture = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    assert torch.allclose(start_from(noise, picture, 0.75), 0.25 * picture + 0.75 * noise, atol=1e-6)
    assert torch.equal(start_from(noise, picture * float("nan"), 0.75), noise), "a failed frame is no start"
    schedule = pocket.schedule(2, 64, 64)
    late = started_late(schedule, 0.75)
    assert late.sigmas[0] == 0.75 and late.sigmas[-1] == 0 and len(late.times) == 2
    assert late.times == tuple(0.75 * t for t in schedule.times) and torch.allclose(
        late.timesteps, torch.tensor(late.times)
    )


def test_a_start_from_the_last_result_is_only_from_that_of_the_same_edit(fast, photo):
    params = PARAMS.replace(start_from_previous=0.5, embeds="fresh")
    picture = photo(SIZE, SIZE, 1)
    for change in ({"prompt": "make it a pencil sketch"}, {"seed": 4}, {"width": 64}):
        with fast.open_session() as session:
            first, second, other = serve(
                session, (picture, params), (picture, params), (picture, params.replace(**change))
            )
        assert not np.array_equal(first.image, second.image)
        assert np.array_equal(other.image, edit(fast, picture, params.replace(**change))), change


def test_motion_turns_the_strength_down(fast, photo):
    params = PARAMS.replace(blend_still=0.6, motion_aware=True, width=64, height=64, steps=1)
    with fast.open_session() as session:
        serve(session, *[(photo(64, 64, 1), params)] * 3)
        still = session.memory.strength
        serve(session, *[(photo(64, 64, seed), params) for seed in (2, 3, 4)])
        assert still == 1.0 and session.memory.strength < 0.3


def test_all_strengths_that_motion_may_choose_are_ready_when_the_first_is(fast, photo):
    """At full size each that is not stalls the stream for 2 s: the weights behind its levels have to come to the GPU."""
    params = PARAMS.replace(start_from_previous=0.31, motion_aware=True, width=64, height=64, steps=2)
    modulations = fast.pipeline.fused_transformer.modulations
    with fast.open_session() as session:
        before = modulations.summary()["entries"]
        serve(session, *[(photo(64, 64, 1), params)] * 2)
        ready = modulations.summary()["entries"]
        strengths = set()
        for share in (0.0, 0.02, 0.1, 0.3, 1.0):  # of the picture's pixels that are others
            picture = photo(64, 64, 1).copy()
            picture[: round(64 * share)] = 255 - picture[: round(64 * share)]
            serve(session, (picture, params))
            strengths.add(round(session.memory.strength * START_LEVELS))
    assert len(strengths) > 2 and ready == before + 2 * START_LEVELS, strengths
    assert modulations.summary()["entries"] == ready


# Prompts


def test_what_a_prompt_says_does_not_reach_the_rows_of_the_pictures(pocket, photo):
    """What a fade relies on: rows in front of the words are the picture's alone."""
    picture = photo(64, 64, 1)
    prompts = ("make it sepia", "a watercolour of it, please")
    embeds = [pocket.encode_prompt(prompt, picture)[0] for prompt in prompts]
    lengths = [words_rows(pocket, prompt) for prompt in prompts]
    heads = [e[:, :-n] for e, n in zip(embeds, lengths)]
    assert heads[0].shape == heads[1].shape and torch.equal(*heads), [h.shape for h in heads]
    assert lengths[0] < heads[0].shape[1]


@pytest.mark.parametrize("how", ["linear", "spherical"])
def test_a_new_prompt_fades_in(fast, photo, how):
    picture = photo(SIZE, SIZE, 1)
    old, new = PARAMS, PARAMS.replace(prompt="make it a pencil sketch", transition_frames=4, transition=how)
    with fast.open_session() as session:
        images = [r.image for r in serve(session, (picture, old.replace(transition_frames=4)), *[(picture, new)] * 5)]
    begin, end = edit(fast, picture, old), edit(fast, picture, new)
    to_end = [psnr_db(image, end) for image in images]
    assert np.array_equal(images[0], begin)
    assert np.array_equal(images[4], end) and np.array_equal(images[5], end), (
        "after so many frames it is the new prompt's"
    )
    assert to_end[:5] == sorted(to_end[:5]), to_end
    assert psnr_db(images[1], begin) > psnr_db(end, begin) + 3, "the first frame of a fade is near the old prompt's"


def test_a_fade_goes_on_where_like_frames_are_skipped(fast, photo):
    picture = photo(64, 64, 1)
    params = PARAMS.replace(width=64, height=64, steps=1, transition_frames=3, skip_similar="frame")
    with fast.open_session() as session:
        results = serve(session, (picture, params), *[(picture, params.replace(prompt="make it a pencil sketch"))] * 5)
    assert [r.skipped for r in results[1:4]] == [False] * 3


@pytest.mark.parametrize("how", ["linear", "spherical"])
@pytest.mark.parametrize("length", [3, 5, 8])
def test_mixed_prompts_keep_the_rows_of_the_present_picture_and_the_new_length(how, length):
    origin, aim = torch.randn(1, length, 4), torch.randn(1, 12, 4)
    mixed = mixed_prompts(origin, aim, 5, 0.5, how)
    assert mixed.shape == aim.shape and torch.equal(mixed[:, :-5], aim[:, :-5])
    assert torch.allclose(mixed_prompts(origin, aim, 5, 1.0, how), aim, atol=1e-5)
    assert torch.allclose(mixed_prompts(origin, aim, 5, 0.0, how)[:, -3:], origin[:, -3:], atol=1e-5), (
        "laid on at the end"
    )
    assert torch.allclose(mixed_prompts(aim[:, -5:], aim, 5, 0.3, how), aim, atol=1e-5), "nothing to fade"


def test_a_fade_that_is_overtaken_by_another_prompt_goes_on_from_where_it_is(fast, photo):
    picture = photo(SIZE, SIZE, 1)
    params = PARAMS.replace(transition_frames=8)
    other, third = (
        params.replace(prompt=p) for p in ("make it a pencil sketch", "turn it into a watercolour painting, please")
    )
    with fast.open_session() as session:
        images = [r.image for r in serve(session, *[(picture, p) for p in (params, other, other, other, third)])]
        last = [r.image for r in serve(session, *[(picture, third)] * 8)][-1]
    assert psnr_db(images[4], images[3]) > psnr_db(edit(fast, picture, third), images[3]), "no jump"
    assert np.array_equal(last, edit(fast, picture, third))


# Embeddings in the background


def test_a_renewal_in_the_background_is_made_after_its_frame_and_serves_the_next(fast, photo, monkeypatch):
    events = []
    encode = type(fast.pipeline).encode_prompt
    denoise = type(fast.pipeline).denoise

    def encode_noted(pipe, *args, **options):
        events.append("look")
        return encode(pipe, *args, **options)

    def denoise_noted(pipe, noise, references, embeds, *args, **options):
        events.append("denoise")
        used.append(embeds)
        return denoise(pipe, noise, references, embeds, *args, **options)

    used = []
    monkeypatch.setattr(type(fast.pipeline), "encode_prompt", encode_noted)
    monkeypatch.setattr(type(fast.pipeline), "denoise", denoise_noted)
    params = PARAMS.replace(embeds="fresh", embeds_background=True, width=64, height=64, steps=1)
    pictures = [photo(64, 64, seed) for seed in range(3)]
    with fast.open_session() as session:
        serve(session, *[(picture, params) for picture in pictures])
        fast.edit(
            [pictures[0]], PARAMS.replace(width=64, height=64, steps=1), timeout=PATIENCE_S
        )  # the last renewal is done
    assert events[:6] == ["look", "denoise", "denoise", "look", "denoise", "look"], (
        "no frame but the first waits for a look"
    )
    assert used[1] is used[0], "the last embeddings serve until there are new ones"
    assert torch.equal(used[2], fast.pipeline.encode_prompt("make it sepia", [pictures[1]])[0])


def test_a_renewal_that_fails_costs_no_frame(fast, photo, monkeypatch, caplog):
    params = PARAMS.replace(embeds="fresh", embeds_background=True, width=64, height=64, steps=1)
    encode = fast.pipeline.encode_prompt
    with fast.open_session() as session:
        serve(session, (photo(64, 64, 1), params))
        with monkeypatch.context() as broken:
            broken.setattr(fast.pipeline, "encode_prompt", lambda *a: (_ for _ in ()).throw(RuntimeError("lost")))
            results = serve(session, *[(photo(64, 64, seed), params) for seed in (2, 3)])
        monkeypatch.setattr(fast.pipeline, "encode_prompt", encode)
        results += serve(session, (photo(64, 64, 4), params))
    assert all(result.error is None for result in results) and "could not be renewed" in caplog.text


# Sessions


def test_interleaved_sessions_with_techniques_of_their_own_equal_each_alone(fast, photo):
    """Bitwise: keys, values, latents, embeddings and batches of one session never reach the other."""
    moving = [[photo(SIZE, SIZE, seed) for seed in seeds] for seeds in ((1, 1, 2), (3, 3, 3), (4, 5, 5))]
    settings = [
        PARAMS.replace(reuse="frames", reuse_most=1.0),
        PARAMS.replace(
            prompt="make it a pencil sketch", seed=9, start_from_previous=0.25, blend_still=0.6, motion_aware=True
        ),
        PARAMS.replace(
            prompt="turn it into a watercolour", seed=5, stream_batch=True, embeds="fresh", embeds_background=True
        ),
    ]
    fast.pipeline.clear_caches()
    alone = []
    for frames, params in zip(moving, settings):
        with fast.open_session() as session:
            alone.append([r.image for r in serve(session, *[(frame, params) for frame in frames])])
    sessions = [fast.open_session() for _ in settings]
    together = [[], [], []]
    for turn in range(3):
        numbers = [s.submit([frames[turn]], p) for s, frames, p in zip(sessions, moving, settings)]
        for mine, session, number in zip(together, sessions, numbers):
            mine.append(session.result(number, PATIENCE_S).image)
    for session in sessions:
        session.close()
    for mine, reference in zip(together, alone):
        for image, expected in zip(mine, reference):
            np.testing.assert_array_equal(image, expected)

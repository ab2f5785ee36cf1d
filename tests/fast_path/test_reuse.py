"""Token reuse: what is computed, what is kept, when everything is computed again, and what the approximation costs."""

import gc
import weakref

import numpy as np
import pytest
import torch
from support.graphs import EagerRecorder
from support.models import inputs, small_model
from support.pictures import psnr_db

from fast_path import TokenCache
from fast_path.graphs import Graphs
from fast_path.reuse import AHEAD_EVERY, next_to_record, served_by
from fast_path.transformer import FusedTransformer, Sample
from pipeline.images import EditError

LAYOUT = ((1, 8, 8), (1, 8, 8))
TIMES = (1000.0, 750.0)


@pytest.fixture(scope="module")
def fused():
    return FusedTransformer(small_model())


def samples(given, layout=LAYOUT, times=TIMES) -> list[Sample]:
    return [Sample(*given, layout, time, times) for time in times]


def frame(cache, wanted, changed=None) -> list[torch.Tensor]:
    cache.begin(changed)
    return [cache.velocity(sample, step) for step, sample in enumerate(wanted)]


def some(*tokens) -> np.ndarray:
    changed = np.zeros(64, bool)
    changed[list(tokens)] = True
    return changed.reshape(8, 8)


@pytest.mark.parametrize("layout", [LAYOUT, ((1, 4, 12), (1, 4, 4)), ((1, 4, 4),) * 3], ids=["one", "smaller", "two"])
def test_the_first_step_of_a_whole_frame_is_exact_and_later_ones_keep_the_references(fused, layout):
    wanted = samples(inputs(fused.transformer, layout), layout)
    exact = [fused.velocity(*sample) for sample in wanted]
    cache = TokenCache(fused)
    for _ in range(2):
        first, later = frame(cache, wanted)
        assert torch.equal(first, exact[0]) and cache.computed.all()
        assert not torch.equal(later, exact[1]), "an approximation: the references are those of the first step"
    rows = sum(np.prod(shape) for shape in layout) + wanted[0].prompt_embeds.shape[1]
    keys_and_values = 2 * len(fused.blocks) * 2 * rows * fused.width * 4
    assert cache.nbytes == keys_and_values + 2 * wanted[0].latents.nbytes


def test_unchanged_tokens_keep_their_velocity_to_the_bit_and_changed_ones_do_not(fused):
    latents, conditions, embeds = inputs(fused.transformer, LAYOUT)
    cache = TokenCache(fused)
    before = frame(cache, samples((latents, conditions, embeds)))
    conditions = conditions.clone()
    conditions[:, [3, 11]] += 2.0
    after = frame(cache, samples((latents, conditions, embeds)), some(3, 11))
    computed = cache.computed.reshape(-1)
    assert computed[[3, 11]].all() and computed.sum() == 4, "rounded up to a sixteenth of all"
    for old, new in zip(before, after, strict=True):
        same = (old == new).all(-1)[0].numpy()
        assert (same == ~computed).all()
    exact = fused.velocity(*samples((latents, conditions, embeds))[0])[:, [3, 11]]
    assert (after[0][:, [3, 11]] - exact).norm() < 0.7 * (before[0][:, [3, 11]] - exact).norm()


def test_with_nothing_changed_what_is_computed_again_gives_what_was_there(fused):
    wanted = samples(inputs(fused.transformer, LAYOUT))
    cache = TokenCache(fused)
    before = frame(cache, wanted)
    for _ in range(3):
        for old, new in zip(before, frame(cache, wanted, some(5)), strict=True):
            assert (old - new).abs().max() < 1e-4


def test_spare_places_go_round_so_that_no_token_gets_old(fused):
    wanted = samples(inputs(fused.transformer, LAYOUT))
    cache = TokenCache(fused)
    frame(cache, wanted)
    seen = np.zeros((8, 8), bool)
    for _ in range(22):  # 3 of 4 places are spare: 63 tokens in 21 frames
        frame(cache, wanted, some(9))
        assert cache.computed.sum() == 4 and cache.computed[1, 1]
        seen |= cache.computed
    assert seen.all()


def test_spare_places_go_to_the_neighbours_of_what_changed_first_and_these_take_turns(fused):
    wanted = samples(inputs(fused.transformer, LAYOUT))
    cache = TokenCache(fused)
    frame(cache, wanted)
    around, seen = some(0, 1, 2, 8, 10), np.zeros((8, 8), bool)
    for _ in range(2):  # 3 of 4 places are spare: 5 neighbours in 2 frames
        cache.begin(some(9), around)
        for step, sample in enumerate(wanted):
            cache.velocity(sample, step)
        assert cache.computed.sum() == 4 and cache.computed[1, 1]
        seen |= cache.computed
    assert seen[around].all()


def test_neighbours_for_which_there_was_no_place_come_in_the_next_frames(fused):
    wanted = samples(inputs(fused.transformer, LAYOUT))
    cache = TokenCache(fused)
    frame(cache, wanted)
    around, seen = some(*range(40, 50)), np.zeros((8, 8), bool)
    for changed, neighbours in ((some(1, 2, 3, 4), around), (some(), some()), (some(), None), (some(), some())):
        cache.begin(changed, neighbours)
        for step, sample in enumerate(wanted):
            cache.velocity(sample, step)
        assert cache.computed.sum() == 4
        seen |= cache.computed
    assert seen[around].all() and seen.sum() == 16


# Recording, by a recorder that needs no GPU


def recording(fused) -> TokenCache:
    cache = TokenCache(fused)
    cache._graphs = Graphs(recorder=EagerRecorder())
    return cache


def test_what_is_not_recorded_is_served_by_a_little_more_that_is_but_never_by_everything():
    def served(wanted, *recorded):
        return served_by(wanted, 16, lambda units: units in recorded)

    assert served(5) == 5 and served(5, 4, 16) == 5, "nothing near: recorded now"
    assert served(5, 5, 6) == 5 and served(5, 6, 7) == 6 and served(5, 7) == 7 and served(5, 8) == 5
    assert served(15, 16) == 15 and served(16) == 16 and served(14, 15) == 15


def test_neighbours_are_recorded_ahead_larger_ones_first_and_not_all_the_time():
    def wanted(units, since, *recorded):
        return next_to_record(units, 16, since, lambda units: units in recorded)

    assert wanted(5, AHEAD_EVERY - 1) is None
    order, recorded = [], []
    while (units := wanted(5, AHEAD_EVERY, *recorded)) is not None:
        recorded.append(units)
        order.append(units)
    assert order == [5, 6, 4, 7, 3]
    assert [wanted(1, 99, *range(n)) for n in (2, 3, 4)] == [2, 3, None]
    assert wanted(15, 99, 15, 14) == 13 and wanted(15, 99, 15, 14, 13) is None, "all of them is never a neighbour"


def test_recording_ahead_is_spread_out_ends_and_leaves_what_is_kept_alone(fused):
    wanted = samples(inputs(fused.transformer, LAYOUT))
    cache, plain, counts = recording(fused), TokenCache(fused), []
    cache.record_ahead()  # before the first frame there is nothing to do
    for t in range(40):
        changed = some(t) if t else None
        mine, theirs = frame(cache, wanted, changed), frame(plain, wanted, changed)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), t
        assert np.array_equal(cache.computed, plain.computed)
        kept = [k.clone() for k in cache._kept]
        cache.record_ahead()
        assert all(torch.equal(a, b) for a, b in zip(kept, cache._kept, strict=True)), t
        counts.append(cache.recordings)
    assert counts[:2] == [2, 4], "the first frame's two steps, then those of one unit"
    rises = [t for t in range(2, 40) if counts[t] > counts[t - 1]]
    assert len(rises) == 4 and counts[-1] == 8, "two and three units, a step at a time"
    assert min(np.diff([1, *rises])) >= AHEAD_EVERY - 1
    frame(cache, wanted, some(*range(10)))
    assert cache.computed.sum() == 12 and cache.recordings == 8, "wanted for the first time, and recorded before"


def test_a_share_that_has_no_recording_computes_a_little_more_until_it_has_one(fused):
    wanted = samples(inputs(fused.transformer, LAYOUT))
    cache, computed = recording(fused), []
    frame(cache, wanted)
    frame(cache, wanted, some(*range(12)))  # 3 units
    for _ in range(3 * AHEAD_EVERY):
        frame(cache, wanted, some(1))
        computed.append(int(cache.computed.sum()))
        cache.record_ahead()
    assert computed[0] == 12 and computed[-1] == 4, "three units in the place of one"


def test_a_cache_full_of_recordings_records_nothing_ahead(fused):
    wanted = samples(inputs(fused.transformer, LAYOUT))
    cache = recording(fused)
    cache._graphs.max_entries = 4
    for t in range(3 * AHEAD_EVERY):
        frame(cache, wanted, some(1) if t else None)
        cache.record_ahead()
    assert cache.recordings == 4 and len(cache._graphs) == 4


def test_new_embeddings_are_heard_and_the_same_ones_cost_no_rows(fused):
    latents, conditions, embeds = inputs(fused.transformer, LAYOUT)
    cache, rows = TokenCache(fused), []
    run = fused.run
    fused.run = lambda attention, *rest: rows.append(attention.text) or run(attention, *rest)
    try:
        frame(cache, samples((latents, conditions, embeds)))
        kept = frame(cache, samples((latents, conditions, embeds)), some(1))
        heard = frame(cache, samples((latents, conditions, embeds + 1)), some(1))
    finally:
        del fused.run
    assert rows == [11, 11, 0, 0, 11, 11]
    assert (kept[0] - heard[0]).abs().max() > 1e-3


@pytest.mark.parametrize("change", ["size", "prompt's length", "steps", "times", "references", "unknown", "broken off", "weights"])
def test_whatever_else_changes_computes_everything(fused, change):
    wanted = samples(inputs(fused.transformer, LAYOUT))
    cache = TokenCache(fused)
    frame(cache, wanted)
    changed = some(1)
    if change == "size":
        layout = ((1, 4, 4), (1, 4, 4))
        wanted, changed = samples(inputs(fused.transformer, layout), layout), np.zeros((4, 4), bool)
    elif change == "prompt's length":
        wanted = samples(inputs(fused.transformer, LAYOUT, text=12))
    elif change == "steps":
        wanted = samples(inputs(fused.transformer, LAYOUT), times=(1000.0, 900.0, 500.0))
    elif change == "times":
        wanted = samples(inputs(fused.transformer, LAYOUT), times=(900.0, 600.0))
    elif change == "references":
        wanted = samples(inputs(fused.transformer, (*LAYOUT, (1, 8, 8))), (*LAYOUT, (1, 8, 8)))
    elif change == "unknown":
        changed = None
    elif change == "broken off":
        cache.begin(changed)
        cache.velocity(wanted[0], 0)
    else:
        fused.weights_changed({"transformer_blocks.0.attn.to_k"})
    exact = fused.velocity(*wanted[0])
    assert torch.equal(frame(cache, wanted, changed)[0], exact) and cache.computed.all()


def test_a_batch_is_refused_and_a_forgotten_cache_frees_its_memory(fused):
    cache = TokenCache(fused)
    with pytest.raises(EditError, match="batch of 2"):
        frame(cache, samples(inputs(fused.transformer, LAYOUT, batch=2)))
    frame(cache, samples(inputs(fused.transformer, LAYOUT)))
    assert cache.nbytes > 0
    cache.clear()
    assert cache.nbytes == 0
    frame(cache, samples(inputs(fused.transformer, LAYOUT)))
    held = weakref.ref(cache._kept[0])
    gc.disable()
    try:
        del cache
        assert held() is None and len(fused.token_caches) == 0, "freed at once, not when garbage is collected"
    finally:
        gc.enable()


def test_the_pocket_model_loses_little_where_a_quarter_of_the_picture_moves(pocket, photo):
    """A patch that wanders over a photo: the picture with reuse is near the one without, and not the last frame again."""
    still, patch = photo(256, 256, 1), photo(64, 64, 2)
    pocket.enable_fast_path()
    try:
        cache, before, worst = pocket.token_cache(), None, []
        for t in range(4):
            picture = still.copy()
            picture[96:160, 64 + 8 * t : 128 + 8 * t] = patch
            changed = np.zeros((16, 16), bool)
            changed[5:11, 3 + t // 2 : 10 + t // 2] = True
            embeds = pocket.encode_prompt("make it a pencil sketch", still)
            references = pocket.encode_references(picture, area=256 * 256)
            run = pocket.initial_noise(256, 256), references, *embeds, pocket.schedule(2, 256, 256)
            plain = pocket.decode(pocket.denoise(*run), 256, 256)[0].numpy()
            cache.begin(changed if t else None)
            reused = pocket.decode(pocket.denoise(*run, token_cache=cache), 256, 256)[0].numpy()
            if before is not None:
                assert cache.computed.mean() < 0.3
                worst.append((psnr_db(reused, plain), psnr_db(before, plain)))
            before = plain
    finally:
        pocket.disable_fast_path()
    assert all(reused > 30 and reused > last + 3 for reused, last in worst), worst

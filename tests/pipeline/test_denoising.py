"""Pictures on their way: together as alone, and guided in every mode. The embedded model in float32 on the CPU."""

import contextlib
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from engine import settings
from pipeline import vision_language
from pipeline.denoising import References
from pipeline.images import EditError
from pipeline.sampling import CFG_MODES, predicted_clean, true_cfg, virtual_velocity

# Other rows in the same matrix product: float32 rounding, amplified through the layers.
TOLERANCE = 1e-4
SIZES = [(64, 64), (96, 64), (48, 80)]
SEPIA, SUNSET = "sepia", "turn the picture into a warm sunset with long shadows please"


@pytest.fixture(scope="module")
def inputs(pocket, photo):
    """`inputs(prompt, size=0, references=1, steps=2, seed=0)`: what `start` takes, encoded once by the stock modules."""
    pictures, kept = [photo(w, h, seed=w) for w, h in SIZES], {}

    def embedded(prompt):
        if prompt not in kept:
            kept[prompt] = pocket.encode_prompt(prompt, pictures[0])[0]
        return kept[prompt]

    def make(prompt=SEPIA, size=0, references=1, steps=2, seed=0, negative=None, **options):
        width, height = SIZES[size]
        slots = [pictures[(size + i) % len(pictures)] for i in range(references)]
        encoded = pocket.encode_references(slots, area=width * height)
        noise, schedule = pocket.initial_noise(width, height, seed), pocket.schedule(steps, width, height)
        if negative is not None:
            options |= {"negative_prompt_embeds": embedded(negative), "cfg_scale": 3.0}
        return (noise, encoded, embedded(prompt), None, schedule), options

    return make


@pytest.fixture(params=[False, True], ids=["stock modules", "fast path"])
def pipe(pocket, inputs, request):
    """The pocket pipeline, without and with the fast path."""
    if request.param:
        pocket.enable_fast_path()
    yield pocket
    pocket.disable_fast_path()


@pytest.fixture
def fast(pocket, inputs):
    pocket.enable_fast_path()
    yield pocket
    pocket.disable_fast_path()


@contextlib.contextmanager
def forwards(pipe):
    """A list that gets the number of rows of each forward of the fast path."""
    fused, rows = pipe.fused_transformer, []
    run = fused.velocities

    def counting(samples):
        rows.append(sum(len(sample.latents) for sample in samples))
        return run(samples)

    fused.velocities = counting
    try:
        yield rows
    finally:
        del fused.velocities


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    return (a - b).abs().max().item()


def run(pipe, given) -> torch.Tensor:
    arguments, options = given
    return pipe.denoise(*arguments, **options)


def begin(pipe, given):
    arguments, options = given
    return pipe.start(*arguments, **options)


# --- together as alone ------------------------------------------------------------------------------------------------

CROWD: list[dict[str, Any]] = [  # unlike in everything that a picture can be unlike in
    {"steps": 3},
    {"prompt": SUNSET, "size": 1, "references": 2, "steps": 2, "seed": 1},
    {"prompt": SUNSET, "size": 2, "references": 3, "steps": 5, "seed": 2, "negative": SEPIA, "cfg_mode": "full"},
    {"size": 1, "steps": 3, "seed": 3, "negative": SUNSET, "cfg_mode": "batched"},
    {"prompt": SUNSET, "steps": 2, "seed": 4, "negative": "dark", "cfg_mode": "onetime_negative"},
    {"prompt": "dark", "steps": 1, "seed": 5, "cfg_scale": 3.0, "cfg_mode": "self_negative"},
]


def test_pictures_that_join_and_leave_at_any_step_are_each_as_if_alone(pipe, inputs):
    crowd = [inputs(**choice) for choice in CROWD]
    alone = [run(pipe, given) for given in crowd]
    under_way, done = [], {}
    for given in [*enumerate(crowd), *[None] * 8]:  # one joins at each tick, and leaves when it is finished
        if given is not None:
            under_way.append((given[0], begin(pipe, given[1])))
        pipe.advance([picture for _, picture in under_way])
        done |= {i: picture.latents for i, picture in under_way if picture.finished}
        under_way = [(i, picture) for i, picture in under_way if not picture.finished]
    assert sorted(done) == list(range(len(crowd))) and list(done) != sorted(done), "they overtook each other"
    differences = {i: largest(done[i], latents) for i, latents in enumerate(alone)}
    assert max(differences.values()) < TOLERANCE, differences


def test_a_stream_of_k_steps_gives_a_picture_a_forward_and_takes_a_new_prompt_in_mid_stream(fast, inputs):
    steps, ticks, under_way, shown = 3, 7, [], []
    given = [inputs(SEPIA if seed < 3 else SUNSET, steps=steps, seed=seed) for seed in range(ticks)]
    with forwards(fast) as rows:
        for tick in range(ticks):
            under_way.append(begin(fast, given[tick]))
            fast.advance(under_way)
            shown += [(tick, picture.latents) for picture in under_way if picture.finished]
            under_way = [picture for picture in under_way if not picture.finished]
    assert rows == [1, 2, 3, 3, 3, 3, 3]
    assert [tick for tick, _ in shown] == [2, 3, 4, 5, 6], "nothing before the first has had its steps, then one a tick"
    for i, (_, latents) in enumerate(shown):
        assert largest(latents, run(fast, given[i])) < TOLERANCE
    assert largest(shown[2][1], shown[3][1]) > 0.1


def test_batches_with_prompts_of_different_lengths_ride_along(pipe, inputs, pocket):
    (noise, references, _, _, schedule), _ = inputs(steps=2)
    prompts = [inputs(prompt)[0][2] for prompt in (SEPIA, SUNSET)]
    embeds, mask = vision_language.pad(prompts)
    assert mask is not None
    noise = torch.cat([noise, pocket.initial_noise(64, 64, 9)])
    guided = {"negative_prompt_embeds": embeds.flip(0), "negative_mask": mask.flip(0), "cfg_scale": 2.0}
    for mode in ("full", "batched"):
        batch = pipe.start(noise, references, embeds, mask, schedule, **guided, cfg_mode=mode)
        other = begin(pipe, inputs("dark", size=1, steps=2))
        for _ in range(2):
            pipe.advance([other, batch])
        assert batch.latents.shape == noise.shape
        for row in range(2):
            options = {"negative_prompt_embeds": prompts[1 - row], "cfg_scale": 2.0}
            alone = pipe.denoise(noise[row : row + 1], references, prompts[row], None, schedule, **options)
            assert largest(batch.latents[row : row + 1], alone) < TOLERANCE


def test_when_a_forward_fails_no_picture_has_moved_and_the_others_go_on(fast, inputs):
    given = [inputs(seed=1), inputs(SUNSET, seed=2)]
    good, bad = (begin(fast, g) for g in given)
    whole, bad.prompt_embeds = bad.prompt_embeds, bad.prompt_embeds[..., :-1]
    with pytest.raises(RuntimeError):
        fast.advance([good, bad])
    assert (good.step, bad.step) == (0, 0) and torch.equal(good.latents, given[0][0][0])
    fast.advance([good])
    bad.prompt_embeds = whole
    fast.advance([good, bad])
    assert good.finished and largest(good.latents, run(fast, given[0])) < TOLERANCE


def test_a_picture_that_reuses_tokens_rides_beside_the_others_in_a_forward_of_its_own(fast, inputs):
    cache = fast.token_cache()
    cache.begin(None)
    given, other = inputs(steps=1), inputs(SUNSET, size=1, steps=1)
    arguments, options = given
    pictures = [fast.start(*arguments, **options, token_cache=cache), begin(fast, other)]
    with forwards(fast) as rows:
        fast.advance(pictures)
    assert rows == [1] and cache.computed.all() and cache.computed.shape == (4, 4)
    for picture, g in zip(pictures, (given, other), strict=True):
        assert largest(picture.latents, run(fast, g)) < TOLERANCE, "a first frame of one step is exact"


def test_a_finished_picture_and_one_given_twice_are_refused(fast, inputs):
    finished, fresh = begin(fast, inputs(steps=1)), begin(fast, inputs(steps=1))
    fast.advance([finished])
    for pictures in ([fresh, finished], [fresh, fresh]):
        with pytest.raises(ValueError, match="finished or given twice"):
            fast.advance(pictures)
    assert fresh.step == 0
    fast.advance([])


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_the_settings_offer_the_modes_that_there_are():
    assert set(settings.CHOICES["cfg_mode"]) == set(CFG_MODES)


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("none", [1, 1, 1]),
        ("full", [1, 1, 1, 1, 1, 1]),
        ("batched", [2, 2, 2]),
        ("self_negative", [1, 1, 1]),
        ("onetime_negative", [2, 1, 1]),
    ],
)
def test_what_a_mode_costs(fast, inputs, mode, expected):
    with forwards(fast) as rows:
        run(fast, inputs(steps=3, negative="dark", cfg_mode=mode))
    assert rows == expected, "rows of each forward"


def test_a_full_negative_of_several_pictures_is_one_more_forward(fast, inputs):
    pictures = [begin(fast, inputs(seed=seed, negative="dark", cfg_mode="full")) for seed in range(3)]
    with forwards(fast) as rows:
        fast.advance(pictures)
    assert rows == [3, 3]


@pytest.mark.parametrize("steps", [1, 3])
def test_batched_guidance_is_full_guidance(pipe, inputs, steps):
    full, batched = (
        run(pipe, inputs(SUNSET, references=2, steps=steps, negative="dark", cfg_mode=mode))
        for mode in ("full", "batched")
    )
    assert largest(batched, full) < TOLERANCE
    assert largest(full, run(pipe, inputs(SUNSET, references=2, steps=steps))) > 0.1, "guidance does something"


@pytest.mark.parametrize("mode", [mode for mode in CFG_MODES if mode != "none"])
def test_without_scale_or_negative_there_is_no_guidance(fast, inputs, mode):
    plain = run(fast, inputs())
    arguments, options = inputs(negative="dark", cfg_mode=mode)
    assert torch.equal(fast.denoise(*arguments, **options | {"cfg_scale": 1.0}), plain)
    without = fast.denoise(*arguments, **options | {"negative_prompt_embeds": None})
    assert torch.equal(without, plain) == (mode != "self_negative"), "which alone needs no negative prompt"
    assert torch.equal(run(fast, inputs(negative="dark", cfg_mode="none")), plain)


def test_a_onetime_negative_is_full_guidance_at_the_first_step_and_goes_on_without_a_forward(pipe, inputs):
    one_step = [run(pipe, inputs(steps=1, negative="dark", cfg_mode=mode)) for mode in ("full", "onetime_negative")]
    assert largest(*one_step) < TOLERANCE
    full, once = (begin(pipe, inputs(steps=3, negative="dark", cfg_mode=mode)) for mode in ("full", "onetime_negative"))
    pipe.advance([full, once])
    assert largest(full.latents, once.latents) < TOLERANCE
    pipe.advance([full, once])
    assert largest(full.latents, once.latents) > 10 * TOLERANCE, "from here on the negative is what it was"


def guided_clean(latents, velocity, sigma, clean, scale, delta) -> torch.Tensor:
    """The clean picture of one residual step in float64, by the paper's noise instead of velocities; before the rescale."""
    x, v, s = latents.double(), velocity.double(), float(sigma)
    noise = (x - (1 - s) * clean.double()) / s  # the virtual one, which speaks of `clean`
    negative = delta * (noise - clean.double())
    return x - s * (negative + scale * (v - negative))


@pytest.mark.parametrize("delta", [1.0, 0.4])
@pytest.mark.parametrize("mode", ["self_negative", "onetime_negative"])
def test_residual_guidance_is_the_papers_formula(pipe, inputs, mode, delta):
    steps, scale = 3, 3.0
    arguments, options = inputs(SUNSET, steps=steps, negative="dark", cfg_mode=mode, cfg_delta=delta)
    noise, references, embeds, _, schedule = arguments
    got = run(pipe, (arguments, options))

    def velocity(latents, prompt, i):
        one = pipe.start(latents, references, prompt, None, schedule)
        one.step = i
        pipe.advance([one])
        return (one.latents - latents) / (schedule.sigmas[i + 1] - schedule.sigmas[i])

    latents, clean = noise, references.latents
    if mode == "onetime_negative":
        clean = noise.double() - float(schedule.sigmas[0]) * velocity(noise, options["negative_prompt_embeds"], 0)
    for i in range(steps):
        sigma, next_sigma = (float(s) for s in schedule.sigmas[i : i + 2])
        positive = velocity(latents, embeds, i).double()
        x0 = guided_clean(latents, positive, sigma, clean, scale, delta)
        guided = (latents.double() - x0) / sigma
        guided *= positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        latents = (latents.double() + (next_sigma - sigma) * guided).float()
    assert largest(got, latents) < 10 * TOLERANCE, "velocities were taken back out of float32 steps here"
    assert largest(got, run(pipe, inputs(SUNSET, steps=steps))) > 0.1


def test_residual_guidance_leads_the_clean_picture_away_from_the_known_one():
    generator = torch.Generator().manual_seed(0)
    latents, velocity, clean = (torch.randn(1, 5, 8, generator=generator) for _ in range(3))
    for sigma in map(torch.tensor, (1.0, 0.75, 0.1)):
        virtual = virtual_velocity(latents, clean, sigma)
        assert torch.allclose(predicted_clean(latents, virtual, sigma), clean, atol=1e-5), "it speaks of that picture"
        guided = predicted_clean(latents, virtual + 3.0 * (velocity - virtual), sigma)
        expected = clean + 3.0 * (predicted_clean(latents, velocity, sigma) - clean)
        assert torch.allclose(guided, expected, atol=1e-4)
        for scale in (1.5, 7.0):
            assert torch.allclose(true_cfg(velocity, 0.0 * virtual, scale), velocity, atol=1e-5), "delta 0: none"


@pytest.mark.parametrize("mode", ["self_negative", "onetime_negative"])
def test_delta_goes_from_no_guidance_to_all_of_it(fast, inputs, mode):
    plain = run(fast, inputs())
    deltas = (0.0, 0.1, 0.5, 1.0)
    far = [(run(fast, inputs(negative="dark", cfg_mode=mode, cfg_delta=d)) - plain).norm().item() for d in deltas]
    assert far[0] < TOLERANCE and far == sorted(far), far


def test_self_negative_takes_the_first_of_several_references(fast, inputs):
    arguments, options = inputs(SUNSET, references=2, cfg_scale=3.0, cfg_mode="self_negative")
    references = arguments[1]
    picture = begin(fast, (arguments, options))
    tokens = references.shapes[0][1] * references.shapes[0][2]
    assert references.latents.shape[1] > tokens and torch.equal(picture.negative_clean, references.latents[:, :tokens])


def test_half_precision_stays_half(pocket_copy, photo):
    pipe = pocket_copy(torch.bfloat16)
    embeds, mask = pipe.encode_prompt(SEPIA, photo(64, 64))
    references = pipe.encode_references(photo(64, 64), area=64 * 64)
    arguments = (pipe.initial_noise(64, 64), references, embeds, mask, pipe.schedule(2, 64, 64))
    for mode in CFG_MODES:
        options = {"negative_prompt_embeds": embeds.flip(1), "cfg_scale": 3.0, "cfg_mode": mode}
        latents = pipe.denoise(*arguments, **options)
        assert latents.dtype == torch.bfloat16 and latents.isfinite().all(), mode


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, says",
    [
        ({"cfg_mode": "half"}, "The cfg_mode is 'half'. Allowed: full, none, batched, self_negative, onetime_negative"),
        ({"cfg_delta": -0.1}, "The cfg_delta is -0.1. Allowed: 0 to 2"),
        ({"cfg_delta": 2.5}, "The cfg_delta is 2.5"),
        ({"cfg_delta": float("nan")}, "The cfg_delta is nan"),
        ({"negative": "dark", "token_cache": object()}, 'cannot be reused with guidance (cfg_mode "full")'),
    ],
)
def test_errors_say_what_came_and_what_is_allowed(pocket, inputs, change, says):
    with pytest.raises(EditError) as error:
        begin(pocket, inputs(**change))
    assert says in str(error.value)


def test_tokens_are_reused_for_one_picture_on_the_fast_path_only(pocket, inputs):
    (noise, *others), _ = inputs()
    with pytest.raises(EditError, match="one picture at a time; 2 were given"):
        pocket.start(noise.expand(2, -1, -1), *others, token_cache=object())
    with pytest.raises(EditError, match="fast path only"):
        pocket.token_cache()


def test_self_negative_refuses_a_reference_that_lies_otherwise(pocket, inputs):
    (noise, references, *others), _ = inputs()
    turned = References(references.latents, ((1, 2, 8),))
    with pytest.raises(EditError, match=r"2x8 tokens, the output 4x4.*onetime_negative"):
        pocket.start(noise, turned, *others, cfg_scale=3.0, cfg_mode="self_negative")
    pocket.start(noise, turned, *others, cfg_scale=1.0, cfg_mode="self_negative")


@pytest.mark.parametrize("mode", ["self_negative", "onetime_negative"])
def test_residual_guidance_refuses_an_inverted_schedule(pocket, inputs, mode):
    given, former = inputs(negative="dark", cfg_mode=mode), pocket.scheduler
    pocket.scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(former.config) | {"invert_sigmas": True})
    try:
        with pytest.raises(EditError, match="inverts"):
            begin(pocket, given)
    finally:
        pocket.scheduler = former

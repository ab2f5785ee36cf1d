"""The pipeline on the embedded model in float32 on the CPU: against stock diffusers, its caches, batches and errors."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock_module
from PIL import Image

import cached_pipeline
from cached_pipeline import load_pipeline
from pipeline import vision_language
from pipeline.content_cache import ContentCache
from pipeline.images import EditError, Pictures, encode_png
from pipeline.sampling import LIGHTNING_SCHEDULER, lightning_scheduler, noise_levels, true_cfg

# Stock runs the same operations in another grouping (a vision call for all pictures, a mask of ones, 3-D convolutions):
# what differs is float32 rounding, seen up to 2e-6 on pictures in [0, 1]. Other processors round otherwise: four times that.
STOCK_TOLERANCE = 8e-6
BASE_SCHEDULER = LIGHTNING_SCHEDULER | {"base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}
PROMPT = "turn it into a pencil sketch"
# A batch multiplies other shapes, so other kernels round differently: float32 noise, amplified through the layers.
BATCH_TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def fresh(pocket):
    """Every test begins with empty caches, on the stock modules, and leaves the shared pipeline as it was."""
    components = dict(pocket.components)
    pocket.clear_caches()
    yield
    pocket.register_modules(**components)
    pocket.caches_enabled = True
    pocket.disable_fast_path()


@contextlib.contextmanager
def stock_with_positions(pocket):
    """Stock diffusers on the same modules, its text encoder told which tokens are pictures."""
    stock = QwenImageEditPlusPipeline(**pocket.components)
    stock.set_progress_bar_config(disable=True)
    encoder, forward = pocket.text_encoder, pocket.text_encoder.forward

    def told(input_ids, **kwargs):
        pictures = (input_ids == encoder.config.image_token_id).int()
        return forward(input_ids=input_ids, mm_token_type_ids=pictures, **kwargs)

    encoder.forward = told
    try:
        yield stock
    finally:
        del encoder.forward


@contextlib.contextmanager
def counted(**runs):
    """Counts the calls of the named (object, method)s."""
    counts = dict.fromkeys(runs, 0)

    def counting(name, method):
        def run(*args, **kwargs):
            counts[name] += 1
            return method(*args, **kwargs)

        return run

    for name, (owner, method) in runs.items():
        setattr(owner, method, counting(name, getattr(owner, method)))
    try:
        yield counts
    finally:
        for owner, method in runs.values():
            delattr(owner, method)


def encoders(pipe):
    """What runs the vision tower, the language model and the VAE's encoder, on the stock path or the fast one."""
    if pipe.fused_text_encoder is not None:
        fused = pipe.fused_text_encoder
        return {"vision": (fused, "encode_image"), "language": (fused, "encode_text"), "vae": (pipe.single_frame_vae, "encode_picture")}
    model = pipe.text_encoder.model
    return {
        "vision": (model.visual, "forward"),
        "language": (model.language_model, "forward"),
        "vae": (pipe.vae.encoder, "forward"),
    }


def edit(pipe, image, prompt=PROMPT, **kwargs):
    """A small edit: 64x64, one step, reference at the output's area; a float tensor (B, 3, H, W)."""
    settings = {"width": 64, "height": 64, "num_inference_steps": 1, "reference_area": "output", "true_cfg_scale": 1.0}
    settings |= {"generator": torch.Generator().manual_seed(0), "output_type": "pt"} | kwargs
    return pipe(image=image, prompt=prompt, **settings).images


def largest(a, b):
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


# --- the stock result -------------------------------------------------------------------------------------------------


def against_stock(pocket, images, **kwargs):
    """Final latents and picture of one stock run and one of ours, from the same seed."""
    settings = {"prompt": PROMPT, "true_cfg_scale": 1.0, "width": 64, "height": 64, "output_type": "np"} | kwargs
    latents = {}

    def run(pipe):
        def keep(pipe, step, timestep, tensors):
            latents[type(pipe)] = tensors["latents"]
            return {}

        torch.manual_seed(11)  # what a stochastic scheduler draws from
        return pipe(
            image=images, generator=torch.Generator().manual_seed(7), callback_on_step_end=keep, **settings
        ).images

    with stock_with_positions(pocket) as stock:
        theirs = run(stock)
    ours = run(pocket)
    assert ours.shape == theirs.shape and theirs.std() > 0.01, "the comparison must be of something"
    differences = {"picture": largest(ours, theirs), "latents": largest(*latents.values())}
    assert max(differences.values()) < STOCK_TOLERANCE, differences


@pytest.fixture
def small_area(monkeypatch):
    """Stock's megapixel for references is slow on a CPU; the constant is read by both sides."""
    monkeypatch.setattr(stock_module, "VAE_IMAGE_SIZE", 64 * 64)


@pytest.mark.endurance  # a quarter of a minute: the suite has the same at a smaller area
def test_same_as_stock_at_stock_reference_area(pocket, photo):
    against_stock(pocket, Image.fromarray(photo(300, 240)), num_inference_steps=1, width=128, height=128)


def test_a_reference_has_stocks_area_unless_another_is_asked_for(pocket, photo, monkeypatch):
    monkeypatch.setattr(pocket, "_encode_pictures", lambda pictures, width, height: torch.zeros(1, width * height // 256, 64))
    found = pocket.encode_references(Image.fromarray(photo(300, 240))).shapes
    assert found == ((1, 58, 72),), "about a megapixel, in tokens of 16 pixels"


@pytest.mark.parametrize(
    "references, kwargs",
    [
        ([(200, 150)], {"num_inference_steps": 4}),
        ([(200, 150), (96, 160)], {"num_inference_steps": 2, "width": 96}),
        ([(64, 64), (90, 60), (60, 90)], {"num_inference_steps": 2}),
        ([(200, 150)], {"num_inference_steps": 2, "true_cfg_scale": 4.0, "negative_prompt": " "}),
        ([(128, 128)], {"num_inference_steps": 2, "sigmas": [1.0, 0.4]}),
    ],
)
def test_same_as_stock_at_a_smaller_area(pocket, photo, small_area, references, kwargs):
    against_stock(pocket, [Image.fromarray(photo(w, h, seed=w)) for w, h in references], **kwargs)


def test_same_as_stock_with_the_base_scheduler(pocket, photo, small_area):
    pocket.scheduler = FlowMatchEulerDiscreteScheduler.from_config(BASE_SCHEDULER)
    against_stock(pocket, Image.fromarray(photo(128, 128)), num_inference_steps=4)


def test_same_as_stock_with_a_stochastic_scheduler(pocket, photo, small_area):
    changes = {"stochastic_sampling": True}
    pocket.scheduler = FlowMatchEulerDiscreteScheduler.from_config(LIGHTNING_SCHEDULER | changes)
    against_stock(pocket, Image.fromarray(photo(128, 128)), num_inference_steps=3)


def test_same_as_stock_on_the_fast_path(pocket, photo, small_area):
    pocket.enable_fast_path()
    against_stock(pocket, Image.fromarray(photo(128, 128)), num_inference_steps=2)


def test_same_as_stock_for_2511_references_at_time_zero(pocket, photo, small_area):
    image = Image.fromarray(photo(128, 128))
    plain = edit(pocket, image)
    transformer = QwenImageTransformer2DModel.from_config(dict(pocket.transformer.config) | {"zero_cond_t": True})
    transformer.load_state_dict(pocket.transformer.state_dict())
    pocket.transformer = transformer.eval()
    against_stock(pocket, image, num_inference_steps=2)
    batch = edit(pocket, image, [PROMPT, PROMPT])
    assert largest(batch[0], plain[0]) > 1e-3, "zero_cond_t changed nothing"
    assert largest(batch[0], edit(pocket, image)[0]) < STOCK_TOLERANCE


def test_several_pictures_per_prompt_are_rows_of_one_draw(pocket, photo):
    image = photo(64, 64)
    rows = edit(pocket, image, num_images_per_prompt=2)
    latents = pocket.initial_noise(64, 64, 0, batch=2)
    for row in range(2):
        alone = edit(pocket, image, latents=latents[row : row + 1])
        assert largest(rows[row], alone[0]) < BATCH_TOLERANCE


def test_stock_output_types(pocket, photo, small_area):
    image = photo(64, 64)
    floats = edit(pocket, image, output_type="np")
    assert floats.shape == (1, 64, 64, 3) and floats.dtype == np.float32
    expected = (floats * 255).round().astype(np.uint8)
    (pil,) = edit(pocket, image, output_type="pil")
    assert np.array_equal(np.asarray(pil), expected[0])
    exact = edit(pocket, image, output_type="uint8")
    assert exact.dtype == torch.uint8 and np.array_equal(exact.numpy(), expected)
    assert edit(pocket, image, output_type="latent").shape == (1, 16, 64)
    (listed,) = pocket(image=image, prompt=PROMPT, width=64, height=64, num_inference_steps=1, return_dict=False)
    assert listed[0].size == (64, 64)


def test_stock_callback_sees_and_replaces_latents(pocket, photo):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, round(float(timestep)), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = edit(
        pocket, photo(64, 64), num_inference_steps=2, output_type="latent", callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )  # fmt: skip
    assert seen == [(0, 1000, ["latents", "prompt_embeds"]), (1, 750, ["latents", "prompt_embeds"])]
    assert not latents.any()


# --- what the vision-language model is fed ------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[(256, 256)], [(300, 200), (111, 333)]])
def test_inputs_are_those_of_the_transformers_processor(pocket, photo, sizes):
    pictures = [photo(w, h, seed=w) for w, h in sizes]
    condition = []
    for (w, h), picture in zip(sizes, pictures, strict=True):
        width, height = stock_module.calculate_dimensions(stock_module.CONDITION_IMAGE_SIZE, w / h)
        condition.append(pocket.image_processor.resize(Image.fromarray(picture), height, width))
    text = pocket.prompt_template_encode.format(vision_language.announce_pictures(len(sizes)) + PROMPT)
    theirs = pocket.processor(text=[text], images=condition, padding=True, return_tensors="pt")

    processor = pocket.processor.image_processor
    ours = [vision_language.pixel_values(torch.from_numpy(np.array(c))[None], processor) for c in condition]
    assert [[1, *grid] for _, grid in ours] == theirs["image_grid_thw"].tolist()
    assert largest(torch.cat([values for values, _ in ours]), theirs["pixel_values"]) < 1e-4

    grids = tuple((r // processor.merge_size, c // processor.merge_size) for _, (r, c) in ours)
    ids, positions, places = pocket._tokenise(PROMPT, grids)
    assert ids.tolist() == theirs["input_ids"].tolist()
    is_picture = torch.zeros(ids.shape[1], dtype=torch.int64)
    for start, stop in places:
        is_picture[start:stop] = 1
    assert is_picture.tolist() == theirs["mm_token_type_ids"][0].tolist()
    expected, _ = pocket.text_encoder.model.get_rope_index(
        theirs["input_ids"], theirs["mm_token_type_ids"], image_grid_thw=theirs["image_grid_thw"]
    )
    assert torch.equal(positions, expected)


def test_the_system_prompt_is_64_tokens_and_dropped(pocket, photo):
    embeds, mask = pocket.encode_prompt(PROMPT, photo(256, 256))
    text = pocket.prompt_template_encode.format(vision_language.announce_pictures(1) + PROMPT)
    vision_tokens = 36  # 384x384 in patches of 32, merged 2x2
    assert embeds.shape[:2] == (1, len(pocket.tokenizer(text)["input_ids"]) - 1 + vision_tokens - 64)
    assert mask is None


def test_stock_alone_reads_the_picture_as_text(pocket, photo):
    """Why positions are computed here: without them the embeddings are others, and nothing says so."""
    condition = [pocket.image_processor.resize(Image.fromarray(photo(256, 256)), 384, 384)]
    alone, _ = QwenImageEditPlusPipeline(**pocket.components).encode_prompt(PROMPT, condition)
    with stock_with_positions(pocket) as stock:
        told, _ = stock.encode_prompt(PROMPT, condition)
    ours, _ = pocket.encode_prompt(PROMPT, condition)
    assert largest(ours, told.detach()) < STOCK_TOLERANCE
    assert largest(ours, alone.detach()) > 1e-2


def test_the_vocabulary_head_never_runs(pocket, photo):
    with counted(head=(pocket.text_encoder.lm_head, "forward")) as counts:
        edit(pocket, photo(64, 64))
    assert counts == {"head": 0}


# --- schedule -----------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "lightning": {},
    "base": BASE_SCHEDULER,
    "static shift": {"use_dynamic_shifting": False, "shift": 3.0},
    "static shift, terminal": {"use_dynamic_shifting": False, "shift": 3.0, "shift_terminal": 0.1},
    "linear": {"time_shift_type": "linear"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "inverted": {"invert_sigmas": True},
    "base, karras": BASE_SCHEDULER | {"use_karras_sigmas": True},
}


def stock_schedule(scheduler, steps, tokens):
    config = scheduler.config
    mu = stock_module.calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    with np.errstate(all="ignore"):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu, device="cpu")
    return scheduler.sigmas, scheduler.timesteps


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedule_is_stocks_where_stock_is_finite_and_always_finite(pocket, name):
    if name == "beta":
        pytest.importorskip("scipy")
    pocket.scheduler = FlowMatchEulerDiscreteScheduler.from_config(LIGHTNING_SCHEDULER | SCHEDULERS[name])
    compared = 0
    for steps in (1, 2, 3, 4, 8, 28, 50):
        ours = pocket.schedule(steps, 512, 256)
        assert ours.sigmas.shape == (steps + 1,) and ours.timesteps.shape == (steps,)
        assert ours.sigmas.isfinite().all() and ours.timesteps.isfinite().all(), (steps, ours.sigmas)
        sigmas, timesteps = stock_schedule(pocket.scheduler, steps, 32 * 16)
        if sigmas.isfinite().all():
            assert torch.equal(ours.sigmas, sigmas) and torch.equal(ours.timesteps, timesteps), (steps, ours, sigmas)
            compared += 1
    assert compared >= 6


def test_one_step_is_nan_in_stock_and_one_here(pocket):
    """0/0 in `stretch_shift_to_terminal`: the only level of one step is 1, and 1 - 1 is what it divides by."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(BASE_SCHEDULER)
    stock_sigmas, _ = stock_schedule(scheduler, 1, 256)
    assert stock_sigmas[0].isnan() and stock_sigmas[1] == 0
    pocket.scheduler = scheduler
    assert pocket.schedule(1, 256, 256).sigmas.tolist() == [1.0, 0.0]


def test_one_step_with_the_base_scheduler_gives_a_picture(pocket, photo):
    pocket.scheduler = FlowMatchEulerDiscreteScheduler.from_config(BASE_SCHEDULER)
    picture = edit(pocket, photo(64, 64), num_inference_steps=1)
    assert picture.isfinite().all() and picture.std() > 0.01


@pytest.mark.parametrize("steps, expected", [(1, [1, 0]), (2, [1, 0.75, 0]), (4, [1, 0.9, 0.75, 0.5, 0])])
def test_lightning_schedule(steps, expected):
    for tokens in (64, 256, 1024, 4096):
        sigmas, _ = noise_levels(lightning_scheduler(), np.linspace(1.0, 1 / steps, steps), tokens)
        assert sigmas.tolist() == pytest.approx(expected, abs=1e-6)


def test_schedule_of_own_sigmas(pocket):
    assert pocket.schedule(9, 256, 256, sigmas=[1.0]).sigmas.tolist() == [1.0, 0.0]
    assert len(pocket.schedule(9, 256, 256, sigmas=[1.0, 0.5, 0.25]).timesteps) == 3


# --- caches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True])
def test_a_second_call_does_no_encoder_work_and_gives_the_identical_picture(pocket, photo, fast):
    if fast:
        pocket.enable_fast_path()
    image = photo(200, 150)
    with counted(**encoders(pocket)) as counts:
        first = edit(pocket, image, num_inference_steps=2)
        assert counts == {"vision": 1, "language": 1, "vae": 1}
        second = edit(pocket, Image.fromarray(image.copy()), num_inference_steps=2)
        assert counts == {"vision": 1, "language": 1, "vae": 1}
    assert torch.equal(first, second)


def test_what_changes_the_result_is_in_the_key(pocket, photo):
    image, other = photo(96, 64), photo(96, 64)
    other[5, 5, 1] ^= 1
    with counted(**encoders(pocket)) as counts:

        def work(*args, **kwargs):
            before = dict(counts)
            edit(pocket, *args, **{"width": 96} | kwargs)
            return {name for name in counts if counts[name] != before[name]}

        assert work(image) == {"vision", "language", "vae"}
        assert work(image) == set()
        assert work(other) == {"vision", "language", "vae"}, "one bit of one pixel"
        assert work(image, "another prompt") == {"language"}
        assert work(image, reference_area=128 * 128) == {"vae"}
        assert work(image, width=64) == {"vae"}, "another output size"
        assert work(image, width=64) == set()
        assert work(image, width=None, reference_area=128 * 128) == set(), "the same area"
        assert work(image, num_inference_steps=2) == set()
        assert work(image, negative_prompt="blurred", true_cfg_scale=2.0) == {"language"}
        assert work([image, other]) == {"language"}, "both pictures are known, this pair is not"
        assert work([other, image]) == {"language"}, "order counts"
        assert work(image.reshape(96, 64, 3)) == {"vision", "language", "vae"}, "same bytes, another shape"
        pocket.vae = copy.deepcopy(pocket.vae)
        handle = pocket.vae.encoder.register_forward_hook(lambda *_: counts.__setitem__("vae", counts["vae"] + 1))
        assert work(image) == {"vae"}, "another VAE"
        handle.remove()


@pytest.mark.parametrize("name", ["prompt_tokens", "picture_features", "prompt_embeds", "reference_latents"])
def test_each_cache_off_on_off_is_exact(pocket, photo, name):
    images = [photo(96, 64), photo(64, 96, seed=1)]
    kwargs = {"negative_prompt": "", "true_cfg_scale": 2.0}
    others = {other: cache for other, cache in pocket._caches.items() if other != name}
    pocket.caches_enabled = False
    off = edit(pocket, images, **kwargs)
    assert all(s == {"entries": 0, "bytes": 0, "hits": 0, "misses": 0} for s in pocket.cache_summary().values())
    pocket.caches_enabled = True
    results = []
    for _ in range(3):
        for other in others.values():
            other.clear()
        results.append(edit(pocket, images, **kwargs))
    assert pocket.cache_summary()[name]["hits"] > 0
    pocket.caches_enabled = False
    results.append(edit(pocket, images, **kwargs))
    assert all(torch.equal(off, result) for result in results)


def test_cache_summary_counts_and_bytes(pocket, photo):
    image = photo(64, 64)
    edit(pocket, image)
    summary = pocket.cache_summary()
    assert {name: (s["entries"], s["hits"], s["misses"]) for name, s in summary.items()} == {
        "prompt_tokens": (1, 0, 1), "picture_features": (1, 0, 1), "prompt_embeds": (1, 0, 1),
        "reference_latents": (1, 0, 1),
    }  # fmt: skip
    assert summary["reference_latents"]["bytes"] == 16 * 64 * 4, "16 tokens of 64 float32 numbers"
    edit(pocket, image)
    assert [s["hits"] for s in pocket.cache_summary().values()] == [0, 0, 1, 1], "the prompt's embedding answers first"
    pocket.clear_caches()
    assert not any(v for s in pocket.cache_summary().values() for v in s.values())


def test_the_cache_is_bounded_and_drops_the_least_recently_used():
    cache = ContentCache(2)
    for key in "abac":
        cache.get(key, lambda: (torch.zeros(4), 7))
    assert cache.summary() == {"entries": 2, "bytes": 32, "hits": 1, "misses": 3}
    cache.get("a", lambda: pytest.fail("a was used more recently than b"))
    cache.get("b", lambda: torch.zeros(1))
    assert cache.summary()["bytes"] == 16 + 4


def test_a_failed_computation_is_not_cached():
    cache = ContentCache(2)
    with pytest.raises(ZeroDivisionError):
        cache.get("key", lambda: 1 / 0)
    assert cache.get("key", lambda: 5) == 5 and cache.summary()["entries"] == 1


def test_constants_are_computed_once(pocket):
    assert pocket.schedule(2, 64, 64) is pocket.schedule(2, 64, 64)
    assert pocket.schedule(2, 64, 64) is not pocket.schedule(2, 64, 96)
    assert pocket.initial_noise(64, 64, 3) is pocket.initial_noise(64, 64, 3)


# --- noise and seeds ----------------------------------------------------------------------------------------------------


def test_a_seed_decides_the_picture(pocket, photo):
    image = photo(64, 64)
    steps = pocket.schedule(1, 64, 64)
    embeds, mask = pocket.encode_prompt(PROMPT, image)
    references = pocket.encode_references(image, area="output", width=64, height=64)

    def picture(seed):
        pocket.clear_caches()
        latents = pocket.denoise(pocket.initial_noise(64, 64, seed), references, embeds, mask, steps)
        return pocket.decode(latents, 64, 64)

    assert torch.equal(picture(5), picture(5))
    assert not torch.equal(picture(5), picture(6))


def test_noise_is_stocks(pocket):
    for seeds in (3, [3, 4]):
        batch = 2 if isinstance(seeds, list) else 1
        generators = [torch.Generator().manual_seed(s) for s in (seeds if isinstance(seeds, list) else [seeds])]
        theirs, _ = pocket.prepare_latents(
            None, batch, 16, 64, 96, torch.float32, "cpu", generators if batch > 1 else generators[0]
        )
        assert torch.equal(pocket.initial_noise(96, 64, seeds, batch), theirs)


# --- batches ------------------------------------------------------------------------------------------------------------


def test_a_batch_of_equal_lengths_needs_no_mask(pocket, photo):
    image, prompts = photo(64, 64), ["mirror it", "flip it"]
    lengths = {pocket.encode_prompt(p, image)[0].shape[1] for p in prompts}
    prompts = prompts if len(lengths) == 1 else ["mirror it", "it mirror"]
    embeds, mask = pocket.encode_prompt(prompts, image)
    assert embeds.shape[0] == 2 and mask is None
    batch = edit(pocket, image, prompts, generator=[torch.Generator().manual_seed(s) for s in (1, 2)])
    for row, (prompt, seed) in enumerate(zip(prompts, (1, 2), strict=True)):
        alone = edit(pocket, image, prompt, generator=torch.Generator().manual_seed(seed))
        assert largest(batch[row], alone[0]) < BATCH_TOLERANCE


def test_a_batch_of_different_lengths_is_padded_and_masked(pocket, photo):
    image, prompts = photo(64, 64), ["sepia", "turn the picture into a warm sunset with long shadows please"]
    embeds, mask = pocket.encode_prompt(prompts, image)
    lengths = [pocket.encode_prompt(p, image)[0].shape[1] for p in prompts]
    assert mask.sum(dim=1).tolist() == lengths and embeds.shape[1] == max(lengths)
    assert not embeds[0, lengths[0] :].any()
    batch = edit(pocket, image, prompts, generator=[torch.Generator().manual_seed(s) for s in (1, 2)])
    for row, (prompt, seed) in enumerate(zip(prompts, (1, 2), strict=True)):
        alone = edit(pocket, image, prompt, generator=torch.Generator().manual_seed(seed))
        assert largest(batch[row], alone[0]) < BATCH_TOLERANCE


def test_a_batch_of_pictures_and_a_shared_one(pocket, photo):
    pictures, shared = [photo(64, 64, seed=s) for s in (1, 2)], photo(48, 80)
    seeds = [torch.Generator().manual_seed(s) for s in (1, 2)]
    batch = edit(pocket, [pictures, shared], generator=seeds)
    assert batch.shape == (2, 3, 64, 64)
    for row in range(2):
        alone = edit(pocket, [pictures[row], shared], generator=torch.Generator().manual_seed(row + 1))
        assert largest(batch[row], alone[0]) < BATCH_TOLERANCE
    stacked = torch.from_numpy(np.stack(pictures))
    seeds = [torch.Generator().manual_seed(s) for s in (1, 2)]
    assert torch.equal(edit(pocket, [stacked, shared], [PROMPT, PROMPT], generator=seeds), batch)


def test_a_guided_batch_with_one_negative_prompt(pocket, photo):
    image, kwargs = photo(64, 64), {"negative_prompt": "blurred and dark", "true_cfg_scale": 3.0}
    seeds = [torch.Generator().manual_seed(s) for s in (1, 2)]
    batch = edit(pocket, image, ["sepia", "a watercolour painting"], generator=seeds, **kwargs)
    alone = edit(pocket, image, "a watercolour painting", generator=torch.Generator().manual_seed(2), **kwargs)
    assert largest(batch[1], alone[0]) < BATCH_TOLERANCE
    seeds = [torch.Generator().manual_seed(s) for s in (1, 1, 2, 2)]
    doubled = edit(
        pocket,
        [[image, image]],
        ["sepia", "a watercolour painting"],
        generator=seeds,
        num_images_per_prompt=2,
        **kwargs,
    )
    assert largest(doubled[3], alone[0]) < BATCH_TOLERANCE


def test_guidance_keeps_the_length_of_the_prediction_and_zeros_stay_finite():
    positive, negative = torch.randn(1, 5, 64), torch.randn(1, 5, 64)
    guided = true_cfg(positive, negative, 4.0)
    assert torch.allclose(guided.norm(dim=-1), positive.norm(dim=-1), rtol=1e-5)
    direction = negative + 4.0 * (positive - negative)
    assert torch.allclose(torch.nn.functional.cosine_similarity(guided, direction, dim=-1), torch.ones(1, 5))
    assert not true_cfg(torch.zeros(1, 5, 64), torch.zeros(1, 5, 64), 4.0).any()


# --- references ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_picture_gives_the_same_result(pocket, photo):
    image = photo(64, 64)
    tensor = torch.from_numpy(image)
    expected = edit(pocket, image)
    floats = tensor.permute(2, 0, 1).float() / 255
    kinds = [Image.fromarray(image), encode_png(image), tensor, tensor[None], floats, floats[None], floats.double()]
    for kind in [*kinds, [image], [[image]], (image,), Pictures.open(image)]:
        assert torch.equal(edit(pocket, kind), expected), type(kind)
    read_only = image.copy()
    read_only.flags.writeable = False
    assert torch.equal(edit(pocket, read_only), expected)


def test_a_reference_of_the_outputs_size_or_area_is_not_resized(pocket, photo, monkeypatch):
    asked = []
    monkeypatch.setattr(cached_pipeline, "resample", lambda p, w, h, m: asked.append((w, h)) or p)
    pocket.encode_references(photo(80, 48), area="output", width=80, height=48)
    pocket.encode_references(photo(80, 48, seed=1), area=48 * 80)
    pocket.encode_references(photo(79, 47), area="output", width=79, height=47)
    pocket.encode_references([photo(79, 47), photo(61, 61)], area="output", width=79, height=47)
    assert asked == [(80, 48), (80, 48), (79, 47), (61, 61)]


def test_the_first_reference_lies_on_the_outputs_grid_and_the_others_keep_their_shape(pocket, photo):
    pictures = [photo(100, 67), photo(200, 100), photo(30, 90)]
    references = pocket.encode_references(pictures, area="output", width=76, height=53)
    assert references.shapes == ((1, 4, 5), (1, 3, 6), (1, 7, 3)), "4028 pixels each: 76x53, 90x45, 37x110"
    assert references.latents.shape == (1, 20 + 18 + 21, 64)


def test_references_keep_their_shape_at_an_area_of_ones_own(pocket, photo):
    references = pocket.encode_references([photo(64, 64), photo(200, 100)], area=64 * 64)
    assert references.shapes == ((1, 4, 4), (1, 3, 6)), "64x64, 91x46"
    assert references.latents.shape == (1, 16 + 18, 64)


# --- the steps ----------------------------------------------------------------------------------------------------------


def test_the_steps_give_what_the_call_gives(pocket, photo):
    image = photo(64, 64)
    embeds, mask = pocket.encode_prompt(PROMPT, image)
    references = pocket.encode_references(image, area="output", width=96, height=64)
    schedule = pocket.schedule(2, 96, 64)
    latents = pocket.denoise(pocket.initial_noise(96, 64, 0), references, embeds, mask, schedule)
    picture = pocket.decode(latents, 96, 64)
    assert picture.shape == (1, 64, 96, 3) and picture.dtype == torch.uint8
    assert torch.equal(picture, edit(pocket, image, width=96, num_inference_steps=2, output_type="uint8"))


def test_on_step_is_called_before_each_step_and_may_stop(pocket, photo):
    image, seen = photo(64, 64), []
    embeds, mask = pocket.encode_prompt(PROMPT, image)
    references = pocket.encode_references(image, area=64 * 64)
    arguments = (pocket.initial_noise(64, 64), references, embeds, mask, pocket.schedule(3, 64, 64))
    pocket.denoise(*arguments, on_step=lambda i, n: seen.append((i, n)))
    assert seen == [(0, 3), (1, 3), (2, 3)]

    def stop(i, n):
        if i == 1:
            raise InterruptedError

    with counted(transformer=(pocket.transformer, "forward")) as counts, pytest.raises(InterruptedError):
        pocket.denoise(*arguments, on_step=stop)
    assert counts == {"transformer": 1}


def test_stocks_interrupt_stops_the_call_and_not_the_next(pocket, photo):
    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return {}

    with counted(transformer=(pocket.transformer, "forward")) as counts:
        edit(pocket, photo(64, 64), num_inference_steps=3, callback_on_step_end=interrupt)
        assert counts == {"transformer": 1}
        edit(pocket, photo(64, 64), num_inference_steps=3)
        assert counts == {"transformer": 4}


def test_embeddings_may_be_given_in_place_of_prompts(pocket, photo):
    image = photo(64, 64)
    embeds, _ = pocket.encode_prompt(PROMPT, image)
    negative, _ = pocket.encode_prompt("", image)
    given = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative, "true_cfg_scale": 2.0}
    expected = edit(pocket, image, negative_prompt="", true_cfg_scale=2.0)
    assert torch.equal(edit(pocket, image, **given), expected)
    assert torch.equal(edit(pocket, image, **given, prompt_embeds_mask=torch.ones(1, embeds.shape[1])), expected)


def test_steps_leave_their_inputs_alone(pocket, photo):
    image = photo(64, 64)
    embeds, mask = pocket.encode_prompt(PROMPT, image)
    references = pocket.encode_references(image, area=64 * 64)
    noise = pocket.initial_noise(64, 64)
    kept = [t.clone() for t in (noise, references.latents, embeds)]
    latents = pocket.denoise(noise, references, embeds, mask, pocket.schedule(2, 64, 64))
    clean = latents.clone()
    pocket.decode(latents, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(kept, (noise, references.latents, embeds), strict=True))
    assert torch.equal(latents, clean)


def test_half_precision_keeps_its_types(photo):
    pipe = load_pipeline("pocket", dtype=torch.bfloat16)
    image = photo(64, 64)
    embeds, mask = pipe.encode_prompt(PROMPT, image)
    references = pipe.encode_references(image, area=64 * 64)
    schedule = pipe.schedule(2, 64, 64)
    latents = pipe.denoise(pipe.initial_noise(64, 64), references, embeds, mask, schedule)
    assert {t.dtype for t in (embeds, references.latents, latents)} == {torch.bfloat16}
    assert {schedule.sigmas.dtype, schedule.timesteps.dtype} == {torch.float32}
    assert pipe.decode(latents, 64, 64).dtype == torch.uint8
    assert latents.isfinite().all()


# --- errors -------------------------------------------------------------------------------------------------------------

GREY = np.full((64, 64, 3), 128, np.uint8)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": "  \n"}, "The prompt is empty"),
        ({"prompt": ["sepia", ""]}, "The prompt is empty"),
        ({"prompt": []}, "The prompt is list"),
        ({"prompt": None}, "The prompt is NoneType"),
        ({"prompt": 5}, "The prompt is int 5"),
        ({"prompt": "what is <|image_pad|>?"}, "<|image_pad|>"),
        ({"image": None}, "0 reference pictures were given. Allowed: 1 or more"),
        ({"image": []}, "0 reference pictures"),
        ({"image": "photo.jpg"}, "not str"),
        ({"image": b"not a picture"}, "not a picture that can be read"),
        ({"image": torch.zeros(64, 64, 3)}, "torch.float32 of shape (64, 64, 3)"),
        ({"image": torch.full((3, 64, 64), 2.0)}, "spans 2.0 to 2.0"),
        ({"image": torch.full((3, 64, 64), float("nan"))}, "spans nan"),
        ({"image": [[GREY, GREY[:32]]]}, "sizes 64x32, 64x64"),
        ({"image": [[GREY] * 2, [GREY] * 3]}, "[2, 3] rows"),
        ({"image": [[GREY] * 2], "prompt": ["a", "b", "c"]}, "[2, 3] rows"),
        ({"width": 0}, "The width is 0. Allowed: a whole number from 1 to 4096"),
        ({"height": -64}, "The height is -64"),
        ({"width": 64.0}, "The width is 64.0"),
        ({"width": True}, "The width is True"),
        ({"height": 100_000}, "The height is 100000"),
        ({"num_inference_steps": 0}, "The number of steps is 0. Allowed: 1 to 1000"),
        ({"num_inference_steps": 1.5}, "The number of steps is 1.5"),
        ({"sigmas": []}, "The sigmas are []"),
        ({"sigmas": [1.0, 0.0]}, "The sigmas are [1.0, 0.0]"),
        ({"sigmas": [float("nan")]}, "The sigmas are [nan]"),
        ({"reference_area": "big"}, "The reference area is 'big'"),
        ({"reference_area": 5}, "The reference area is 5"),
        ({"output_type": "gif"}, "The output type is 'gif'"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "2 seeds were given for a batch of 1"),
        ({"generator": "lucky"}, "The seed is str 'lucky'"),
    ],
)
def test_errors_say_what_came_and_what_is_allowed(pocket, change, says):
    with pytest.raises(EditError) as error:
        edit(pocket, **({"image": GREY, "prompt": PROMPT} | change))
    assert says in str(error.value)
    assert edit(pocket, GREY).isfinite().all(), "the next edit works"


@pytest.mark.parametrize("size", [(0, 64), (64, 4097), (0, 0), (None, 64), (64.0, 64)])
def test_the_steps_want_whole_sides(pocket, size):
    for step in (
        lambda: pocket.schedule(2, *size),
        lambda: pocket.initial_noise(*size),
        lambda: pocket.decode(torch.zeros(1, 16, 64), *size),
        lambda: pocket.encode_references(GREY, area="output", width=size[0], height=size[1]),
    ):
        with pytest.raises(EditError, match="whole numbers from 1 to 4096"):
            step()


def test_a_size_between_is_rounded_down_as_in_stock(pocket, monkeypatch):
    monkeypatch.setattr(stock_module, "VAE_IMAGE_SIZE", 64 * 64)
    assert edit(pocket, GREY, width=79, height=95, reference_area=None).shape == (1, 3, 80, 64)
    with pytest.raises(EditError, match="from 16 to 4096"):
        edit(pocket, GREY, width=15, reference_area=None)


@pytest.mark.parametrize(
    "asked, size",
    [
        ({"width": 79, "height": 47}, (79, 47)),
        ({"width": 76, "height": None}, (76, 51)),
        ({"width": None, "height": 51}, (76, 51)),
        ({"width": None, "height": None}, (313, 210)),
        ({"width": None, "height": None, "reference_area": 64 * 64}, (78, 52)),
    ],
)
def test_one_side_or_none_keeps_the_shape_within_a_pixel(pocket, photo, asked, size):
    assert edit(pocket, photo(100, 67), **asked).shape == (1, 3, size[1], size[0])


@pytest.mark.parametrize("path", ["stock", "fast"])
def test_what_is_beyond_the_size_is_the_repeated_edge_and_is_cut_off(pocket, photo, path):
    """An edit of 75x53 is the upper left of the edit of 80x64 whose picture goes on as its edge."""
    if path == "fast":
        pocket.enable_fast_path()
    image = photo(75, 53)
    framed = np.pad(image, ((0, 11), (0, 5), (0, 0)), mode="edge")
    embeds, mask = pocket.encode_prompt(PROMPT, image)
    pictures = []
    for picture, (w, h) in ((image, (75, 53)), (framed, (80, 64))):
        references = pocket.encode_references(picture, area="output", width=w, height=h)
        schedule = pocket.schedule(1, w, h)
        assert (schedule.width, schedule.height) == (80, 64)
        pictures.append(pocket.decode(pocket.denoise(pocket.initial_noise(w, h), references, embeds, mask, schedule), w, h))
    assert pictures[0].shape == (1, 53, 75, 3)
    assert torch.equal(pictures[0], pictures[1][:, :53, :75])

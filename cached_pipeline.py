"""QwenImageEditPlusPipeline in five named steps, with caches.

    encode_prompt -> encode_references -> schedule -> denoise -> decode

The stock pipeline is one call: every frame would tokenise the same prompt, resize on the CPU, run the vocabulary head
for nothing, upscale each reference to a megapixel and come back as a PIL image. Here the same work is cut at its joints,
each step a public method on tensors, so that an engine can run only what changed. `__call__` puts them together again
behind the stock arguments and gives the stock result.

What differs from stock, on purpose:
- The vision-language model gets its 3-D rotary positions. Since transformers 5.15 they are computed only if
  `mm_token_type_ids` is passed, which diffusers 0.42 does not do (diffusers issue 14194): stock embeds pictures as if
  they were text, without any error. Positions are computed here from the layout we know, on the host.
- One step is finite. Stock's schedule is [nan, 0] there with the base model's settings (see `sampling`).
- Batches. Rows are padded and masked only if prompts differ in length: a mask throws attention off its fast path.
- The area of references is a parameter. Stock makes each about 1024x1024 whatever the output: at 512x512, 80 % of the
  image tokens are the upscaled reference.

Caches are keyed by content: a digest of the pixels plus everything else that changes the result. A picture and prompt
seen before cost no model work, and the answer is bit for bit the one computed then: each is encoded by itself, so that
no result depends on what happened to be cached. Keys hold the state of the modules (`fast_path.watch`): weights,
adapters, hooks, settings. Who changes weights through `.data`, which leaves no trace, calls `clear_caches()`.

Single-threaded, like the modules it drives; only `cache_summary` may be called from another thread.
"""

import functools
import time
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from diffusers.utils.torch_utils import randn_tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLProcessor

import fast_path
from fast_path.stock_methods import StockMethods, held
from fast_path.watch import dtype_of
from fp8_linear import Fp8Linear
from int8_linear import Int8Linear
from pipeline import denoising, folder, placement, vision_language
from pipeline.content_cache import ContentCache
from pipeline.denoising import References
from pipeline.geometry import aspect, in_shape, on_grid, padded
from pipeline.images import EditError, Pictures, resample
from pipeline.lora import Origin, replace_lora
from pipeline.picture_files import named
from pipeline.prompt_reading import PromptReading
from pipeline.sampling import Schedule, is_lightning, schedule_of
from pipeline.stock_call import MAX_SIDE, StockCall, common_batch, is_whole
from quantization.layer import QuantizedLinear

MAX_REFERENCES = 3
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
QUANTIZATIONS = {kind.kind: kind for kind in (Int8Linear, Fp8Linear)}


class CachedQwenImageEditPipeline(StockCall, PromptReading, StockMethods):
    """Stock arguments, stock result, in steps that can be called alone. No gradients; all on the pipeline's device.

    The steps take the size of the picture in pixels, any whole numbers from 1 to MAX_SIDE. What lies between them is of
    the grid that the model computes (see `geometry`): noise, latents, schedule; `decode` cuts back to the size.

    A reference picture is bytes, a PIL image, a numpy array as `images.open_image` takes it, a uint8 tensor (H, W, 3)
    or (B, H, W, 3), or a float tensor (3, H, W) or (B, 3, H, W) in [0, 1]. A list at the top holds the
    references of one edit; each may itself be a list of B pictures of one size, one for each row of a batch.
    """

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLQwenImage,
        text_encoder: Qwen2_5_VLForConditionalGeneration,
        tokenizer: Qwen2Tokenizer,
        processor: Qwen2VLProcessor,
        transformer: QwenImageTransformer2DModel,
    ):  # the types are read: `from_pipe` takes what fits them
        super().__init__(scheduler, vae, text_encoder, tokenizer, processor, transformer)
        self.fast_path = fast_path.FastPath()
        self.single_frame_vae: fast_path.SingleFrameVAE | None = None
        self.fused_transformer: fast_path.FusedTransformer | None = None
        self.fused_text_encoder: fast_path.FusedTextEncoder | None = None
        self.attention_quantize = "none"  # or "fp8": of the fast path's attention, when it is put in
        self.caches_enabled = True
        # A live camera fills these with pictures that never come back: the bounds are a few seconds of frames.
        self._caches = {
            "prompt_tokens": ContentCache(64),  # half a megabyte each
            "picture_features": ContentCache(16),
            "prompt_embeds": ContentCache(32),
            "reference_latents": ContentCache(16),
        }
        self._constants = ContentCache(64)  # schedules, noise: not content, and cheap
        self._guidance_scale = self._attention_kwargs = self._current_timestep = None
        self._interrupt = False
        self._num_timesteps = 0
        self._origin = Origin()

    # Step 1 -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str],
        image=None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        max_sequence_length: int = 1024,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prompt as the vision-language model reads it with the references: (B, L, D) and a mask (B, L) or None.

        `image` are references of any size (None: text alone); they are brought to about 384x384 here. B is the number
        of prompts or of pictures in a slot; one of either serves all rows. The mask is None if no row is padded.
        Raises EditError for what is no prompt or no picture.
        """
        if prompt_embeds is None:
            prompts = vision_language.prompts(prompt, may_be_empty=True)
            slots = self.open_references(image, most=None) if image is not None else []
            batch = common_batch([len(prompts), *map(len, slots)])
            rows = [
                self._embed(prompts[b if len(prompts) > 1 else 0], [slot.row(b) for slot in slots])
                for b in range(batch)
            ]
            prompt_embeds, prompt_embeds_mask = vision_language.pad(rows)
        elif prompt_embeds_mask is not None and prompt_embeds_mask.all():
            prompt_embeds_mask = None
        if num_images_per_prompt > 1:
            prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
            if prompt_embeds_mask is not None:
                prompt_embeds_mask = prompt_embeds_mask.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, prompt_embeds_mask

    # Step 2 -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_references(
        self, images, *, area: int | str | None = None, width: int | None = None, height: int | None = None
    ) -> References:
        """The references as packed latents, normalised as the transformer was trained (the distribution's mode).

        `area` "output": the first is scaled to exactly `width` x `height`, so that each of its pixels lies where the
        output's does; the others keep their shape, at the output's area. A number of pixels: each keeps its shape, at
        that area. Both are whole, and padded to the grid (see `geometry`). None, or stock's 1024 * 1024, is stock's own
        rule: sides rounded to 32, which moves pixels a little.
        Raises EditError for what is no picture or a batch that does not fit together.
        """
        if area == "output":
            self._check_size(width, height)
        elif area is not None and not is_whole(area, 32 * 32, MAX_SIDE**2):
            raise EditError(f'The reference area is {area!r}. Allowed: None, "output", 1024 to {MAX_SIDE**2} pixels.')
        slots = self.open_references(images, most=None)
        batch = common_batch([len(slot) for slot in slots])
        sizes = [self._reference_size(slot, i, area, width, height) for i, slot in enumerate(slots)]

        def encode(state: tuple) -> list[torch.Tensor]:
            key = (state, self._execution_device, self._dtype("transformer"), self.single_frame_vae is None)
            return [
                self._cached("reference_latents", (*key, *size), functools.partial(self._encode_pictures, slot, *size), slot)
                for slot, size in zip(slots, sizes, strict=True)
            ]

        parts = [part.expand(batch, -1, -1) for part in self.fast_path.settled(self, "vae", encode)]
        shapes = [(1, h // self._unit, w // self._unit) for w, h in (self._grid(*size) for size in sizes)]
        return References(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), tuple(shapes))

    @staticmethod
    def _reference_size(slot: Pictures, index: int, area, width: int | None, height: int | None) -> tuple[int, int]:
        """The size at which `encode_references` encodes the reference of this index."""
        if area in (None, stock.VAE_IMAGE_SIZE):
            w, h = stock.calculate_dimensions(stock.VAE_IMAGE_SIZE, aspect(slot.size))
            return max(32, w), max(32, h)
        if area == "output":
            assert width is not None and height is not None
            if index == 0:
                return width, height
            area = width * height
        return in_shape(slot.size, area=area, longest=MAX_SIDE)

    def _encode_pictures(self, pictures: Pictures, width: int, height: int) -> torch.Tensor:
        pixels = padded(resample(pictures.on(self._execution_device), width, height, "lanczos"), self._unit)
        (mean, std), dtype = self._latent_statistics(), self._dtype("transformer")
        if self.single_frame_vae is not None:
            return self.single_frame_vae.encode_picture(pixels, mean, std, dtype)
        pixels = (pixels.permute(0, 3, 1, 2).float() / 255.0 * 2.0 - 1.0).to(self._dtype("vae"))  # (b, 3, H, W)
        latents = self.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0]
        latents = ((latents - mean) / std).to(dtype).contiguous()
        return self._pack_latents(latents, *latents.shape)

    # Step 3 -----------------------------------------------------------------------------------------------------------

    def schedule(self, steps: int, width: int, height: int, sigmas: Sequence[float] | None = None) -> Schedule:
        """The noise levels of `steps` steps for this output size, or of your own `sigmas`.

        The shift depends on the number of tokens: on the size that the model computes, which the Schedule holds. Same
        numbers as the scheduler's `set_timesteps`, and finite where that is not. Raises EditError.
        """
        self._check_size(width, height)
        width, height = self._grid(width, height)
        levels = None if sigmas is None else tuple(float(s) for s in sigmas)
        if levels is not None:
            if not levels or not all(0.0 < s <= 1.0 for s in levels):
                raise EditError(f"The sigmas are {list(levels)}. Allowed: one or more numbers above 0, at most 1.")
        elif not is_whole(steps, 1, MAX_STEPS):
            raise EditError(f"The number of steps is {steps!r}. Allowed: 1 to {MAX_STEPS}.")
        device, scheduler = self._execution_device, self.scheduler
        key = (scheduler, repr(scheduler.config), getattr(scheduler, "_shift", None), steps, width, height, levels, device)
        tokens = width * height // self._unit**2
        return self._constant(key, lambda: schedule_of(scheduler, steps, levels, width, height, tokens, device))

    def initial_noise(self, width: int, height: int, seed=0, batch: int = 1) -> torch.Tensor:
        """Packed noise (B, N, 4z) as stock draws it: `seed` is a number or a generator, or a list of `batch` of them.

        N = ceil(width / 16) ceil(height / 16), the tokens of the picture and of its padding. A number seeds a generator on the CPU: one seed means one picture on every device. One generator draws all
        rows, a list draws row by row; None draws from torch's global one. Noise of numbers is kept. Raises EditError.
        """
        self._check_size(width, height)
        width, height = self._grid(width, height)
        seeds = seed if isinstance(seed, (list, tuple)) else [seed]
        if len(seeds) not in (1, batch):
            raise EditError(f"{len(seeds)} seeds were given for a batch of {batch}. Allowed: one, or one for each row.")
        for s in seeds:
            if not (is_whole(s, 0, MAX_SEED) or isinstance(s, torch.Generator) or seed is None):
                raise EditError(f"The seed is {named(s)}. Allowed: 0 to {MAX_SEED}, or a torch.Generator.")

        def draw() -> torch.Tensor:
            generators = [torch.Generator().manual_seed(int(s)) if isinstance(s, Integral) else s for s in seeds]
            channels, rows, columns = self.latent_channels, height // self._unit * 2, width // self._unit * 2
            noise = randn_tensor(
                (batch, 1, channels, rows, columns),
                generator=generators if len(seeds) > 1 else generators[0],
                device=self._execution_device,
                dtype=self._dtype("transformer"),
            )
            return self._pack_latents(noise, batch, channels, rows, columns)

        if not all(isinstance(s, Integral) for s in seeds):
            return draw()
        key = ("noise", tuple(seeds), batch, width, height, self._execution_device, self._dtype("transformer"))
        return self._constant(key, draw)

    # Step 4 -----------------------------------------------------------------------------------------------------------

    # See `denoising`: a picture is started and advanced step by step, alone or with others; `denoise` is all its steps.
    start = denoising.start
    advance = denoising.advance
    denoise = denoising.denoise

    def token_cache(self):
        """A new cache for `denoise`: what did not change since the frame before is not computed again.

        EditError without the fast path, which alone knows how.
        """
        self.fast_path.look(self, "transformer")
        if self.fused_transformer is None:
            raise EditError("Tokens can be reused on the fast path only. Turn it on, or reuse off.")
        return fast_path.TokenCache(self.fused_transformer)

    def expect(self, times: Sequence[float]) -> None:
        """That denoising will come to these timesteps of a schedule: the fast path makes ready all it has not met yet."""
        if self.fused_transformer is not None:
            self.fused_transformer.modulations.expect(times)

    # Step 5 -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """Packed latents (B, N, 4z) to pictures, uint8 (B, height, width, 3), on the pipeline's device.

        The padding that N has beyond `width` x `height` is cut off.
        """
        self.fast_path.look(self, "vae")
        if self.single_frame_vae is not None:
            self._check_size(width, height)
            w, h = self._grid(width, height)
            pixels = self.single_frame_vae.decode_picture(latents, h, w, *self._latent_statistics())
            return pixels[:, :height, :width].contiguous()
        return (self._decode(latents, width, height).float() * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)

    def _decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """As `decode`, but (B, 3, height, width) in [0, 1], in the VAE's dtype."""
        self._check_size(width, height)
        w, h = self._grid(width, height)
        latents = self._unpack_latents(latents, h, w, self.vae_scale_factor)[:, :, 0].to(self._dtype("vae"))
        mean, std = self._latent_statistics()
        latents = latents / (1.0 / std) + mean  # as stock writes it: the same rounding
        if self.single_frame_vae is not None:
            pixels = self.single_frame_vae.decode(latents)
        else:
            pixels = self.vae.decode(latents.unsqueeze(2), return_dict=False)[0][:, :, 0]
        return (pixels[:, :, :height, :width] * 0.5 + 0.5).clamp(0.0, 1.0)

    # Caches, model, helpers -------------------------------------------------------------------------------------------

    def cache_summary(self) -> dict[str, dict[str, int]]:
        """For each cache: entries, bytes, hits, misses. May be called from any thread."""
        return {name: cache.summary() for name, cache in self._caches.items()}

    def clear_caches(self) -> None:
        """Makes everything new that came from weights: call it after changing them in a way that leaves no trace (`.data`).

        Cached results, and the fast path's tables, copies and recordings; it is built again when it is next used.
        """
        self.forget_results()
        self.fast_path.take_out(self)

    def forget_results(self) -> None:
        """Empties the caches of results; the fast path stays as it is."""
        for cache in (*self._caches.values(), self._constants):
            cache.clear()

    def release_memory(self) -> None:
        """Gives back to the GPU whatever can be computed again: caches, and the fast path's recordings."""
        self.forget_results()
        fast_path.forget_recordings(self)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _cached(self, name: str, key: tuple, make: Callable[[], Any], *pictures: Pictures) -> Any:
        """`make()`, or what it gave for the same `key` and the same pixels."""
        if not self.caches_enabled:
            return make()
        return self._caches[name].get((key, *(digest for p in pictures for digest in p.digests)), make)

    def _constant(self, key, make: Callable[[], Any]) -> Any:
        return self._constants.get(key, make)

    def enable_fast_path(self) -> list[fast_path.Applied]:
        """Puts the exact accelerations in (see `fast_path`) and says for each whether it is in use and why."""
        self.forget_results()  # what is cached has the other path's rounding
        return fast_path.apply(self)

    def disable_fast_path(self) -> None:
        """Back to the stock modules."""
        self.forget_results()
        fast_path.remove(self)

    def change_lora(self, lora: str | None, weight: float = 1.0) -> float:
        """Another LoRA in place of the one that is fused, or another weight of it, or none (None). Returns seconds.

        The result is that of a fresh start, bit for bit: the layers are read from the model's folder again before the
        LoRA is fused. They stay where they are in memory, so nothing is recorded or compiled again. A Lightning LoRA
        brings its schedule, any other leaves the model its own. Raises EditError; then the former LoRA is in place,
        untouched.
        """
        began, origin = time.perf_counter(), self._origin
        former_weight = 1.0 if origin.lora_weight is None else origin.lora_weight
        former, touched = (origin.lora, former_weight), set(origin.lora_layers)
        self.fast_path.look(self, "transformer")
        with held(self):  # the layers keep their places: the fast path is told, not built again
            try:
                replace_lora(self, origin, lora, weight)
            except EditError:
                raise  # before anything was changed
            except Exception:  # memory ran out in the middle
                touched |= set(origin.lora_layers)
                replace_lora(self, origin, *former)
                raise
            finally:
                self.fast_path.components["transformer"].renew(self.transformer)
                if self.fused_transformer is not None:
                    self.fused_transformer.weights_changed(touched | set(origin.lora_layers))
        return time.perf_counter() - began

    @property
    def default_size(self) -> int:
        """The side in pixels at which the model is live: 256 for the pocket model, 512 for the real one."""
        return 256 if folder.edition(self.transformer) == "pocket" else 512

    @property
    def description(self) -> dict[str, Any]:
        """What runs here, for the log, the page and /health."""
        modules = [m for m in (self.transformer, self.text_encoder, self.vae) if isinstance(m, torch.nn.Module)]
        return {
            "model": self._origin.model,
            "lora": self._origin.lora,
            "lora_weight": self._origin.lora_weight,
            "scheduler": "lightning" if is_lightning(self.scheduler) else "base",
            "dtype": str(self._dtype("transformer")).removeprefix("torch."),
            "fast_path": [line._asdict() for line in self.fast_path.report],
            "quantized": placement.quantization(self.transformer),
            "attention_quantized": None if self.attention_quantize == "none" else self.attention_quantize,
            "device": str(self._execution_device),
            "parameters": sum(p.numel() for m in modules for p in m.parameters()),
        }

    @staticmethod
    def open_references(images, most: int | None = MAX_REFERENCES) -> list[Pictures]:
        """The references of one edit, 1 to `most` or any number, opened once; every step takes the result in their place.

        The models were trained on up to 3; stock takes any number. Raises EditError.
        """
        slots = images if isinstance(images, (list, tuple)) else [images]
        if images is None or not slots or len(slots) > (most or len(slots)):
            count = 0 if images is None else len(slots)
            raise EditError(f"{count} reference pictures were given. Allowed: 1 {'or more' if most is None else f'to {most}'}.")
        return [Pictures.open(slot) for slot in slots]

    @property
    def _unit(self) -> int:
        """Pixels a token spans on each side: 16."""
        return self.vae_scale_factor * 2

    @property
    def _execution_device(self) -> torch.device:
        """As stock, which walks through every module of every component: 11 ms each time with the full-size model."""
        models = (self.transformer, self.text_encoder, self.vae)
        device = next((next(m.parameters()).device for m in models if m is not None), torch.device("cpu"))
        # Weights that lie on the CPU while there is a GPU may be offloaded: then, and only then, the walk is needed.
        if device.type in ("cpu", "meta") and torch.cuda.is_available():
            with held(self):
                return super()._execution_device
        return device

    def _dtype(self, component: str) -> torch.dtype:
        """What the component computes in; of one that is not loaded, what the text encoder does, as in stock."""
        module = getattr(self, component)
        return dtype_of(self.text_encoder if module is None else module)

    def _check_size(self, width, height) -> None:
        if not (is_whole(width, 1, MAX_SIDE) and is_whole(height, 1, MAX_SIDE)):
            raise EditError(f"The size is {width}x{height}. Allowed: whole numbers from 1 to {MAX_SIDE}.")

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """The size that the model computes for an output of this size."""
        return on_grid(width, height, self._unit)

    def _latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents' mean and standard deviation as the VAE's config gives them: (z, 1, 1) each."""

        def make():
            config = self.vae.config
            return tuple(
                torch.tensor(v).view(-1, 1, 1).to(self._execution_device, self._dtype("vae"))
                for v in (config.latents_mean, config.latents_std)
            )

        return self._constant(("latent_statistics", self.fast_path.components["vae"].version, self._execution_device, self._dtype("vae")), make)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs):
        """As stock; a processor is built without torchvision unless one is passed."""
        if "processor" not in kwargs:
            names = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
            options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            kwargs["processor"] = folder.picture_processor(pretrained_model_name_or_path, **options)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)


def load_pipeline(
    model: str,
    *,
    lora: str | None = None,
    lora_weight: float = 1.0,
    quantize: str | None = None,
    attention_quantize: str | None = None,
    text_encoder_quantize: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> CachedQwenImageEditPipeline:
    """The pipeline on `device`, ready to run.

    `model`: "pocket" (the embedded model), a diffusers folder, or a hub id. `lora`: None or "none", "lightning-4",
    "lightning-8", a file, a hub id, or a hub id and a file in it; fused into the weights. `quantize`,
    `text_encoder_quantize`: None, "none", "int8" or "fp8"; a folder that was quantised before needs neither.
    `attention_quantize`: None, "none" or "fp8", of the fast path's attention. `dtype`: bfloat16 on CUDA, float32 elsewhere if None. `progress(text, fraction)` hears what is done. Raises EditError.
    """
    tell = progress or (lambda text, fraction: None)
    device = placement.usable_device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    kinds = {"transformer": quantization_kind(quantize), "text_encoder": quantization_kind(text_encoder_quantize)}

    def download() -> str:
        tell(f"Downloading {model}, unless it is here already", 0.0)
        return str(CachedQwenImageEditPipeline.download(model))

    source = folder.model_folder(model, download)
    tell(f"Reading the model {model}", 0.2)
    try:
        parts = placement.quantized_transformer(source, QUANTIZATIONS, kinds["transformer"], lora, dtype)
        pipe = CachedQwenImageEditPipeline.from_pretrained(str(source), dtype=dtype, **parts)
    except EditError:
        raise
    except Exception as error:  # of diffusers, transformers, safetensors, json: each for its own files
        raise folder.reading_failed(model, error) from error
    pipe.set_progress_bar_config(disable=True)
    pipe._origin = Origin(model, source)
    pipe.attention_quantize = fast_path.attention_kind(pipe.transformer, attention_quantize, device)
    if parts:
        kinds["transformer"] = None
    with held(pipe):  # nothing of it is anyone else's yet
        placement.finish(pipe, device, (lora, lora_weight), kinds, tell)
    return pipe


def quantization_kind(name: str | None) -> type[QuantizedLinear] | None:
    """The kind of 8-bit layers that `name` means, None for None and "none". Raises EditError."""
    if name in (None, "none"):
        return None
    if name not in QUANTIZATIONS:
        raise EditError(f'The quantisation is "{name}". Allowed: none, {", ".join(QUANTIZATIONS)}.')
    return QUANTIZATIONS[name]

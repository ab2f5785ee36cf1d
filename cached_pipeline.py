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
no result depends on what happened to be cached. Keys hold the identity of the modules, not of their weights: who
changes weights in place calls `clear_caches()`.

Single-threaded, like the modules it drives; only `cache_summary` may be called from another thread.
"""

import time
from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from diffusers.pipelines.qwenimage.pipeline_output import QwenImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

import fast_path
from pipeline import denoising, loading, vision_language
from pipeline.content_cache import ContentCache
from pipeline.denoising import References
from pipeline.images import EditError, Pictures, download, resample
from pipeline.picture_files import named
from pipeline.sampling import Schedule, noise_levels

MAX_REFERENCES = 3
MAX_SIDE = 4096
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
_OUTPUT_TYPES = ("pil", "np", "pt", "latent", "uint8")


class CachedQwenImageEditPipeline(QwenImageEditPlusPipeline):
    """Stock arguments, stock result, in steps that can be called alone. No gradients; all on the pipeline's device.

    A reference picture is bytes, a PIL image, a numpy array as `images.open_image` takes it, a uint8 tensor (H, W, 3)
    or (B, H, W, 3), or a float tensor (3, H, W) or (B, 3, H, W) in [0, 1]. A list at the top holds the 1 to 3
    references of one edit; each may itself be a list of B pictures of one size, one for each row of a batch.
    """

    def __init__(self, scheduler, vae, text_encoder, tokenizer, processor, transformer):
        super().__init__(scheduler, vae, text_encoder, tokenizer, processor, transformer)
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
        self._origin = {"model": None, "folder": None, "lora": None, "lora_weight": None, "lora_layers": []}

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
        """The prompt as the vision-language model reads it beside the references: (B, L, D) and a mask (B, L) or None.

        `image` are references of any size (None: text alone); they are brought to about 384x384 here. B is the number
        of prompts or of pictures in a slot; one of either serves all rows. The mask is None if no row is padded.
        Raises EditError for what is no prompt or no picture.
        """
        if prompt_embeds is None:
            prompts = vision_language.prompts(prompt, may_be_empty=True)
            slots = self.open_references(image) if image is not None else []
            batch = _common_batch([len(prompts), *map(len, slots)])
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

    def _embed(self, prompt: str, pictures: list[Pictures]) -> torch.Tensor:
        """One row: (1, L, D)."""
        encoder = self.text_encoder
        key = (id(encoder), _dtype(encoder), self._execution_device, stock.CONDITION_IMAGE_SIZE, prompt)
        return self._cached("prompt_embeds", key, lambda: self._run_text_encoder(prompt, pictures), *pictures)

    def _run_text_encoder(self, prompt: str, pictures: list[Pictures]) -> torch.Tensor:
        if (hook := getattr(self.text_encoder, "_hf_hook", None)) is not None:
            hook.pre_forward(self.text_encoder)  # CPU offload waits for a forward that we go around
        features = [self._picture_features(p) for p in pictures]
        grids = tuple(grid for _, grid in features)
        encoder = self.text_encoder
        (words, rows), positions, places = self._cached(
            "prompt_tokens",
            (prompt, grids, self._execution_device, id(self.tokenizer), id(encoder), _dtype(encoder)),
            lambda: self._words(prompt, grids),
        )
        # The language model under the vocabulary head; the head's 152k logits for each token would be thrown away.
        language_model = encoder.model.language_model
        embeds = words[rows].unsqueeze(0)  # (1, L, D)
        for (start, stop), (feature, _) in zip(places, features, strict=True):
            embeds[:, start:stop] = feature.to(embeds.dtype)
        start = self.prompt_template_encode_start_idx
        if self.fused_text_encoder is not None:
            hidden = self.fused_text_encoder.read(embeds, positions, skip=start)
        else:
            hidden = language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
            hidden = hidden[:, start:]
        # A copy: a view would keep the dropped system prompt's rows alive in the cache.
        return hidden.to(_dtype(self.transformer), copy=True)

    def _picture_features(self, picture: Pictures) -> tuple[torch.Tensor, vision_language.Grid]:
        """The vision tower's tokens (n, D) of one picture, and their rows and columns."""
        key = (id(self.text_encoder), _dtype(self.text_encoder), self._execution_device, stock.CONDITION_IMAGE_SIZE)
        return self._cached("picture_features", key, lambda: self._run_vision(picture), picture)

    def _run_vision(self, picture: Pictures) -> tuple[torch.Tensor, vision_language.Grid]:
        device, visual = self._execution_device, self.text_encoder.model.visual
        width, height = stock.calculate_dimensions(stock.CONDITION_IMAGE_SIZE, picture.size[0] / picture.size[1])
        pixels = resample(picture.on(device), width, height, "lanczos")
        values, (rows, columns) = vision_language.pixel_values(pixels, self.processor.image_processor)
        merged = rows // visual.spatial_merge_size, columns // visual.spatial_merge_size
        if self.fused_text_encoder is not None:
            return self.fused_text_encoder.see(values.to(_dtype(visual)), (rows, columns)), merged
        grid = self._constant(("grid", rows, columns, device), lambda: torch.tensor([[1, rows, columns]]).to(device))
        return visual(values.to(_dtype(visual)), grid_thw=grid).pooler_output, merged

    def _tokenise(self, prompt: str, grids: tuple[vision_language.Grid, ...]):
        """Token ids (1, L), 3-D rotary positions (3, 1, L), and where each picture's tokens lie; on the CPU."""
        text = self.prompt_template_encode.format(vision_language.announce_pictures(len(grids)) + prompt)
        ids, positions, places = vision_language.layout(
            self.tokenizer(text)["input_ids"], self.text_encoder.config.image_token_id, grids
        )
        return torch.tensor([ids]), torch.tensor(positions).T[:, None], places

    def _words(self, prompt: str, grids: tuple[vision_language.Grid, ...]):
        """What `_tokenise` gives, on the device; in the ids' place their embeddings, see `vision_language.word_rows`."""
        ids, positions, places = self._tokenise(prompt, grids)
        words, device = self.text_encoder.model.language_model.embed_tokens, self._execution_device
        return vision_language.word_rows(words, ids[0].tolist(), device), positions.to(device), places

    # Step 2 -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_references(
        self, images, *, area: int | str | None = None, width: int | None = None, height: int | None = None
    ) -> References:
        """The references as packed latents, normalised as the transformer was trained (the distribution's mode).

        `area` in pixels is what each is resized to, its aspect kept, sides rounded to 32; None is stock's 1024 * 1024,
        "output" is `width * height`. A picture that has the area already, with sides in multiples of 16, is not
        resized at all. Raises EditError for what is no picture, more than 3, or a batch that does not fit together.
        """
        if area == "output":
            self._check_size(width, height)
            area = width * height
        elif area is None:
            area = stock.VAE_IMAGE_SIZE
        if not _is_whole(area, 32 * 32, MAX_SIDE**2):
            raise EditError(f'The reference area is {area!r}. Allowed: None, "output", 1024 to {MAX_SIDE**2} pixels.')
        slots = self.open_references(images)
        batch = _common_batch([len(slot) for slot in slots])
        parts, shapes = [], []
        for slot in slots:
            w, h = slot.size
            if w * h != area or w % self._unit or h % self._unit:
                w, h = (max(32, side) for side in stock.calculate_dimensions(area, w / h))
            key = (id(self.vae), _dtype(self.vae), self._execution_device, self.single_frame_vae is None, w, h)
            part = self._cached("reference_latents", key, lambda s=slot, w=w, h=h: self._encode_pictures(s, w, h), slot)
            parts.append(part.expand(batch, -1, -1))
            shapes.append((1, h // self._unit, w // self._unit))
        return References(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), tuple(shapes))

    def _encode_pictures(self, pictures: Pictures, width: int, height: int) -> torch.Tensor:
        pixels = resample(pictures.on(self._execution_device), width, height, "lanczos")
        (mean, std), dtype = self._latent_statistics(), _dtype(self.transformer)
        if self.single_frame_vae is not None:
            return self.single_frame_vae.encode_picture(pixels, mean, std, dtype)
        pixels = (pixels.permute(0, 3, 1, 2).float() / 255.0 * 2.0 - 1.0).to(_dtype(self.vae))  # (b, 3, H, W)
        latents = self.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0]
        latents = ((latents - mean) / std).to(dtype).contiguous()
        return self._pack_latents(latents, *latents.shape)

    # Step 3 -----------------------------------------------------------------------------------------------------------

    def schedule(self, steps: int, width: int, height: int, sigmas: list[float] | None = None) -> Schedule:
        """The noise levels of `steps` steps for this output size (the shift depends on it), or of your own `sigmas`.

        Same numbers as the scheduler's `set_timesteps`, and finite where that is not. Raises EditError.
        """
        self._check_size(width, height)
        if sigmas is not None:
            sigmas = tuple(float(s) for s in sigmas)
            if not sigmas or not all(0.0 < s <= 1.0 for s in sigmas):
                raise EditError(f"The sigmas are {list(sigmas)}. Allowed: one or more numbers above 0, at most 1.")
        elif not _is_whole(steps, 1, MAX_STEPS):
            raise EditError(f"The number of steps is {steps!r}. Allowed: 1 to {MAX_STEPS}.")
        device = self._execution_device

        def make() -> Schedule:
            levels = np.linspace(1.0, 1 / steps, steps) if sigmas is None else np.array(sigmas)
            noise, timesteps = noise_levels(self.scheduler, levels, width * height // self._unit**2)
            return Schedule(noise.to(device), timesteps.to(device), width, height, tuple(timesteps.tolist()))

        return self._constant((self.scheduler, self.scheduler.shift, steps, width, height, sigmas, device), make)

    def initial_noise(self, width: int, height: int, seed=0, batch: int = 1) -> torch.Tensor:
        """Packed noise (B, N, 4z) as stock draws it: `seed` is a number or a generator, or a list of `batch` of them.

        A number seeds a generator on the CPU: one seed means one picture on every device. One generator draws all
        rows, a list draws row by row; None draws from torch's global one. Noise of numbers is kept. Raises EditError.
        """
        self._check_size(width, height)
        seeds = seed if isinstance(seed, (list, tuple)) else [seed]
        if len(seeds) not in (1, batch):
            raise EditError(f"{len(seeds)} seeds were given for a batch of {batch}. Allowed: one, or one for each row.")
        for s in seeds:
            if not (_is_whole(s, 0, MAX_SEED) or isinstance(s, torch.Generator) or seed is None):
                raise EditError(f"The seed is {named(s)}. Allowed: 0 to {MAX_SEED}, or a torch.Generator.")

        def draw() -> torch.Tensor:
            generators = [torch.Generator().manual_seed(int(s)) if isinstance(s, Integral) else s for s in seeds]
            channels, rows, columns = self.latent_channels, height // self._unit * 2, width // self._unit * 2
            noise = randn_tensor(
                (batch, 1, channels, rows, columns),
                generator=generators if len(seeds) > 1 else generators[0],
                device=self._execution_device,
                dtype=_dtype(self.transformer),
            )
            return self._pack_latents(noise, batch, channels, rows, columns)

        if not all(isinstance(s, Integral) for s in seeds):
            return draw()
        key = ("noise", tuple(seeds), batch, width, height, self._execution_device, _dtype(self.transformer))
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
        if self.fused_transformer is None:
            raise EditError("Tokens can be reused on the fast path only. Turn it on, or reuse off.")
        return fast_path.TokenCache(self.fused_transformer)

    def expect(self, times: list[float]) -> None:
        """That denoising will come to these timesteps of a schedule: the fast path makes ready all it has not met yet."""
        if self.fused_transformer is not None:
            self.fused_transformer.modulations.expect(times)

    # Step 5 -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """Packed latents (B, N, 4z) to pictures, uint8 (B, height, width, 3), on the pipeline's device."""
        if self.single_frame_vae is not None:
            self._check_size(width, height)
            return self.single_frame_vae.decode_picture(latents, height, width, *self._latent_statistics())
        return (self._decode(latents, width, height).float() * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)

    def _decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """As `decode`, but (B, 3, height, width) in [0, 1], in the VAE's dtype."""
        self._check_size(width, height)
        latents = self._unpack_latents(latents, height, width, self.vae_scale_factor)[:, :, 0].to(_dtype(self.vae))
        mean, std = self._latent_statistics()
        latents = latents / (1.0 / std) + mean  # as stock writes it: the same rounding
        if self.single_frame_vae is not None:
            pixels = self.single_frame_vae.decode(latents)
        else:
            pixels = self.vae.decode(latents.unsqueeze(2), return_dict=False)[0][:, :, 0]
        return (pixels * 0.5 + 0.5).clamp(0.0, 1.0)

    # All five ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        image=None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        true_cfg_scale: float = 4.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
        max_sequence_length: int = 512,
        *,
        reference_area: int | str | None = None,
    ) -> QwenImagePipelineOutput | tuple:
        """Stock's arguments and result; see `QwenImageEditPlusPipeline.__call__`.

        Beyond stock: `reference_area` as in `encode_references`; batches; `output_type` "uint8", a tensor
        (B, H, W, 3). Raises EditError for what a person can change.
        """
        if output_type not in _OUTPUT_TYPES:
            raise EditError(f"The output type is {output_type!r}. Allowed: {', '.join(_OUTPUT_TYPES)}.")
        slots = self.open_references(image)
        width, height = self._output_size(width, height, slots[-1].size)
        if prompt_embeds is None:
            prompt = vision_language.prompts(prompt, may_be_empty=False)
        self.check_inputs(
            prompt, height, width, negative_prompt, prompt_embeds, negative_prompt_embeds, prompt_embeds_mask,
            negative_prompt_embeds_mask, list(callback_on_step_end_tensor_inputs), max_sequence_length,
        )  # fmt: skip
        self._guidance_scale, self._attention_kwargs, self._interrupt = guidance_scale, attention_kwargs or {}, False
        batch = _common_batch([len(prompt if prompt_embeds is None else prompt_embeds), *map(len, slots)])
        slots = [slot.repeat(num_images_per_prompt) for slot in slots]

        def encode(prompt, embeds, mask):
            if embeds is not None:
                return self.encode_prompt(None, None, None, num_images_per_prompt, embeds, mask)
            prompts = vision_language.prompts(prompt, may_be_empty=True)
            prompts = prompts * batch if len(prompts) == 1 else prompts
            return self.encode_prompt([p for p in prompts for _ in range(num_images_per_prompt)], slots)

        prompt_embeds, mask = encode(prompt, prompt_embeds, prompt_embeds_mask)
        negative = negative_mask = None
        if self._wants_cfg(true_cfg_scale, negative_prompt is not None or negative_prompt_embeds is not None):
            negative, negative_mask = encode(negative_prompt, negative_prompt_embeds, negative_prompt_embeds_mask)
        references = self.encode_references(slots, area=reference_area, width=width, height=height)
        if latents is None:
            latents = self.initial_noise(width, height, generator, batch * num_images_per_prompt)
        schedule = self.schedule(num_inference_steps, width, height, sigmas)
        self._num_timesteps = len(schedule.timesteps)
        with self.progress_bar(total=self._num_timesteps) as bar:
            latents = self.denoise(
                latents.to(self._execution_device, _dtype(self.transformer)), references, prompt_embeds, mask, schedule,
                negative_prompt_embeds=negative, negative_mask=negative_mask, cfg_scale=true_cfg_scale,
                on_step_end=self._step_end(callback_on_step_end, callback_on_step_end_tensor_inputs, schedule, bar),
                transformer_kwargs=self._transformer_kwargs(),
            )  # fmt: skip
        images = self._deliver(latents, width, height, output_type)
        self.maybe_free_model_hooks()
        return QwenImagePipelineOutput(images=images) if return_dict else (images,)

    def _output_size(self, width: int | None, height: int | None, reference: tuple[int, int]) -> tuple[int, int]:
        """As stock: a side not given follows from a megapixel at the last reference's aspect; both round down to 16."""
        default = stock.calculate_dimensions(1024 * 1024, reference[0] / reference[1])
        sides = []
        for name, side, other in (("width", width, default[0]), ("height", height, default[1])):
            side = other if side is None else side
            if not _is_whole(side, self._unit, MAX_SIDE):
                raise EditError(f"The {name} is {side!r}. Allowed: {self._unit} to {MAX_SIDE} pixels.")
            sides.append(side // self._unit * self._unit)
        return sides[0], sides[1]

    def _step_end(self, callback: Callable | None, inputs: list[str], schedule: Schedule, bar):
        """Stock's `callback_on_step_end` as `denoise` calls it."""

        def step_end(i: int, latents: torch.Tensor, prompt_embeds: torch.Tensor):
            bar.update()
            if callback is None:
                return latents, prompt_embeds
            known = {"latents": latents, "prompt_embeds": prompt_embeds}
            answer = callback(self, i, schedule.timesteps[i], {name: known[name] for name in inputs})
            return answer.pop("latents", latents), answer.pop("prompt_embeds", prompt_embeds)

        return step_end

    def _wants_cfg(self, scale: float, has_negative: bool) -> bool:
        if scale > 1 and not has_negative:
            stock.logger.warning(f"true_cfg_scale is {scale}, but there is no negative prompt: no guidance.")
        elif scale <= 1 and has_negative:
            stock.logger.warning(f"A negative prompt is given, but true_cfg_scale is {scale}: no guidance.")
        return scale > 1 and has_negative

    def _transformer_kwargs(self) -> dict[str, Any]:
        kwargs = {"attention_kwargs": self._attention_kwargs}
        if self.transformer.config.guidance_embeds:
            if self._guidance_scale is None:
                raise EditError("This model is guidance-distilled: guidance_scale is required.")
            kwargs["guidance"] = torch.full([1], self._guidance_scale, device=self._execution_device)
        elif self._guidance_scale is not None:
            stock.logger.warning("guidance_scale is ignored: this model is not guidance-distilled.")
        return kwargs

    def _deliver(self, latents: torch.Tensor, width: int, height: int, output_type: str):
        if output_type == "latent":
            return latents
        if output_type == "uint8":
            return self.decode(latents, width, height)
        if output_type == "pil":
            return [Image.fromarray(rgb) for rgb in download(self.decode(latents, width, height))]
        pixels = self._decode(latents, width, height)
        return pixels if output_type == "pt" else pixels.permute(0, 2, 3, 1).float().cpu().numpy()

    # Caches, model, helpers -------------------------------------------------------------------------------------------

    def cache_summary(self) -> dict[str, dict[str, int]]:
        """For each cache: entries, bytes, hits, misses. May be called from any thread."""
        return {name: cache.summary() for name, cache in self._caches.items()}

    def clear_caches(self) -> None:
        """Forgets everything cached; call it after changing weights in place."""
        for cache in (*self._caches.values(), self._constants):
            cache.clear()

    def release_memory(self) -> None:
        """Gives back to the GPU whatever can be computed again: caches, and the fast path's recordings."""
        self.clear_caches()
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
        self.clear_caches()  # what is cached has the other path's rounding
        return fast_path.apply(self)

    def disable_fast_path(self) -> None:
        """Back to the stock modules."""
        self.clear_caches()
        fast_path.remove(self)

    def change_lora(self, lora: str | None, weight: float = 1.0) -> float:
        """Another LoRA in place of the one that is fused, or another weight of it, or none (None). Returns seconds.

        The result is that of a fresh start, bit for bit: the layers are read from the model's folder again before the
        LoRA is fused. They stay where they are in memory, so nothing is recorded or compiled anew. A Lightning LoRA
        brings its schedule, any other leaves the model its own. Raises EditError; then the former LoRA is in place.
        """
        began = time.perf_counter()
        before = self._origin["lora"], self._origin["lora_weight"]
        changed = set(self._origin["lora_layers"])
        try:
            loading.replace_lora(self, self._origin, lora, weight)
        except EditError:
            loading.replace_lora(self, self._origin, *before)
            raise
        finally:
            if self.fused_transformer is not None:
                self.fused_transformer.weights_changed(changed | set(self._origin["lora_layers"]))
        return time.perf_counter() - began

    def to(self, *args, **kwargs):
        fast = fast_path.in_use(self)
        if fast:
            self.disable_fast_path()
        moved = super().to(*args, **kwargs)
        if fast:
            self.enable_fast_path()  # its modules are copies, built where the originals are now
        return moved

    @property
    def default_size(self) -> int:
        """The side in pixels at which the model is live: 256 for the pocket model, 512 for the real one."""
        return 256 if loading.edition(self.transformer) == "pocket" else 512

    @property
    def description(self) -> dict[str, Any]:
        """What runs here, for the log, the page and /health."""
        modules = [m for m in self.components.values() if isinstance(m, torch.nn.Module)]
        return {
            "model": self._origin["model"],
            "lora": self._origin["lora"],
            "lora_weight": self._origin["lora_weight"],
            "scheduler": "lightning" if loading.is_lightning(self.scheduler) else "base",
            "dtype": str(_dtype(self.transformer)).removeprefix("torch."),
            "quantized": loading.quantization(self.transformer),
            "attention_quantized": None if self.attention_quantize == "none" else self.attention_quantize,
            "device": str(self._execution_device),
            "parameters": sum(p.numel() for m in modules for p in m.parameters()),
        }

    @staticmethod
    def open_references(images) -> list[Pictures]:
        """The 1 to 3 references of one edit, opened once; every step takes the result in their place. EditError."""
        slots = images if isinstance(images, (list, tuple)) else [images]
        if images is None or not 1 <= len(slots) <= MAX_REFERENCES:
            count = 0 if images is None else len(slots)
            raise EditError(f"{count} reference pictures were given. Allowed: 1 to {MAX_REFERENCES}.")
        return [Pictures.open(slot) for slot in slots]

    @property
    def _unit(self) -> int:
        """Pixels a token spans on each side: 16."""
        return self.vae_scale_factor * 2

    @property
    def _execution_device(self) -> torch.device:
        """As stock, which walks through every module of every component: 11 ms each time with the full-size model."""
        device = next(self.transformer.parameters()).device
        # Weights that lie on the CPU while there is a GPU may be offloaded: then, and only then, the walk is needed.
        if device.type in ("cpu", "meta") and torch.cuda.is_available():
            return super()._execution_device
        return device

    def _check_size(self, width, height) -> None:
        for side in (width, height):
            if not _is_whole(side, self._unit, MAX_SIDE) or side % self._unit:
                raise EditError(
                    f"The size is {width}x{height}. Allowed: multiples of {self._unit}, {self._unit} to {MAX_SIDE}."
                )

    def _latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents' mean and standard deviation as the VAE's config gives them: (z, 1, 1) each."""

        def make():
            config = self.vae.config
            return tuple(
                torch.tensor(v).view(-1, 1, 1).to(self._execution_device, _dtype(self.vae))
                for v in (config.latents_mean, config.latents_std)
            )

        return self._constant(("latent_statistics", id(self.vae), self._execution_device, _dtype(self.vae)), make)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As stock; a processor is built without torchvision unless one is passed."""
        if "processor" not in kwargs:
            names = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
            options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            kwargs["processor"] = loading.picture_processor(pretrained_model_name_or_path, **options)
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
    device = loading.usable_device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        folder = loading.POCKET_FOLDER if model == "pocket" else Path(model).expanduser()
        if not folder.is_dir():
            tell(f"Downloading {model}, unless it is here already", 0.0)
            folder = CachedQwenImageEditPipeline.download(model)
        elif not (folder / "model_index.json").is_file():
            raise ValueError(f"the folder {folder} has no model_index.json")
        tell(f"Reading the model {model}", 0.2)
        parts = loading.quantized_transformer(Path(folder), quantize, lora, dtype)
        pipe = CachedQwenImageEditPipeline.from_pretrained(str(folder), dtype=dtype, **parts)
    except (OSError, ValueError) as error:
        if isinstance(error, EditError):
            raise
        raise EditError(
            f'The model "{model}" cannot be loaded: {error}\n'
            'Allowed: "pocket", a diffusers folder with a model_index.json, or a hub id such as '
            '"Qwen/Qwen-Image-Edit-2509" (needs the network once).'
        ) from error
    pipe.set_progress_bar_config(disable=True)
    pipe._origin |= {"model": model, "folder": Path(folder)}
    pipe.attention_quantize = fast_path.attention_kind(pipe.transformer, attention_quantize, device)
    loading.finish(pipe, device, (lora, lora_weight), None if parts else quantize, text_encoder_quantize, tell)
    return pipe


def _dtype(module: torch.nn.Module) -> torch.dtype:
    """The first parameter's; `module.dtype` walks through all of them (5 ms with the full-size transformer)."""
    return next(module.parameters()).dtype


def _common_batch(sizes: list[int]) -> int:
    several = sorted(set(sizes) - {1})
    if len(several) > 1:
        raise EditError(f"The batch does not fit together: {several} rows. Prompts and pictures: one, or one a row.")
    return several[0] if several else 1


def _is_whole(value, lowest: int, highest: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and lowest <= value <= highest

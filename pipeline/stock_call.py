"""Stock's `__call__`: the five steps behind its arguments."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, cast

import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from diffusers.pipelines.qwenimage.pipeline_output import QwenImagePipelineOutput
from PIL import Image

from pipeline import vision_language
from pipeline.geometry import aspect, in_shape, same_shape
from pipeline.images import EditError, Pictures, download
from pipeline.sampling import Schedule
from pipeline.whole import Whole

MAX_SIDE = 4096
_OUTPUT_TYPES = ("pil", "np", "pt", "latent", "uint8")


class StockCall(Whole):
    """What a pipeline with the five steps needs to be called as stock's is."""

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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        *,
        reference_area: int | str | None = None,
    ) -> QwenImagePipelineOutput | tuple:
        """Stock's arguments and result; see `QwenImageEditPlusPipeline.__call__`.

        Beyond stock: `reference_area` as in `encode_references`, and with it any size, see `_output_size`; batches;
        `output_type` "uint8", a tensor (B, H, W, 3). `latents` are those of `initial_noise`. Raises EditError for what a
        person can change.
        """
        if output_type not in _OUTPUT_TYPES:
            raise EditError(f"The output type is {output_type!r}. Allowed: {', '.join(_OUTPUT_TYPES)}.")
        slots = self.open_references(image, most=None)
        width, height = self._output_size(width, height, slots, reference_area)
        if prompt_embeds is None:
            texts = prompt = vision_language.prompts(prompt, may_be_empty=False)
        else:
            texts = prompt_embeds
        grid_width, grid_height = self._grid(width, height)
        self.check_inputs(
            prompt, grid_height, grid_width, negative_prompt, prompt_embeds, negative_prompt_embeds, prompt_embeds_mask,
            negative_prompt_embeds_mask, list(callback_on_step_end_tensor_inputs), max_sequence_length,
        )  # fmt: skip
        self._guidance_scale, self._attention_kwargs, self._interrupt = guidance_scale, attention_kwargs or {}, False
        batch = common_batch([len(texts), *map(len, slots)])
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
                latents.to(self._execution_device, self._dtype("transformer")), references, prompt_embeds, mask, schedule,
                negative_prompt_embeds=negative, negative_mask=negative_mask, cfg_scale=true_cfg_scale,
                on_step_end=self._step_end(callback_on_step_end, callback_on_step_end_tensor_inputs, schedule, bar),
                transformer_kwargs=self._transformer_kwargs(),
            )  # fmt: skip
        images: Any = self._deliver(latents, width, height, output_type)  # stock's class names two of the five kinds
        self.maybe_free_model_hooks()
        return QwenImagePipelineOutput(images=images) if return_dict else (images,)

    def _output_size(
        self, width: int | None, height: int | None, slots: list[Pictures], area: int | str | None
    ) -> tuple[int, int]:
        """The output's size. With stock's area as stock: a side not given follows from a megapixel at the last
        reference's aspect, and both round down to 16. Else any whole number, and the first reference's shape: of a side
        that is not given, or of both, which then have the references' area ("output": that of `default_size`).
        """
        is_stock = area in (None, stock.VAE_IMAGE_SIZE)
        low = self._unit if is_stock else 1
        for name, side in (("width", width), ("height", height)):
            if not (side is None or is_whole(side, low, MAX_SIDE)):
                raise EditError(f"The {name} is {side!r}. Allowed: a whole number from {low} to {MAX_SIDE} pixels.")
        if is_stock:
            default = stock.calculate_dimensions(1024 * 1024, aspect(slots[-1].size))
            width, height = (own if own is not None else side for own, side in zip((width, height), default, strict=True))
            width, height = (side // self._unit * self._unit for side in (width, height))
        else:
            own = self.default_size**2 if isinstance(area, str) else area
            width, height = in_shape(slots[0].size, width=width, height=height, area=own, longest=MAX_SIDE)
            if area == "output" and not same_shape(slots[0].size, (width, height)):
                text = "The first picture, {}x{}, is scaled to {}x{}, another shape. Name one side only and it keeps its own."
                stock.logger.warning(text.format(*slots[0].size, width, height))
        self._check_size(width, height)
        return width, height

    def _step_end(self, callback: Callable | None, inputs: Sequence[str], schedule: Schedule, bar):
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
        kwargs: dict[str, Any] = {"attention_kwargs": self._attention_kwargs}
        if cast(Any, self.transformer.config).guidance_embeds:
            if self._guidance_scale is None:
                raise EditError("This model is guidance-distilled: guidance_scale is required.")
            kwargs["guidance"] = torch.full([1], self._guidance_scale, device=self._execution_device)
        elif self._guidance_scale is not None:
            stock.logger.warning("guidance_scale is ignored: this model is not guidance-distilled.")
        return kwargs

    def _deliver(self, latents: torch.Tensor, width: int, height: int, output_type: str | None):
        if output_type == "latent":
            return latents
        if output_type == "uint8":
            return self.decode(latents, width, height)
        if output_type == "pil":
            return [Image.fromarray(rgb) for rgb in download(self.decode(latents, width, height))]
        pixels = self._decode(latents, width, height)
        return pixels if output_type == "pt" else pixels.permute(0, 2, 3, 1).float().cpu().numpy()


def common_batch(sizes: list[int]) -> int:
    """The number of rows of what has one row or as many. Raises EditError."""
    several = sorted(set(sizes) - {1})
    if len(several) > 1:
        raise EditError(f"The batch does not fit together: {several} rows. Prompts and pictures: one, or one a row.")
    return several[0] if several else 1


def is_whole(value: object, lowest: int, highest: int) -> bool:
    """Whether `value` is a whole number (no bool) in the range, its ends included."""
    return isinstance(value, Integral) and not isinstance(value, bool) and lowest <= int(value) <= highest

"""What the engine needs of a pipeline: five steps and what surrounds them, and nothing else.

    encode_prompt -> encode_references -> schedule, initial_noise -> denoise (or start, advance) -> decode

A second family of models, or one pipeline spread over several GPUs, is an object that satisfies `Pipeline`. Frames in a
stream batch need `StreamBatchPipeline` too, and fades between prompts need `FadingPipeline`. All calls come from one
thread, except `cache_summary` and the attributes, which may be read from any. What the steps hand on (opened pictures,
references, schedules) is the pipeline's own: the engine only passes it from step to step, but for the parts named here.

Parameters in front of `/` are passed by position, those after `*` by name.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch


class TokenCache(Protocol):
    """Keys and values of one session's tokens, from frame to frame."""

    computed: np.ndarray  # bool (rows, columns): the tokens that the last frame computed

    def begin(self, changed: np.ndarray | None, neighbours: np.ndarray | None, /) -> None:
        """Before the first step of a frame: which tokens have changed and which are next to them; None means all."""

    def record_ahead(self) -> None:
        """Between two frames: prepares what a later frame may need."""

    def clear(self) -> None:
        """Forgets all keys and values."""


class Pipeline(Protocol):
    """A loaded model. Whatever a step raises fails the frame; an EditError's text is shown to the person."""

    @property
    def device(self) -> torch.device: ...

    @property
    def default_size(self) -> int:
        """The side in pixels of a square with the area of a result whose size is left open."""
        ...

    @property
    def description(self) -> dict[str, Any]:
        """For people and `/health`; "model" is its name."""
        ...

    @property
    def fast_path(self) -> Any:
        """None, or an object whose `report` is a list of NamedTuples (name, applied, reason).

        The engine sets its `look_every_s`: seconds within which a change of the model by other hands may stay unseen.
        """

    @property
    def fused_transformer(self) -> Any:
        """None if `token_cache` would raise."""

    def enable_fast_path(self) -> Sequence[tuple[str, bool, str]]:
        """Puts the exact accelerations in. For each: its name, whether it is in use, and why."""
        ...

    def cache_summary(self) -> dict[str, dict[str, int]]:
        """For each cache: entries, bytes, hits, misses."""
        ...

    def release_memory(self) -> None:
        """After an exhausted memory: gives back whatever can be computed again."""

    def open_references(self, images: list, /) -> list:
        """The pictures, uint8 (H, W, 3), as the next two steps take them; what is opened already stays as it is.

        On a GPU each has `on(device)`, the pixels there.
        """
        ...

    def encode_prompt(self, prompt: str, pictures: list, /) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings (1, L, D) of the prompt and the pictures, and a mask (1, L) or None."""
        ...

    def encode_references(self, pictures: list, /, *, area: str | None, width: int, height: int) -> Any:
        """The pictures for the denoiser, an object with `latents`; `area` is "output", or None for the stock area."""
        ...

    def schedule(self, steps: int, width: int, height: int, /) -> Any:
        """The noise levels: a dataclass with `sigmas`, `timesteps` (tensors) and `times` (a tuple of numbers)."""
        ...

    def initial_noise(self, width: int, height: int, seed: int, /) -> torch.Tensor:
        """Noise (1, N, C), the same for the same arguments."""
        ...

    def expect(self, times: Sequence[float], /) -> None:
        """Denoising will come to these times of a schedule: what is made once for each may be made now."""

    def denoise(
        self, latents: torch.Tensor, references: Any, prompt_embeds: torch.Tensor, mask: torch.Tensor | None, schedule: Any, /,
        *, negative_prompt_embeds: torch.Tensor | None, negative_mask: torch.Tensor | None, cfg_scale: float, cfg_mode: str,
        cfg_delta: float, token_cache: TokenCache | None, on_step: Callable[[int, int], None],
    ) -> torch.Tensor:  # fmt: skip
        """All steps: clean latents (1, N, C). Calls `on_step(i, n)` before each, which may raise to stop the frame."""
        ...

    def token_cache(self) -> TokenCache:
        """A new cache for `denoise`. Raises EditError where tokens cannot be reused."""
        ...

    def decode(self, latents: torch.Tensor, width: int, height: int, /) -> torch.Tensor:
        """Pictures, uint8 (1, height, width, 3), on `device`."""
        ...


class DenoisingPicture(Protocol):
    """One picture between its steps, as `start` makes it."""

    @property
    def step(self) -> int:
        """How many are done."""
        ...

    @property
    def steps(self) -> int: ...

    @property
    def finished(self) -> bool: ...

    @property
    def latents(self) -> torch.Tensor:
        """(1, N, C), clean when it is finished."""
        ...


class StreamBatchPipeline(Pipeline, Protocol):
    """A pipeline that denoises several pictures at different steps at once."""

    def start(
        self, latents: torch.Tensor, references: Any, prompt_embeds: torch.Tensor, mask: torch.Tensor | None, schedule: Any, /,
        *, negative_prompt_embeds: torch.Tensor | None, negative_mask: torch.Tensor | None, cfg_scale: float, cfg_mode: str,
        cfg_delta: float, token_cache: TokenCache | None,
    ) -> DenoisingPicture:  # fmt: skip
        """A picture before its first step; nothing runs yet."""
        ...

    def advance(self, pictures: list[Any], /) -> None:
        """One step of each picture that `start` made. If it raises, no picture has moved."""


class FadingPipeline(Pipeline, Protocol):
    """A pipeline whose embeddings can be mixed: the last rows are the prompt's words and the end of the template."""

    prompt_template_encode: str  # with {} in the place of the words

    @property
    def tokenizer(self) -> Callable[..., Any]:
        """Called with a text gives a mapping with "input_ids", one for each row."""
        ...

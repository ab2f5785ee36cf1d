"""What a session keeps from one frame to the next, and what one frame carries through its stages.

`SessionMemory` is one session's and is never shared. When a frame fails, `forget` empties it, so that nothing of a broken
frame reaches the next one. `Work` is one frame's: it is made when the frame is taken and dropped when it is delivered.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.contract import DenoisingPicture, TokenCache
from engine.errors import Cancelled
from engine.pace import Plan, plan_of
from engine.policies import MOTION_WINDOW
from engine.settings import EditParams
from engine.streams import Download, Stopwatch


class Embedding(NamedTuple):
    """What the vision-language model made of one prompt and the pictures; both None where there is no prompt."""

    embeds: torch.Tensor | None = None  # (1, L, D)
    mask: torch.Tensor | None = None  # (1, L); None if no row is padding


NO_EMBEDDING = Embedding()


@dataclasses.dataclass(eq=False)
class RenderedFrame:
    """A computed frame as later frames need it. `latents` and `image` are set by the stages that make them."""

    params: EditParams
    size: tuple[int, int]
    pictures: list[np.ndarray]  # as the model got them, padded to the grid: what moves is judged token by token
    thumbnails: list[np.ndarray]
    submitted_monotonic: float
    check: Callable[[], None] | None  # raises Cancelled if the image will never come; None when it is there
    latents: torch.Tensor = dataclasses.field(init=False, repr=False)  # clean, packed (1, N, C); set by the denoise
    image: np.ndarray | None = None  # uint8 (H, W, 3)

    @property
    def cancelled(self) -> bool:
        try:
            if self.check is not None:
                self.check()
        except Cancelled:
            return True
        return False


@dataclasses.dataclass(eq=False)
class Embeds:
    """The embeddings of the prompt and the negative prompt, made with the pictures whose thumbnails are here."""

    prompt: Embedding
    negative: Embedding
    words: tuple  # prompt, negative prompt, number of pictures
    thumbnails: list[np.ndarray]
    frames: int = 1  # that have used them

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (*self.prompt, *self.negative) if t is not None]


@dataclasses.dataclass(eq=False)
class PendingEmbeds:
    """Embeddings that are made in the background. `embeds` is set when they are queued; `ready` says when they may be read."""

    words: tuple
    pictures: list
    thumbnails: list[np.ndarray]
    embeds: Embeds | None = None
    after: torch.cuda.Event | None = None  # the input pictures are on the device; None on the CPU
    ready: torch.cuda.Event | None = None  # `embeds` may be read; None on the CPU


@dataclasses.dataclass(eq=False)
class Fade:
    """A fade from one prompt to the next: from the old words' embeddings (1, words, D), `done` of `frames` frames."""

    origin: torch.Tensor
    frames: int
    done: int = 0


@dataclasses.dataclass(eq=False)
class SessionMemory:
    """What a session's next frame may use again. Only the inference thread touches it."""

    newest: RenderedFrame | None = None  # the last frame that was begun, without skipped ones
    result: RenderedFrame | None = None  # the last one that was denoised
    skipped: int = 0  # frames in a row that repeat `newest`
    embeds: Embeds | None = None
    used: torch.Tensor | None = None  # the prompt's embeddings of the last frame, faded or not
    pending: PendingEmbeds | None = None
    fade: Fade | None = None
    motions: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=MOTION_WINDOW))
    strength: float = 1.0  # of what is kept from the last frame, by `policies.motion_strength`
    cache: TokenCache | None = None  # keys and values of the tokens, see fast_path.reuse
    cache_used_monotonic: float = 0.0
    cache_evicted: bool = False  # another session took it; the next result's notes must say so
    seen_with: tuple = ()  # settings, size and number of pictures for which `seen` holds
    # The pictures as each token saw them when it was last computed.
    seen: list[np.ndarray] = dataclasses.field(default_factory=list)

    def forget(self) -> None:
        """Drops everything that a later frame would build on: after a failure the next frame starts from nothing."""
        if self.cache is not None:
            self.cache.clear()
        self.newest = self.result = self.embeds = self.used = self.pending = self.fade = None
        self.seen_with, self.seen, self.skipped, self.strength = (), [], 0, 1.0
        self.motions.clear()


@dataclasses.dataclass(eq=False)
class Work:
    """One frame on its way through the stages. `check(step, steps)` raises Cancelled, or reports progress."""

    memory: SessionMemory
    images: list[np.ndarray]
    params: EditParams  # what is computed: as asked, or as pace picked
    size: tuple[int, int]  # width, height
    submitted_monotonic: float
    check: Callable[..., None]
    watch: Stopwatch
    notes: list[str] = dataclasses.field(default_factory=list)
    rendered: RenderedFrame = dataclasses.field(init=False, repr=False)  # what this frame computes; set by `FrameEditor.begin`
    repeats: RenderedFrame | None = None  # the earlier frame that this one repeats, if it is skipped
    prompt: Embedding = NO_EMBEDDING
    negative: Embedding = NO_EMBEDDING
    references: Any = None
    cache: TokenCache | None = None
    changed: np.ndarray | None = None  # bool (rows, columns), None = all
    computed: float = 1.0  # share of the tokens
    picture: DenoisingPicture | None = None  # in a stream batch
    finite: torch.Tensor | None = None
    ready: torch.cuda.Event | None = None  # the last stage's work is done on its stream; None on the CPU
    download: Download | None = None

    def let_go(self) -> None:
        """After a failure: drops everything that holds the device's memory."""
        self.picture = self.references = self.cache = self.download = self.finite = None
        self.prompt = self.negative = NO_EMBEDDING

    def keeps_step_with(self, other: "Work") -> bool:
        """Whether both can be in one stream batch."""
        return (self.size, self.params.steps) == (other.size, other.params.steps)

    @property
    def plan(self) -> Plan:
        return plan_of(self.params, self.size, len(self.images))

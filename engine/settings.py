"""What can be set: for a frame while the program runs, and for the engine when it is loaded.

The two dataclasses are the only home of a default, and LIMITS and CHOICES of what is allowed: the page, the HTTP schema
and the flags read them here.
"""

import dataclasses
import numbers
import reprlib
from collections.abc import Mapping
from typing import Any

from pipeline.geometry import TOKEN
from pipeline.images import EditError

LIMITS: dict[str, tuple[float, float]] = {  # both ends allowed
    "steps": (1, 8),
    "width": (1, 2048),
    "height": (1, 2048),
    "seed": (0, 2**32 - 1),
    "cfg_scale": (1.0, 10.0),
    "blend_ratio": (0.0, 1.0),
    "skip_threshold": (0.0, 0.9999),
    "max_skipped": (1, 1000),
    "embeds_every": (1, 1000),
    "embeds_threshold": (0.0, 1.0),
    "cfg_delta": (0.0, 2.0),
    "start_from_previous": (0.0, 0.9),
    "blend_still": (0.0, 1.0),
    "reuse_threshold": (0.0, 255.0),
    "reuse_most": (0.0, 1.0),
    "target_fps": (0.0, 120.0),
    "latency_budget_ms": (0.0, 10000.0),
    "transition_frames": (0, 120),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "fit": ("crop", "pad"),
    "mode": ("edit", "blend", "references"),
    "reference_area": ("output", "stock"),
    "skip_similar": ("off", "frame", "patch"),
    "embeds": ("fresh", "every", "changed", "kept"),
    "cfg_mode": ("full", "none", "batched", "self_negative", "onetime_negative"),
    "reuse": ("off", "steps", "frames"),
    "transition": ("linear", "spherical"),
}
SWITCHES = ("embeds_background", "stream_batch", "motion_aware")  # true or false
PICTURES: dict[str, tuple[int, int]] = {"edit": (1, 1), "blend": (2, 2), "references": (2, 3)}  # least, most
MAX_PROMPT_CHARS = 2000


def _number(name: str, value: Any, whole: bool) -> int | float:
    """`value` within LIMITS as a float, or as a whole number."""
    low, high = LIMITS[name]
    # NaN fails the comparison. For whole numbers 2.0 passes: JSON has one number type.
    good = isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= value <= high
    if good and (not whole or value % 1 == 0):
        return int(value) if whole else float(value)
    kind = "a whole number" if whole else "a number"
    raise EditError(f"{name} is {reprlib.repr(value)}. Allowed: {kind} from {low} to {high}.")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value.strip()) > MAX_PROMPT_CHARS:
        came = f"has {len(value.strip())} characters" if isinstance(value, str) else f"is {reprlib.repr(value)}"
        raise EditError(f"{name} {came}. Allowed: text of at most {MAX_PROMPT_CHARS} characters.")
    if any("\ud800" <= char <= "\udfff" for char in value):  # half a pair: JSON can carry it, no tokenizer takes it
        raise EditError(f"{name} contains a broken character. Allowed: valid Unicode text.")
    return value.strip()


def _switch(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise EditError(f"{name} is {reprlib.repr(value)}. Allowed: true, false.")


def _choice(name: str, value: Any) -> str:
    if isinstance(value, str) and value in CHOICES[name]:
        return value
    raise EditError(f"{name} is {reprlib.repr(value)}. Allowed: {', '.join(CHOICES[name])}.")


@dataclasses.dataclass(frozen=True)
class EditParams:
    """What is done to one frame. A bad value raises EditError, which names the value that came and the allowed ones."""

    prompt: str
    negative_prompt: str = ""  # read when cfg_scale > 1; empty stands for " ", as in Qwen's own examples
    steps: int = 2
    width: int | None = None  # pixels; without one of the two the result has the first picture's shape,
    height: int | None = None  # without both of them also the area of the model's default size
    seed: int = 0
    cfg_scale: float = 1.0  # true CFG; 1 = off, above it every step costs two passes
    fit: str = "crop"  # how a picture of another shape meets a given width and height
    mode: str = "edit"  # blend = two pictures are mixed by blend_ratio, then edited; references = all go to the model
    blend_ratio: float = 0.5  # 0 = the first picture only, 1 = the second only
    reference_area: str = "output"  # output = references at the output's area; stock = at 1024x1024
    skip_similar: str = "off"  # a frame like the last computed one repeats its result; by what measure: see `policies`
    skip_threshold: float = 0.98  # likeness from which frames are skipped, the likelier the more alike
    max_skipped: int = 10  # in a row
    embeds: str = "fresh"  # when the vision-language model looks at a frame anew: see `policies.looks_again`
    embeds_every: int = 5
    embeds_threshold: float = 0.95
    embeds_background: bool = False  # a renewal runs beside the frames; until it is there the last embeddings serve
    cfg_mode: str = "full"  # how guidance is computed where cfg_scale > 1: see `denoising`; none = not at all
    cfg_delta: float = 1.0  # magnitude of the residual noise in the two residual modes
    stream_batch: bool = False  # frames at different steps in one forward: one for each forward, shown `steps` later
    start_from_previous: float = 0.0  # share of the way at which a frame starts from the last result instead of noise
    blend_still: float = 0.0  # share of the last result that is kept where the picture is still
    motion_aware: bool = False  # the strength of these two falls with the motion: see `policies.motion_strength`
    reuse: str = "off"  # steps = references' keys and values of step 1 serve all; frames = also those of still tokens
    reuse_threshold: float = 6.0  # mean difference of a token's pixels, of 255, from which it counts as changed
    reuse_most: float = 0.6  # above this share of changed tokens all are computed
    target_fps: float = 0.0  # pace: the rate to hold; 0 = off
    latency_budget_ms: float = 0.0  # pace: the latency to hold; 0 = off
    transition_frames: int = 0  # a new prompt fades in over so many frames
    transition: str = "linear"

    def __post_init__(self):
        whole = ("steps", "width", "height", "seed", "max_skipped", "embeds_every", "transition_frames")
        for name in (field.name for field in dataclasses.fields(self)):
            value = getattr(self, name)
            if name in CHOICES:
                value = _choice(name, value)
            elif name in SWITCHES:
                value = _switch(name, value)
            elif name not in LIMITS:
                value = _text(name, value)
            elif not (name in ("width", "height") and value is None):
                value = _number(name, value, name in whole)
            object.__setattr__(self, name, value)
        if not self.prompt:
            raise EditError(f"prompt is empty. Allowed: 1 to {MAX_PROMPT_CHARS} characters that say what to change.")

    @property
    def guided(self) -> bool:
        """Whether guidance is computed at all."""
        return self.cfg_scale > 1 and self.cfg_mode != "none"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EditParams":
        """From JSON or a form. Raises EditError on an unknown key, a missing prompt, or a bad value."""
        if not isinstance(values, Mapping):
            raise EditError(f"The settings are {reprlib.repr(values)}. Allowed: an object of names and values.")
        allowed = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in allowed]
        if unknown:
            raise EditError(f"Unknown setting {reprlib.repr(unknown[0])}. Allowed: {', '.join(allowed)}.")
        return cls(**{"prompt": "", **values})

    def replace(self, **changes: Any) -> "EditParams":
        """A copy with these values changed, checked like a new one."""
        return EditParams.from_dict({**dataclasses.asdict(self), **changes})


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Load-time settings. A bad value raises ValueError."""

    max_sessions: int = 32
    idle_timeout_s: float = 60.0  # a session that neither sent nor got a frame for so long is freed
    default_size: int | None = None  # side of a square of the output's area when params leave it open; None = the model's own
    max_pixels: int = 2048 * 2048  # largest output, width * height
    fast_path: bool = True  # the pipeline's exact accelerations
    pipelining: bool = True  # encode of the next frame and decode of the last beside the denoise, on a GPU
    reuse_sessions: int = 2  # that may hold keys and values at a time: 3.3 GB each for the real model at 512x512

    def __post_init__(self):
        sizes = range(64, int(LIMITS["width"][1]) + 1, TOKEN)
        for name, good, allowed in (
            ("max_sessions", self.max_sessions >= 1, "from 1"),
            ("idle_timeout_s", 0 < self.idle_timeout_s <= 1e6, "above 0, at most 1e6"),
            ("default_size", self.default_size in (None, *sizes), f"None, or a multiple of {TOKEN} in {sizes}"),
            ("reuse_sessions", self.reuse_sessions >= 0, "from 0"),
            ("max_pixels", self.max_pixels >= sizes[0] ** 2, f"from {sizes[0] ** 2}"),
        ):
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}. Allowed: {allowed}.")

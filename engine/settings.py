"""What can be set: for a frame while the program runs, and for the engine when it is loaded.

The two dataclasses are the only home of a default and of a setting's meaning, LIMITS and CHOICES of what is allowed: the
page, the HTTP schema and the flags read them here.
"""

import dataclasses
import numbers
import reprlib
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from pipeline.geometry import TOKEN
from pipeline.images import EditError
from pipeline.sampling import CFG_MODES, MAX_CFG_DELTA

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
    "cfg_delta": (0.0, MAX_CFG_DELTA),
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
    "cfg_mode": CFG_MODES,
    "reuse": ("off", "steps", "frames"),
    "transition": ("linear", "spherical"),
}
SWITCHES = ("embeds_background", "stream_batch", "motion_aware")  # true or false
PICTURES: dict[str, tuple[int, int]] = {"edit": (1, 1), "blend": (2, 2), "references": (2, 3)}  # least, most
MAX_PROMPT_CHARS = 2000


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _number(name: str, value: Any, whole: bool) -> int | float:
    """`value` within LIMITS as a float, or as a whole number."""
    low, high = LIMITS[name]
    # NaN fails the comparison. For whole numbers 2.0 passes: JSON has one number type.
    good = _is_number(value) and low <= value <= high
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


def _means(text: str) -> dict[str, str]:
    """A field's metadata: its meaning, which `/docs` tells."""
    return {"means": text}


@dataclasses.dataclass(frozen=True)
class EditParams:
    """What is done to one frame. A bad value raises EditError, which names the value that came and the allowed ones."""

    prompt: str = field(metadata=_means("What to change, in words."))
    negative_prompt: str = field(
        default="",
        metadata=_means(
            'What not to do; read when cfg_scale is above 1. Empty stands for " ", as in Qwen\'s own examples.'
        ),
    )
    steps: int = field(default=2, metadata=_means("Denoising steps: more is better and slower."))
    width: int | None = field(
        default=None,
        metadata=_means(
            "Of the result, in pixels. With one of width and height, or neither, it has the first picture's shape, and "
            f"its other side too may have at most {LIMITS['width'][1]} pixels."
        ),
    )
    height: int | None = field(default=None, metadata=_means("Of the result, in pixels."))
    seed: int = field(default=0, metadata=_means("The same seed, picture and settings give the same result."))
    cfg_scale: float = field(default=1.0, metadata=_means("True CFG; 1 is off, above it every step costs twice."))
    fit: str = field(
        default="crop",
        metadata=_means(
            "How a picture of another shape meets a width and height that are both given: cut to fill, or shown "
            "whole on black; the notes say so. Never stretched."
        ),
    )
    mode: str = field(
        default="edit",
        metadata=_means(
            "blend: the two pictures are mixed by blend_ratio, then edited; references: all two or three go to the "
            "model, each whole and in its own shape."
        ),
    )
    blend_ratio: float = field(
        default=0.5,
        metadata=_means("0 is the first picture alone, 1 the second alone. Given with ref_image it means mode blend."),
    )
    reference_area: str = field(
        default="output",
        metadata=_means(
            "The size at which the model sees the pictures: the result's, or the megapixel of the stock pipeline."
        ),
    )
    skip_similar: str = field(  # see `policies.similarity`
        default="off",
        metadata=_means("Live views: a frame like the last computed one repeats its result; by which measure."),
    )
    skip_threshold: float = field(
        default=0.98,
        metadata=_means("The likeness from which frames are skipped; the more alike, the more likely."),
    )
    max_skipped: int = field(default=10, metadata=_means("Live views: most frames skipped in a row."))
    embeds: str = field(  # see `policies.looks_again`
        default="fresh",
        metadata=_means("Live views: when the vision-language model looks at a frame again."),
    )
    embeds_every: int = field(
        default=5,
        metadata=_means("With embeds every: it looks again after this number of frames."),
    )
    embeds_threshold: float = field(
        default=0.95,
        metadata=_means("With embeds changed: the likeness below which it looks again."),
    )
    embeds_background: bool = field(
        default=False,
        metadata=_means(
            "Live views: the next look at the frame is taken in the background; until it is done the last one is used."
        ),
    )
    cfg_mode: str = field(  # see `pipeline.denoising`
        default="full",
        metadata=_means(
            "How guidance is computed where cfg_scale is above 1. full and batched give equal results; self_negative "
            "and onetime_negative are cheaper and approximate; none turns guidance off."
        ),
    )
    cfg_delta: float = field(
        default=1.0,
        metadata=_means("With cfg_mode self_negative or onetime_negative: magnitude of the residual noise."),
    )
    stream_batch: bool = field(
        default=False,
        metadata=_means(
            "Live views: frames at different steps go through the model together. Each pass finishes one frame, "
            "which is shown later."
        ),
    )
    start_from_previous: float = field(
        default=0.0,
        metadata=_means("Live views: share of the way at which a frame starts from the last result. More is steadier."),
    )
    blend_still: float = field(
        default=0.0,
        metadata=_means("Live views: share of the last result that is kept where the picture is still."),
    )
    motion_aware: bool = field(  # see `policies.motion_strength`
        default=False,
        metadata=_means("Live views: start_from_previous and blend_still fall with the motion in the picture."),
    )
    reuse: str = field(
        default="off",
        metadata=_means(
            "Live views, approximate. steps: the references are read once for all steps; frames: also only what "
            "changed is computed."
        ),
    )
    reuse_threshold: float = field(
        default=6.0,
        metadata=_means(
            "With reuse frames: mean difference of a 16x16 token's pixels (0 to 255) from which it counts as changed."
        ),
    )
    reuse_most: float = field(
        default=0.6,
        metadata=_means("With reuse frames: above this share of changed tokens the whole frame is computed."),
    )
    target_fps: float = field(
        default=0.0,
        metadata=_means(
            "Live views: the rate to hold, 0 = off. Steps, size, stream batch and reuse are then chosen to hold it."
        ),
    )
    latency_budget_ms: float = field(
        default=0.0,
        metadata=_means("Live views: the latency to hold in milliseconds, 0 = off. With target_fps both are held."),
    )
    transition_frames: int = field(
        default=0,
        metadata=_means("Live views: a new prompt fades in over this number of frames."),
    )
    transition: str = field(
        default="linear",
        metadata=_means("How a prompt fades in: straight between the two embeddings, or along the arc."),
    )

    def __post_init__(self):
        whole = ("steps", "width", "height", "seed", "max_skipped", "embeds_every", "transition_frames")
        for name in (each.name for each in dataclasses.fields(self)):
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
        allowed = [each.name for each in dataclasses.fields(cls)]
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
    idle_timeout_s: float = 60.0  # a session that neither sent nor got a frame for this long is freed
    default_size: int | None = (
        None  # side of a square of the output's area when params leave it open; None = the model's own
    )
    max_pixels: int = 2048 * 2048  # largest output, width * height
    fast_path: bool = True  # the pipeline's exact accelerations
    pipelining: bool = True  # on a GPU, encode of the next frame and decode of the last during the denoise
    reuse_sessions: int = 2  # sessions that may hold keys and values at a time: 3.3 GB each for the real model at 512x512

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

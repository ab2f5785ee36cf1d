"""When to do less, and for whom next: the engine's decisions as pure functions.

What they depend on is passed in: times, pictures, a random number. So each can be read by itself and tested without a
clock, a camera or luck.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image

RATE_WINDOW_S = 10.0  # a frame rate is measured over this long, or over RATE_FRAMES frames, whichever is shorter
RATE_FRAMES = 31
THUMBNAIL = 64  # pixels on a side of what similarity is judged on: enough to see, and camera noise averages out
PATCHES = 16  # on a side: a mouth fills one of them


def next_session(served: Mapping[int, float], now_monotonic: float) -> int:
    """Whom to serve: of the waiting sessions {id: time of last service, or of opening}, the one that waited longest.

    A new session enters at the end and each service moves a session to the end, so every session is reached within as
    many frames as sessions are waiting. Equal waits go by the lower id, the session opened first.
    """
    return max(served, key=lambda key: (now_monotonic - served[key], -key))


def idle_sessions(active: Mapping[int, float], now_monotonic: float, timeout_s: float) -> list[int]:
    """Ids of the sessions {id: time of last activity} that have been quiet for `timeout_s` or longer."""
    return [key for key, time_s in active.items() if now_monotonic - time_s >= timeout_s]


def frame_rate(times: Iterable[float], now_monotonic: float, window_s: float = RATE_WINDOW_S) -> float:
    """Frames per second from the completion times of the last frames; falls towards 0 when they stop coming."""
    recent = [time_s for time_s in times if now_monotonic - time_s < window_s]
    if len(recent) < 2 or now_monotonic <= recent[0]:
        return 0.0
    return (len(recent) - 1) / (now_monotonic - recent[0])


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (64, 64, 3), each value the mean of its area."""
    small = Image.fromarray(picture).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def similarity(measure: str, now: np.ndarray, before: np.ndarray) -> float:
    """How alike two thumbnails are, at most 1.

    "frame" is StreamDiffusion's measure, the cosine of the angle between the pictures as vectors (section 3.5): right
    for a whole scene, and blind to a mouth that speaks in a still room. "patch" is 1 minus the mean absolute difference
    of that patch of 16 by 16 which changed most, on the scale from black to white.
    """
    if measure == "frame":
        length = float(np.linalg.norm(now) * np.linalg.norm(before))
        return 1.0 if length == 0 else float((now * before).sum() / length)
    patch = THUMBNAIL // PATCHES
    difference = np.abs(now - before).reshape(PATCHES, patch, PATCHES, patch, 3).mean(axis=(1, 3, 4))
    return 1.0 - float(difference.max()) / 255.0


def skips(alike: float, threshold: float, skipped: int, most: int, draw: float) -> bool:
    """StreamDiffusion's stochastic similarity filter: whether a frame repeats the last result instead of being computed.

    It is skipped with the probability max(0, (alike - threshold) / (1 - threshold)), `draw` in [0, 1) deciding, so that
    a slow change is not overlooked for ever; after `most` skipped frames in a row the next one is computed.
    """
    if skipped >= most:
        return False
    return draw < max(0.0, (alike - threshold) / (1.0 - threshold))


def embeds_anew(policy: str, frames: int, every: int, alike: float, threshold: float) -> bool:
    """Whether the vision-language model looks at this frame, or the embeddings of an earlier one serve.

    `frames` were computed since it last looked, at a picture that this one is `alike` to. "fresh": always; "every":
    after `every` frames; "changed": when the picture is less alike than `threshold`; "kept": not for this prompt.
    """
    return {"fresh": True, "every": frames >= every, "changed": alike < threshold, "kept": False}[policy]

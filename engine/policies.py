"""When to do less: what the engine decides by looking at pictures, as pure functions.

Everything they depend on is passed in: pictures, counts, a random number. So each can be read by itself and tested
without a camera or luck. Decisions about time are in `scheduling`.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipeline.geometry import TOKEN

THUMBNAIL = 64  # pixels on a side of what similarity is judged on: enough to see, and camera noise averages out
PATCHES = 16  # on a side: a mouth fills one of them
CONTRAST = 32.0  # of 255: pictures with less than this are compared as if they had it
BLOCK = 4  # pixels on a side of what a token's motion is judged on: their mean has a quarter of the camera's noise
MOTION_WINDOW = 5  # frames
MOTION_SCALE = 25.5  # root mean square difference of two frames, of 255, that is full motion
MOTION_RATE = 0.5  # of the moving average of the strength


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (64, 64, 3), each value the mean of its area."""
    small = Image.fromarray(picture).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def similarity(measure: str, now: np.ndarray, before: np.ndarray) -> float:
    """How alike two thumbnails are, at most 1.

    "frame" is for a whole scene, and nearly blind to a mouth that speaks in a still room: the lesser of two likenesses.
    One is StreamDiffusion's (section 3.5), the cosine of the angle between the pictures as vectors, their values centred
    as its filter has them: from -127.5 to 127.5. (Not centred, all light pictures are alike, and black is like
    everything.) CONTRAST is added to both as one more value, so that noise on an even grey, whose centred values are
    nearly 0, is not a turn of the vector. The other is of the light: 1 minus the difference of the colour channels'
    means on the scale from black to white, the largest of the three, which a cosine does not see.
    "patch" is 1 minus the mean absolute difference of that patch of 16 by 16 which changed most, on the same scale.
    """
    if measure == "frame":
        a, b = now.astype(np.float64) - 127.5, before.astype(np.float64) - 127.5
        floor = CONTRAST**2 * a.size
        cosine = ((a * b).sum() + floor) / np.sqrt((np.square(a).sum() + floor) * (np.square(b).sum() + floor))
        light = 1.0 - np.abs((now - before).mean(axis=(0, 1))).max() / 255.0
        return min(1.0, float(cosine), float(light))
    patch = THUMBNAIL // PATCHES
    difference = np.abs(now - before).reshape(PATCHES, patch, PATCHES, patch, 3).mean(axis=(1, 3, 4))
    return 1.0 - float(difference.max()) / 255.0


def least_similarity(measure: str, now: list[np.ndarray], before: list[np.ndarray]) -> float:
    """The smallest similarity of the pairs of thumbnails; 0 where there is nothing to compare."""
    if not now or len(now) != len(before):
        return 0.0
    return min(similarity(measure, *pair) for pair in zip(now, before, strict=True))


def skips(alike: float, threshold: float, skipped: int, most: int, draw: float) -> bool:
    """StreamDiffusion's stochastic similarity filter: whether a frame repeats the last result instead of being computed.

    It is skipped with the probability max(0, (alike - threshold) / (1 - threshold)), `draw` in [0, 1) deciding, so that
    a slow change is not overlooked for ever; after `most` skipped frames in a row the next one is computed.
    """
    if skipped >= most:
        return False
    return draw < max(0.0, (alike - threshold) / (1.0 - threshold))


def looks_again(policy: str, frames: int, every: int, alike: float, threshold: float) -> bool:
    """Whether the vision-language model looks at this frame, or the embeddings of an earlier one serve.

    `frames` were computed since it last looked; `alike` is the similarity of this picture to the one that it saw then.
    "fresh": always; "every": after `every` frames; "changed": below `threshold`; "kept": never again for this prompt.
    """
    return {"fresh": True, "every": frames >= every, "changed": alike < threshold, "kept": False}[policy]


# What moves: judged on the pictures as the model gets them, uint8 (H, W, 3), padded to multiples of 16


def changed_tokens(now: np.ndarray, seen: np.ndarray, threshold: float) -> np.ndarray:
    """Which tokens must be computed again: bool (H / 16, W / 16).

    A token has changed when the mean absolute difference of its 16x16 pixels from what it last saw reaches `threshold`
    (of 255).
    """
    difference = np.maximum(now, seen) - np.minimum(now, seen)  # uint8: no wider copy of a whole picture
    return _block_means(difference, TOKEN).mean(axis=2) >= threshold


def still_tokens(now: np.ndarray, before: np.ndarray, low: float = 3.0, high: float = 6.0) -> np.ndarray:
    """How still each token is, float32 (H / 16, W / 16): 1 up to a motion of `low`, 0 from `high` on.

    A token's motion is that of the 4x4-pixel block in it which changed most, on the block's mean: noise of a camera
    averages out in it (4.5 of 255 on a pixel is 1.1 on a block), an edge that moves does not. Neighbours of what moves
    are not still.
    """
    blocks = np.abs(_block_means(now, BLOCK) - _block_means(before, BLOCK)).mean(axis=2)
    per = TOKEN // BLOCK
    rows, columns = blocks.shape[0] // per, blocks.shape[1] // per
    motion = blocks.reshape(rows, per, columns, per).max(axis=(1, 3))
    motion = _largest_neighbour(motion)
    return np.clip((high - motion) / (high - low), 0.0, 1.0).astype(np.float32)


def motion(now: np.ndarray, before: np.ndarray) -> float:
    """Root mean square difference of two frames' thumbnails (of 255): d_t of StreamDiffusionV2 on pixels."""
    return float(np.sqrt(np.square(now - before).mean()))


def motion_strength(
    motions: Sequence[float], before: float, rate: float = MOTION_RATE, scale: float = MOTION_SCALE
) -> float:
    """How much of the last frame to keep, 1 on a still scene to 0 in full motion: StreamDiffusionV2's noise controller.

    arXiv 2511.07399, section 4.1: the frame differences d_i of a window are normalised by a scale and clipped,
    d = clip(max(d_i) / scale, 0, 1), and the strength follows them by an exponential moving average,
        s_t = rate (s_max - (s_max - s_min) d) + (1 - rate) s_(t-1),
    here with s_max = 1 and s_min = 0. There s is the share of noise that a frame starts from, which a video model fills
    from its memory of the frames before; here it is the share of the frame before itself. Both fall with the motion.
    """
    moved = min(max(max(motions, default=0.0) / scale, 0.0), 1.0)
    return rate * (1.0 - moved) + (1.0 - rate) * before


def neighbours(mask: np.ndarray) -> np.ndarray:
    """bool (rows, columns): the eight neighbours of each True that are not True themselves."""
    return _largest_neighbour(mask) & ~mask


def _largest_neighbour(values: np.ndarray) -> np.ndarray:
    """(rows, columns): the largest of each 3x3 neighbourhood."""
    rows, columns = values.shape
    padded = np.pad(values, 1, mode="edge")
    return np.max([padded[r : r + rows, c : c + columns] for r in range(3) for c in range(3)], axis=0)


def _block_means(picture: np.ndarray, side: int) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (H / side, W / side, 3)."""
    height, width = picture.shape[:2]
    # Down first, over whole rows: numpy adds long rows ten times as fast as it adds neighbours.
    down = np.add.reduce(picture.reshape(height // side, side, width * 3), axis=1, dtype=np.uint16)
    across = down.reshape(height // side, width // side, side, 3)
    return np.asarray(sum(across[:, :, i] for i in range(side)), np.float32) / side**2

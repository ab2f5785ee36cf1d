"""The edits the pocket model learns: how people ask for each, and the picture that is the right answer.

Why computed answers: with no large model to imitate, supervision has to be exact, so every edit here is a pure function
of the input picture. Each one is batched torch on (B, 3, H, W) float32 in [0, 1], on CPU or GPU, with no loop over the
batch, no randomness and no wait for the device, so training computes its targets while it runs.

Three rules shaped the looks:
- They differ in tone and colour, not in fine texture alone, because the evaluation asks of an output whether it is
  nearer to its own answer than to that of every other edit.
- Nothing finer than a few pixels: the VAE keeps 16 numbers for each 8 x 8 block.
- Every radius, width and cell follows min(H, W) / 256, so that the look is the same at 128 and at 384.

The phrasings come from `phrasings.py`. A tenth of each edit's never reaches training; `split` decides by a hash of the
words, without case and punctuation, so the two sides never share a sentence.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .phrasings import WORDINGS, expand, preset_prompts, words_of

Colour = tuple[float, float, float]

TINTS: dict[str, Colour] = {
    "red": (0.93, 0.10, 0.12),
    "orange": (1.00, 0.50, 0.02),
    "yellow": (0.98, 0.90, 0.05),
    "green": (0.08, 0.75, 0.15),
    "cyan": (0.02, 0.85, 0.90),
    "blue": (0.10, 0.28, 0.98),
    "purple": (0.52, 0.12, 0.85),
    "pink": (1.00, 0.42, 0.72),
}

DARK: dict[str, Colour] = {
    "black": (0.02, 0.02, 0.03),
    "navy": (0.02, 0.05, 0.42),
    "purple": (0.25, 0.02, 0.42),
    "maroon": (0.40, 0.02, 0.08),
    "teal": (0.00, 0.34, 0.38),
    "green": (0.00, 0.34, 0.10),
    "blue": (0.05, 0.15, 0.75),
}
LIGHT: dict[str, Colour] = {
    "gold": (1.00, 0.82, 0.20),
    "orange": (1.00, 0.58, 0.10),
    "cyan": (0.20, 0.95, 1.00),
    "cream": (1.00, 0.96, 0.82),
    "pink": (1.00, 0.55, 0.74),
    "yellow": (1.00, 0.95, 0.20),
    "lime": (0.70, 1.00, 0.15),
}
DUOTONES: tuple[tuple[str, str], ...] = (
    ("navy", "gold"),
    ("purple", "orange"),
    ("black", "cyan"),
    ("maroon", "cream"),
    ("teal", "pink"),
    ("blue", "pink"),
    ("purple", "cyan"),
    ("green", "yellow"),
    ("black", "orange"),
    ("blue", "lime"),
    ("maroon", "cyan"),
    ("teal", "cream"),
)


@dataclass(frozen=True)
class Edit:
    """One edit with all its parameters fixed: `answer` takes `pictures` tensors of one shape and returns that shape."""

    name: str
    family: str
    parameters: tuple[str, ...]
    pictures: int
    phrasings: tuple[str, ...]
    answer: Callable[..., Tensor]


# ---------------------------------------------------------------------------------------------- small image operations


@lru_cache(maxsize=256)
def _colour(rgb: Colour, device: torch.device) -> Tensor:
    """(3, 1, 1) constant, made once a device: a fresh one at each call would be a host-to-device copy."""
    with torch.inference_mode(False):
        return torch.tensor(rgb, dtype=torch.float32, device=device).view(3, 1, 1)


def _scale(x: Tensor) -> float:
    return min(x.shape[-2:]) / 256


def _luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), Rec. 601 weights."""
    return (x * _colour((0.299, 0.587, 0.114), x.device)).sum(1, keepdim=True)


def _saturate(x: Tensor, amount: float) -> Tensor:
    return torch.lerp(_luma(x), x, amount)


def _smoothstep(x: Tensor, low: float, high: float) -> Tensor:
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, `sigma` in pixels of a 256-pixel picture; edges mirrored."""
    sigma = sigma * _scale(x)
    radius = max(1, min(int(3 * sigma + 0.5), min(x.shape[-2:]) - 1))
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype) / sigma) ** 2)
    taps = taps / taps.sum()
    flat = F.pad(x.reshape(-1, 1, *x.shape[-2:]), (radius,) * 4, mode="reflect")
    flat = F.conv2d(F.conv2d(flat, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))
    return flat.view(x.shape)


def _box(x: Tensor, radius: int) -> Tensor:
    """Mean over a (2 radius + 1) square, cut at the picture's edge; two 1-D passes."""
    size = 2 * radius + 1
    x = F.avg_pool2d(x, (1, size), 1, (0, radius), count_include_pad=False)
    return F.avg_pool2d(x, (size, 1), 1, (radius, 0), count_include_pad=False)


def _flatten(x: Tensor, radius: float, eps: float) -> Tensor:
    """Self-guided filter (He, Sun and Tang, 2010): smooths what varies less than `eps`, keeps strong edges."""
    r = max(1, round(radius * _scale(x)))
    mean = _box(x, r)
    variance = (_box(x * x, r) - mean * mean).clamp_min(0)
    gain = variance / (variance + eps)
    return _box(gain, r) * x + _box(mean * (1 - gain), r)


def _brush(x: Tensor, radius: float) -> Tensor:
    """Kuwahara filter: of the four squares that touch a pixel, the calmer ones give its colour (soft choice)."""
    r = max(1, round(radius * _scale(x)))
    padded = F.pad(x, (r,) * 4, mode="reflect")
    both = F.avg_pool2d(F.avg_pool2d(torch.cat([padded, padded * padded], 1), (1, r + 1), 1), (r + 1, 1), 1)
    mean, square = both.chunk(2, 1)
    variance = (square - mean * mean).sum(1, keepdim=True).clamp_min(0)
    height, width = x.shape[-2:]
    corners = [(slice(i, i + height), slice(j, j + width)) for i in (0, r) for j in (0, r)]
    weights = torch.stack([(variance[..., i, j] + 1e-4) ** -3 for i, j in corners])
    means = torch.stack([mean[..., i, j] for i, j in corners])
    return (weights * means).sum(0) / weights.sum(0)


def _edges(x: Tensor, sigma: float) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W): the strongest gradient over the channels, per 1/256 of the picture."""
    x = F.pad(_blur(x, sigma), (1, 1, 1, 1), mode="replicate")
    dx = x[..., 1:-1, 2:] - x[..., 1:-1, :-2]
    dy = x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
    return (dx * dx + dy * dy).amax(1, keepdim=True).clamp_min(1e-12).sqrt() * (0.5 * _scale(x))


def _levels(x: Tensor, count: int, sharpness: float = 6.0) -> Tensor:
    """Posterise to `count` levels with soft steps: a hard step would turn a rounding error into a new level."""
    scaled = x.clamp(0, 1) * (count - 1)
    base = scaled.floor()
    step = torch.sigmoid((scaled - base - 0.5) * 2 * sharpness)
    return (base + step) / (count - 1)


def _gradient_map(tone: Tensor, stops: tuple[tuple[float, Colour], ...]) -> Tensor:
    """(B, 1, H, W) tone in [0, 1] -> colours, linear between the stops."""
    out = _colour(stops[0][1], tone.device).expand(tone.shape[0], 3, *tone.shape[-2:])
    for (low, start), (high, end) in pairwise(stops):
        step = tuple(b - a for a, b in zip(start, end, strict=True))
        out = out + _colour(step, tone.device) * ((tone - low) / (high - low)).clamp(0, 1)
    return out


def _coordinates(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row (H, 1) and column (1, W) positions at pixel centres, in [0, 1]."""
    height, width = x.shape[-2:]
    rows = (torch.arange(height, device=x.device, dtype=x.dtype) + 0.5) / height
    columns = (torch.arange(width, device=x.device, dtype=x.dtype) + 0.5) / width
    return rows[:, None], columns[None, :]


def _vignette(x: Tensor, start: float, end: float) -> Tensor:
    """(H, W): 0 in the middle, 1 in the corners."""
    v, u = _coordinates(x)
    return _smoothstep((((u - 0.5) * 2) ** 2 + ((v - 0.5) * 2) ** 2).sqrt(), start, end)


def _finish(x: Tensor) -> Tensor:
    return x.clamp(0, 1)


# ------------------------------------------------------------------------------------------- answers from one picture


def keep_unchanged(x: Tensor) -> Tensor:
    return x.clone()


def mirror(x: Tensor) -> Tensor:
    return x.flip(-1)


def upside_down(x: Tensor) -> Tensor:
    """Top and bottom swapped; left stays left."""
    return x.flip(-2)


def black_and_white(x: Tensor) -> Tensor:
    return _finish(_luma(x)).expand_as(x).contiguous()


def sepia(x: Tensor) -> Tensor:
    return _gradient_map(_luma(x), ((0.0, (0.10, 0.05, 0.02)), (0.5, (0.56, 0.41, 0.25)), (1.0, (1.0, 0.94, 0.78))))


def negative(x: Tensor) -> Tensor:
    return 1 - x


def warm_sunset(x: Tensor) -> Tensor:
    """Low sun from the horizon: purple above, orange glow across the middle, red-brown below."""
    v, _ = _coordinates(x)
    sky = _gradient_map(
        v[None, None],
        ((0.0, (0.72, 0.42, 0.80)), (0.35, (1.25, 0.62, 0.42)), (0.6, (1.30, 0.75, 0.30)), (1.0, (0.95, 0.48, 0.30))),
    )
    lit = torch.lerp(_luma(x), x, 0.65) * sky
    glow = torch.exp(-(((v - 0.5) / 0.22) ** 2)) * 0.30
    return _finish(1 - (1 - lit.clamp(0, 1)) * (1 - glow * _colour((1.0, 0.55, 0.12), x.device)))


def moonlit_night(x: Tensor) -> Tensor:
    """Dark and blue, nearly without colour, with a moon in the upper right."""
    night = _gradient_map(
        _luma(_saturate(x, 0.3)) ** 1.2,
        ((0.0, (0.01, 0.02, 0.08)), (0.5, (0.10, 0.17, 0.36)), (1.0, (0.42, 0.55, 0.78))),
    )
    height, width = x.shape[-2:]
    size = min(height, width)
    v, u = _coordinates(x)
    distance = (((u - 1) * width / size + 0.20) ** 2 + (v * height / size - 0.20) ** 2).sqrt()
    glow = torch.exp(-((distance / 0.22) ** 2)) * 0.45 * _colour((0.60, 0.75, 1.0), x.device)
    lit = 1 - (1 - night) * (1 - glow)
    disc = 1 - _smoothstep(distance, 0.075, 0.095)
    return _finish(torch.lerp(lit, _colour((0.96, 0.97, 0.90), x.device), disc))


def pencil_sketch(x: Tensor) -> Tensor:
    """Grey lines on paper by colour dodge, with light shading where the picture is dark."""
    grey = _luma(x)
    lines = ((_blur(grey, 0.9) + 0.08) / (_blur(grey, 5.0) + 0.08)).clamp(0, 1) ** 2.2
    shade = 0.55 + 0.45 * _smoothstep(_blur(grey, 2.0), -0.05, 0.5)
    return _finish(lines * shade * _colour((0.97, 0.965, 0.945), x.device) + 0.03)


def cartoon(x: Tensor) -> Tensor:
    """Flat bright colours in five steps of light, dark outlines."""
    flat = _flatten(_flatten(x, 5, 0.01), 5, 0.01)
    tone = _luma(flat)
    flat = flat * ((_levels(tone**0.8, 5) + 0.05) / (tone + 0.05))
    flat = _saturate(flat, 1.7).clamp(0, 1)
    lines = _smoothstep(_edges(_flatten(x, 2, 0.003), 1.0), 0.035, 0.10)
    wide = 2 * max(1, round(_scale(x))) - 1
    lines = _blur(F.max_pool2d(lines, wide, 1, wide // 2), 0.7)
    return _finish(torch.lerp(flat, _colour((0.04, 0.03, 0.06), x.device), lines.clamp(0, 1)))


def oil_painting(x: Tensor) -> Tensor:
    """Strokes of one colour, deep and saturated, under an old golden varnish, with light on the ridges of the paint."""
    paint = _brush(_brush(x, 5), 4)
    tone = _luma(paint)
    shift = max(1, round(2 * _scale(x)))
    around = F.pad(_blur(tone, 1.0), (shift,) * 4, mode="replicate")
    ridge = around[..., 2 * shift :, 2 * shift :] - around[..., : -2 * shift, : -2 * shift]
    paint = _saturate(paint, 1.9) * 1.05 - 0.06 + 0.35 * ridge
    return _finish(paint * _colour((1.06, 0.92, 0.66), x.device) + _colour((0.03, 0.01, 0.0), x.device))


def watercolour(x: Tensor) -> Tensor:
    """Thin bright washes with darker rims, fading into white paper before the edge of the sheet."""
    wash = _saturate(_brush(_flatten(x, 4, 0.01), 4), 1.35).clamp(0, 1)
    wash = 1 - 0.72 * (1 - wash)
    rim = _smoothstep(_edges(wash, 1.2), 0.01, 0.09)
    v, u = _coordinates(x)
    pool = 0.05 * torch.sin(7.1 * u + 2.3 * v + 0.6) * torch.sin(5.3 * v - 3.1 * u + 1.9)
    wash = (wash * (1 - 0.32 * rim) + pool).clamp(0, 1)
    wobble = 0.018 * (torch.sin(21.0 * u + 3 * v) + torch.sin(17.0 * v + 1.3 + 4 * u))
    border = torch.minimum(torch.minimum(u, 1 - u), torch.minimum(v, 1 - v)) + wobble
    return _finish(torch.lerp(_colour((0.985, 0.975, 0.95), x.device), wash, _smoothstep(border, 0.03, 0.13)))


def pixel_art(x: Tensor) -> Tensor:
    """32 cells along the short side (8 pixels at 256), few bright colours."""
    height, width = x.shape[-2:]
    cell = min(height, width) / 32
    small = F.adaptive_avg_pool2d(x, (round(height / cell), round(width / cell)))
    small = _levels(_saturate((small - 0.5) * 1.2 + 0.5, 1.7), 6)
    return _finish(F.interpolate(small, (height, width), mode="nearest"))


def neon_edges(x: Tensor) -> Tensor:
    """Glowing lines on near black, magenta in the upper left to cyan in the lower right."""
    core = _smoothstep(_edges(_flatten(x, 2, 0.001), 1.3), 0.012, 0.085)
    glow = _blur(core, 5.0)
    v, u = _coordinates(x)
    colour = _gradient_map(
        ((u + v) / 2)[None, None], ((0.15, (1.0, 0.08, 0.75)), (0.5, (0.55, 0.25, 1.0)), (0.85, (0.0, 0.90, 1.0)))
    )
    light = colour * (0.9 * core + 0.9 * glow) + 0.35 * core**2
    return _finish(light + _colour((0.02, 0.01, 0.06), x.device))


def thermal_camera(x: Tensor) -> Tensor:
    stops = (
        (0.00, (0.00, 0.00, 0.15)),
        (0.20, (0.20, 0.00, 0.55)),
        (0.40, (0.70, 0.02, 0.60)),
        (0.60, (0.98, 0.30, 0.10)),
        (0.80, (1.00, 0.80, 0.05)),
        (1.00, (1.00, 1.00, 0.85)),
    )
    return _gradient_map(_blur(_luma(x), 1.5), stops)


def vintage_film(x: Tensor) -> Tensor:
    """Faded: lifted blacks, weak colour, green-yellow cast, dark corners, a light leak at the left."""
    faded = _saturate(x, 0.55) * 0.62 * _colour((1.02, 1.0, 0.80), x.device) + _colour((0.17, 0.19, 0.17), x.device)
    faded = faded * (1 - 0.65 * _vignette(x, 0.65, 1.40))
    v, u = _coordinates(x)
    leak = torch.exp(-(((u + 0.02) / 0.16) ** 2)) * (0.75 + 0.25 * torch.sin(5.0 * v + 0.5))
    return _finish(1 - (1 - faded) * (1 - 0.6 * leak * _colour((1.0, 0.38, 0.10), x.device)))


def emboss(x: Tensor) -> Tensor:
    """Grey relief lit from the upper left."""
    shift = max(1, round(2 * _scale(x)))
    grey = F.pad(_blur(_luma(x), 0.9), (shift,) * 4, mode="replicate")
    relief = grey[..., 2 * shift :, 2 * shift :] - grey[..., : -2 * shift, : -2 * shift]
    return _finish(0.5 + 0.9 * relief).expand_as(x).contiguous()


def soft_glow(x: Tensor) -> Tensor:
    """Dreamy: the picture screened with a wide blur of itself, pale and slightly rosy."""
    bloom = _blur(_saturate(x, 1.15).clamp(0, 1), 8.0)
    soft = 1 - (1 - torch.lerp(_blur(x, 1.2), x, 0.4)) * (1 - 0.62 * bloom)
    return _finish(soft * 0.90 + _colour((0.10, 0.06, 0.085), x.device))


def high_contrast(x: Tensor) -> Tensor:
    """A steep curve around the picture's own mean light, richer colour."""
    middle = _luma(x).mean((-2, -1), keepdim=True).clamp(0.3, 0.65)
    return _finish(_saturate(torch.sigmoid((x - middle) * 9.0), 1.15))


def tint(x: Tensor, colour: Colour) -> Tensor:
    """One hue over the whole picture, light and shade kept: black, through the colour at its own luma, to white."""
    own = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    tone = _luma(x)
    toned = _gradient_map(tone, ((0.0, (0.0, 0.0, 0.0)), (own, colour), (1.0, (1.0, 1.0, 1.0))))
    return _finish(toned + 0.12 * (x - tone))


def duotone(x: Tensor, dark: Colour, light: Colour) -> Tensor:
    """Shadows in one colour, lights in another, after a mild stretch of contrast."""
    return _gradient_map(_smoothstep(_luma(x), -0.12, 1.12), ((0.0, dark), (1.0, light)))


# ------------------------------------------------------------------------------------------ answers from two pictures


def side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """Left half picture 1, right half picture 2, each the middle half of its own width."""
    half = first.shape[-1] // 2
    start = half // 2
    return torch.cat([first[..., start : start + half], second[..., start : start + half]], -1)


def blend(first: Tensor, second: Tensor) -> Tensor:
    return torch.lerp(first, second, 0.5)


def colour_transfer(first: Tensor, second: Tensor) -> Tensor:
    """Picture 1 with picture 2's mean and spread in an opponent colour space (after Reinhard et al., 2001)."""
    forward = torch.cat([_colour(row, first.device).view(1, 3) for row in _OPPONENT])
    backward = torch.cat([_colour(row, first.device).view(1, 3) for row in _RGB])
    a, b = (torch.einsum("oc,bchw->bohw", forward, x) for x in (first, second))
    mean_a, mean_b = (x.mean((-2, -1), keepdim=True) for x in (a, b))
    # The ratio is bounded: a flat picture 1 must not turn its last grey levels into noise.
    ratio = ((b.std((-2, -1), keepdim=True) + 0.01) / (a.std((-2, -1), keepdim=True) + 0.01)).clamp(0.4, 2.5)
    return _finish(torch.einsum("oc,bchw->bohw", backward, (a - mean_a) * ratio + mean_b))


_OPPONENT: tuple[Colour, ...] = ((1 / 3, 1 / 3, 1 / 3), (0.5, 0.0, -0.5), (-0.25, 0.5, -0.25))
_RGB: tuple[Colour, ...] = ((1.0, 1.0, -2 / 3), (1.0, 0.0, 4 / 3), (1.0, -1.0, -2 / 3))


def corner(first: Tensor, second: Tensor) -> Tensor:
    """Picture 2 at about a third of the size in picture 1's lower right corner, in a thin white frame."""
    unit = max(1, round(4 * _scale(first)))  # the frame's width; 4 at 256
    height, width = (max(8, round(n / 3 / 8 + 0.25) * 8) for n in first.shape[-2:])
    inset = F.interpolate(second, (height, width), mode="bilinear", antialias=True, align_corners=False)
    framed = F.pad(inset, (unit,) * 4, value=1.0)
    out = first.clone()
    bottom, right = first.shape[-2] - 2 * unit, first.shape[-1] - 2 * unit
    out[..., bottom - framed.shape[-2] : bottom, right - framed.shape[-1] : right] = framed
    return _finish(out)


# ------------------------------------------------------------------------------------------------------------ the list

_ANSWERS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "black and white": (1, black_and_white),
    "sepia": (1, sepia),
    "negative": (1, negative),
    "warm sunset": (1, warm_sunset),
    "moonlit night": (1, moonlit_night),
    "pencil sketch": (1, pencil_sketch),
    "cartoon": (1, cartoon),
    "oil painting": (1, oil_painting),
    "watercolour": (1, watercolour),
    "pixel art": (1, pixel_art),
    "neon edges": (1, neon_edges),
    "thermal camera": (1, thermal_camera),
    "vintage film": (1, vintage_film),
    "emboss": (1, emboss),
    "soft glow": (1, soft_glow),
    "high contrast": (1, high_contrast),
    "mirror": (1, mirror),
    "upside down": (1, upside_down),
    "keep unchanged": (1, keep_unchanged),
    "side by side": (2, side_by_side),
    "blend": (2, blend),
    "colour transfer": (2, colour_transfer),
    "corner": (2, corner),
}


def _build() -> tuple[Edit, ...]:
    edits = [Edit(n, n, (), pictures, expand(WORDINGS[n]), answer) for n, (pictures, answer) in _ANSWERS.items()]
    for c, rgb in TINTS.items():
        edits.append(Edit(f"tint {c}", "tint", (c,), 1, expand(WORDINGS["tint"], c=c), partial(tint, colour=rgb)))
    for a, b in DUOTONES:
        answer = partial(duotone, dark=DARK[a], light=LIGHT[b])
        edits.append(Edit(f"duotone {a} {b}", "duotone", (a, b), 1, expand(WORDINGS["duotone"], a=a, b=b), answer))
    return tuple(sorted(edits, key=lambda edit: edit.pictures))


EDITS: tuple[Edit, ...] = _build()


def split(edit: Edit) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(training, held out): a tenth of the edit's sentences, at least one, chosen by a hash of their words."""

    def rank(words: str) -> bytes:
        return hashlib.sha256(f"{edit.name}: {words}".encode()).digest()

    sentences = sorted({words_of(phrasing) for phrasing in edit.phrasings}, key=rank)
    # The page offers its presets as examples: they are always taught.
    presets = {words_of(prompt) for _, prompt in preset_prompts()}
    sentences = [words for words in sentences if words not in presets]
    held = set(sentences[: max(1, round(len(sentences) / 10))])
    training = tuple(p for p in edit.phrasings if words_of(p) not in held)
    return training, tuple(p for p in edit.phrasings if words_of(p) in held)

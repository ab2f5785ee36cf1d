"""From photographs to training batches: cropped, edited, encoded, and put into words, on the GPU.

The VAE runs here as 2-D convolutions: it sees single frames, so only the last temporal slice of each causal convolution
is ever used. Batches of computed pairs are kept in a pool and used about `REUSE` times each, with new noise and new
phrasings each time. Most batches hold prompts of one length: a padding mask throws attention off its fast path.
"""

import itertools
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageRMS_norm
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE, calculate_dimensions
from torch import Tensor

from pocket_model import build
from pocket_model.edits import EDITS
from pocket_model.photos import procedural, random_crops

PREFIX = 64
REUSE = 6
POOL = 48
# (width, height), number of pictures, batch size, how often.
SHAPES = (
    ((256, 256), 1, 64, 0.64),
    ((256, 256), 2, 40, 0.20),
    ((128, 128), 1, 96, 0.03),
    ((128, 128), 2, 64, 0.01),
    ((384, 384), 1, 28, 0.03),
    ((288, 224), 1, 64, 0.04),
    ((224, 288), 1, 64, 0.02),
    ((336, 192), 1, 64, 0.02),
    ((288, 224), 2, 40, 0.01),
)
LENGTHS = (5, 6, 7, 8)  # tokens of a prompt in most batches
# Turning a picture is learnt more slowly than colouring it, and the two-picture edits share one shape.
FAMILY_WEIGHT = {"mirror": 2.5, "upside down": 2.5, "tint": 3.0, "duotone": 3.5, "corner": 1.5, "side by side": 1.5}


def single_frame(vae):
    """Lets the causal 3-D convolutions of `vae` run as 2-D ones (the same result for one frame) and zeroes unused slices."""

    def forward(self, x, cache_x=None):
        padding = (self._padding[2], self._padding[0])
        out = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], padding)
        return out.unsqueeze(2)

    def norm(self, x):  # one kernel instead of eight
        out = F.rms_norm(x.movedim(1, -1), (x.shape[1],), self.gamma.flatten(), eps=1e-12)
        return out.movedim(-1, 1)

    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            with torch.no_grad():
                module.weight[:, :, :-1].zero_()
            module.forward = forward.__get__(module)
        elif isinstance(module, QwenImageRMS_norm):
            module.forward = norm.__get__(module)
    return vae


def vae_moments(vae, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) in [0, 1] -> mean and log-variance, each (B, 16, H/8, W/8)."""
    x = (pictures * 2 - 1).to(next(vae.parameters()).dtype)
    x = x.unsqueeze(2).contiguous(memory_format=torch.channels_last_3d)
    return vae.quant_conv(vae.encoder(x))[:, :, 0].float().chunk(2, dim=1)


def vae_decode(vae, latents: Tensor) -> Tensor:
    """(B, 16, h, w) -> (B, 3, 8h, 8w) in [0, 1], not clamped."""
    x = latents.to(next(vae.parameters()).dtype).unsqueeze(2).contiguous(memory_format=torch.channels_last_3d)
    return vae.decoder(vae.post_quant_conv(x))[:, :, 0].float() / 2 + 0.5


def source_pictures(photos, batch: int, height: int, width: int, generator, device, smallest: float = 1 / 3) -> Tensor:
    """(B, 3, H, W): photographs (see `random_crops` for `smallest`), every seventh a procedural picture."""
    drawn = max(1, batch // 7)
    crops = random_crops(photos, batch - drawn, height, width, generator, smallest)
    return torch.cat([crops, procedural(drawn, height, width, generator, device)])[
        torch.randperm(batch, generator=generator, device=device)
    ].clamp(0, 1)


def answer(edit, first: Tensor, second: Tensor) -> Tensor:
    return edit.answer(first) if edit.pictures == 1 else edit.answer(first, second)


def pack(latents: Tensor) -> Tensor:
    """(B, 16, h, w) -> (B, h/2 * w/2, 64), as the stock pipeline packs."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), c * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, h/2 * w/2, 64) -> (B, 16, height / 8, width / 8)."""
    b, _, c = tokens.shape
    x = tokens.view(b, height // 16, width // 16, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c // 4, height // 8, width // 8)


def vision_patches(pictures: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """(B, 3, H, W) in [0, 1] -> the VLM's patches (B, L, 3 * 2 * P * P) in Qwen's order, and the grid in patches."""
    height, width = pictures.shape[-2:]
    width, height = calculate_dimensions(CONDITION_IMAGE_SIZE, width / height)
    unit = build.PATCH * build.MERGE
    height, width = round(height / unit) * unit, round(width / unit) * unit
    x = F.interpolate(pictures, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    mean = x.new_tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = x.new_tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    x = (x - mean) / std
    m, p = build.MERGE, build.PATCH
    gh, gw = height // p, width // p
    x = x.view(-1, 3, gh // m, m, p, gw // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)  # (B, gh/m, gw/m, m, m, 3, P, P)
    x = x.reshape(x.shape[0], gh * gw, 3, 1, p, p).expand(-1, -1, -1, 2, -1, -1)
    return x.reshape(x.shape[0], gh * gw, -1), (gh, gw)


class Phrasebook:
    """The edits' phrasings as token rows (ids padded on the right) for a given number of pictures and vision grid."""

    def __init__(self, tokenizer, phrasings: dict[str, tuple[str, ...]], device):
        self.tokenizer, self.phrasings, self.device = tokenizer, phrasings, device
        self.cache: dict = {}
        self.lengths: dict = {}
        self.longest = max(len(ids) for ps in phrasings.values() for ids in tokenizer(list(ps))["input_ids"])

    def rows(self, name: str, pictures: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """ids (N, L) and validity (N, L) of all phrasings of the edit, for `pictures` pictures of `grid` patches."""
        key = (name, pictures, grid)
        if key not in self.cache:
            pads = "<|image_pad|>" * (grid[0] * grid[1] // build.MERGE**2)
            shown = "".join(f"Picture {i + 1}: <|vision_start|>{pads}<|vision_end|>" for i in range(pictures))
            end = "<|im_end|>\n<|im_start|>assistant\n"
            texts = [build.template_prefix() + shown + p + end for p in self.phrasings[name]]
            ids = self.tokenizer(texts)["input_ids"]
            length = self.length(pictures, grid)
            pad = self.tokenizer.convert_tokens_to_ids("<|endoftext|>")
            assert max(map(len, ids)) <= length, (name, max(map(len, ids)), length)
            rows = torch.tensor([row + [pad] * (length - len(row)) for row in ids], device=self.device)
            valid = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], device=self.device).bool()
            self.cache[key] = rows, valid
        return self.cache[key]

    def length(self, pictures: int, grid: tuple[int, int]) -> int:
        used = PREFIX + pictures * (grid[0] * grid[1] // build.MERGE**2 + 8) + self.longest + 6
        return -(-used // 8) * 8

    def by_length(self, name: str) -> dict[int, list[int]]:
        """Prompt length in tokens -> which phrasings of the edit have it."""
        if name not in self.lengths:
            table: dict[int, list[int]] = {}
            for i, ids in enumerate(self.tokenizer(list(self.phrasings[name]))["input_ids"]):
                table.setdefault(len(ids), []).append(i)
            self.lengths[name] = table
        return self.lengths[name]

    def draw_even(self, names: list[str], pictures: int, grid: tuple[int, int]) -> Tensor | None:
        """Phrasings of one random length for all: ids (B, L) without padding; None if the edits share no such length."""
        tables = {name: self.by_length(name) for name in names}
        shared = [n for n in LENGTHS if all(n in table for table in tables.values())]
        if not shared:
            return None
        length = random.choice(shared)
        picks = torch.tensor([random.choice(tables[name][length]) for name in names]).to(self.device)
        where = torch.tensor([self.offset(name, pictures, grid) for name in names]).to(self.device)
        rows = self.all_rows(pictures, grid)[where + picks]
        first = self.rows(names[0], pictures, grid)[1][tables[names[0]][length][0]]
        return rows[:, : int(self.valid_length(names[0], pictures, grid, tables[names[0]][length][0], first))]

    def valid_length(self, name, pictures, grid, row, valid) -> int:
        key = ("valid", name, pictures, grid, row)
        if key not in self.cache:
            self.cache[key] = int(valid.sum())
        return self.cache[key]

    def all_rows(self, pictures: int, grid: tuple[int, int]) -> Tensor:
        key = ("all", pictures, grid)
        if key not in self.cache:
            self.cache[key] = torch.cat([self.rows(name, pictures, grid)[0] for name in self.phrasings])
        return self.cache[key]

    def offset(self, name: str, pictures: int, grid: tuple[int, int]) -> int:
        key = ("offset", pictures, grid)
        if key not in self.cache:
            counts = [len(self.phrasings[n]) for n in self.phrasings]
            self.cache[key] = dict(zip(self.phrasings, itertools.accumulate([0, *counts])))
        return self.cache[key][name]

    def draw(self, names: list[str], pictures: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """One random phrasing for each name: ids and validity, each (B, L)."""
        books = [self.rows(name, pictures, grid) for name in names]
        picks = [random.randrange(len(ids)) for ids, _ in books]
        return (
            torch.stack([ids[i] for (ids, _), i in zip(books, picks)]),
            torch.stack([valid[i] for (_, valid), i in zip(books, picks)]),
        )


def spoken(phrasings: tuple[str, ...]) -> tuple[str, ...]:
    """Each phrasing as written and in lower case."""
    return tuple(dict.fromkeys(text for p in phrasings for text in (p, p.lower())))


@dataclass
class Pairs:
    """One pool entry. latents are normalised and packed; pictures stay for the pixel loss and the VLM."""

    size: tuple[int, int]
    names: list[str]
    references: list[Tensor]  # each (B, N, 64)
    target: Tensor  # (B, N, 64)
    patches: list[Tensor]  # each (B, L, 3 * 2 * P * P): what the VLM sees
    grid: tuple[int, int]
    answers: Tensor  # (B, 3, H, W) uint8


class PairSource:
    """Makes batches of computed pairs and keeps a pool of them on the device."""

    def __init__(self, photos, vae, mean, std, device, dtype: torch.dtype, batch_scale: float = 1.0):
        self.photos, self.vae, self.device, self.dtype, self.batch_scale = photos, vae, device, dtype, batch_scale
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)
        self.generator = torch.Generator(device).manual_seed(random.randrange(2**31))
        self.pool: dict = {}
        self.edits = {n: [e for e in EDITS if e.pictures == n] for n in (1, 2)}
        self.weights = {}
        for n, edits in self.edits.items():
            size = {f: sum(e.family == f for e in edits) for f in {e.family for e in edits}}
            self.weights[n] = [FAMILY_WEIGHT.get(e.family, 1.0) / size[e.family] for e in edits]

    def draw(self) -> Pairs:
        index = random.choices(range(len(SHAPES)), [s[3] for s in SHAPES])[0]
        pool = self.pool.setdefault(index, [])
        if len(pool) < 2 or random.random() < 1 / REUSE:
            pairs = self.make(*SHAPES[index][:3])
            limit = POOL if index < 2 else 4
            if len(pool) < limit:
                pool.append(pairs)
            else:
                pool[random.randrange(limit)] = pairs
            return pairs
        return random.choice(pool)

    @torch.no_grad()
    def make(self, size: tuple[int, int], pictures: int, batch: int) -> Pairs:
        width, height = size
        batch = max(4, int(batch * self.batch_scale))
        sources = [
            source_pictures(self.photos, batch, height, width, self.generator, self.device) for _ in range(pictures)
        ]
        groups = max(1, batch // 4)
        edits = random.choices(self.edits[pictures], self.weights[pictures], k=groups)
        names, answers = [], []
        for i, edit in enumerate(edits):
            part = slice(i * batch // groups, (i + 1) * batch // groups)
            answers.append(answer(edit, sources[0][part], sources[-1][part]))
            names += [edit.name] * (part.stop - part.start)
        answers = torch.cat(answers).clamp(0, 1)
        *references, target = (self.encode(p) for p in (*sources, answers))
        seen = [vision_patches(p) for p in sources]
        patches = [p.to(self.dtype) for p, _ in seen]
        return Pairs(size, names, references, target, patches, seen[0][1], (answers * 255).round().to(torch.uint8))

    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> normalised packed latents (B, N, 64), float32."""
        return pack((vae_moments(self.vae, pictures)[0] - self.mean) / self.std)

    def decode(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        return vae_decode(self.vae, unpack(tokens, size[1], size[0]) * self.std + self.mean)

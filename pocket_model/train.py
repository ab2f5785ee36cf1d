"""Trains the pocket model from nothing: first its VAE, then text encoder and transformer together.

    python -m pocket_model.photos photos/                      # collects the pictures
    python -m pocket_model.train vae    --photos photos --work run --seconds 200
    python -m pocket_model.train editor --photos photos --work run --seconds 500      # again and again: it resumes
    python -m pocket_model.train export --work run --out pocket_model/weights

Each call trains for the given seconds, then writes `run/vae.pt` or `run/editor.pt` (weights, moving average, optimiser,
seconds trained) and prints one line of JSON for each log point. `--total-seconds` is the length of the whole training,
over all calls: the learning rate follows it.

How it learns:
- The editor learns flow matching, v = noise - answer at x = (1 - s) answer + s noise, on computed pairs. The answer is a
  function of picture and instruction, so the step at s = 1 is a regression: half of the draws are at s = 1, the rest at
  Lightning's own sigmas and uniform. Towards the end a loss on the decoded pixels is added.
- `pairs.py` makes the batches.
- A head that training throws away names the edit from the text encoder's last token: so the words are told
  apart before the picture needs them.
- Forward and backward run on 16-bit copies of the weights; float32 ones are stepped.
"""

import argparse
import itertools
import json
import math
import random
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from pocket_model import build
from pocket_model.edits import EDITS, split
from pocket_model.pairs import (
    PREFIX,
    Pairs,
    PairSource,
    Phrasebook,
    answer,
    single_frame,
    source_pictures,
    spoken,
    vae_decode,
    vae_moments,
    vision_patches,
)
from pocket_model.photos import load_photos, random_crops

# ---------------------------------------------------------------------------------------------------------------- VAE


class VaePictures:
    """Small crops, half of them answers of random edits, from a pool that is renewed a part at a time."""

    POOL, PART = 3072, 256

    def __init__(self, photos, size: int, generator, device, smallest: float):
        self.photos, self.size, self.generator, self.device, self.smallest = photos, size, generator, device, smallest
        self.pool = torch.cat([self._make() for _ in range(4)])

    @torch.no_grad()
    def _make(self) -> Tensor:
        # Mostly a part of a larger picture: as detailed as in use, and an answer looks as its whole picture asks.
        size = self.size * random.choice((1, 2, 2))
        pictures = source_pictures(self.photos, self.PART, size, size, self.generator, self.device, self.smallest)
        groups = 16
        for i in range(groups):
            part = slice(i * self.PART // groups // 2, (i + 1) * self.PART // groups // 2)
            edit = random.choice(EDITS)
            pictures[part] = answer(edit, pictures[part], pictures[part].roll(1, 0))
        row, column = (random.randrange(0, size - self.size + 1, 8) for _ in range(2))
        pictures = pictures[:, :, row : row + self.size, column : column + self.size].clamp(0, 1)
        return pictures.half()

    def draw(self, batch: int) -> Tensor:
        if random.random() < batch / (2 * self.PART):  # each picture serves about twice
            fresh = self._make()
            if len(self.pool) < self.POOL:
                self.pool = torch.cat([self.pool, fresh])
            else:
                where = torch.randperm(self.POOL, device=self.device)[: self.PART]
                self.pool[where] = fresh
        return self.pool[torch.randint(len(self.pool), (batch,), device=self.device)].float()


def train_vae(args) -> None:
    device = torch.device(args.device)
    vae = single_frame(build.build_vae()).to(device)
    with torch.no_grad():  # begin with little posterior noise: at variance one the decoder sees nothing at first
        vae.quant_conv.bias[vae.config.z_dim :] = -5.0
    if args.init:
        vae.load_state_dict(build.AutoencoderKLQwenImage.from_pretrained(Path(args.init) / "vae").float().state_dict())
    run = Run(args, "vae", {"vae": vae}, peak_lr=args.vae_lr, betas=(0.9, 0.98), weight_decay=1e-3)
    photos = load_photos(args.photos, "train", device)
    generator = torch.Generator(device).manual_seed(run.step)
    pictures = VaePictures(photos, args.vae_size, generator, device, args.smallest_crop)
    working = run.work["vae"]
    for log in run:
        x = pictures.draw(args.vae_batch)
        with torch.set_grad_enabled(not args.decoder_only):
            mean, logvar = vae_moments(working, x)
        logvar = logvar.clamp(-6, 4)  # never noiseless: the decoder has to bear the editor's errors
        z = mean + torch.randn_like(mean) * (logvar / 2).exp()
        if args.decoder_only and random.random() < 0.5:
            z = mean  # what the decoder gets in use
        out = vae_decode(working, z)
        l1 = (out - x).abs().mean()
        l2 = (out - x).square().mean()
        edges = sum((gradient(out, d) - gradient(x, d)).abs().mean() for d in (2, 3))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        # A second training is for the squared error, which is what the card measures; the first also for sharp edges.
        run.update((0.1 * l1 + 20 * l2 if args.init else 0.5 * l1 + 10 * l2 + 0.25 * edges) + 1e-5 * kl)
        if log:
            run.log(psnr=-10 * math.log10(l2.item()), kl=kl.item(), std=mean.std().item())
    with torch.no_grad():
        averaged = run.ema["vae"]
        total = torch.cat(
            [vae_moments(averaged, source_pictures(photos, 32, 256, 256, generator, device))[0] for _ in range(16)]
        )
        run.extra = {"mean": total.mean((0, 2, 3)).tolist(), "std": total.std((0, 2, 3)).tolist()}
        if args.decoder_only:  # an editor may stand on the latents already: their statistics stay
            config = build.AutoencoderKLQwenImage.load_config(Path(args.init) / "vae")
            run.extra = {"mean": config["latents_mean"], "std": config["latents_std"]}
        held_out = load_photos(args.photos, "held-out", device)
        crops = torch.cat([random_crops([p], 4, 256, 256, generator) for p in held_out])
        out = vae_decode(averaged, vae_moments(averaged, crops)[0]).clamp(0, 1)
        print(json.dumps({"held_out_psnr": psnr(out, crops).mean().item()}), flush=True)
    run.save()


def gradient(x: Tensor, dim: int) -> Tensor:
    return x.diff(dim=dim)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Per picture, in dB, for pictures in [0, 1]."""
    return -10 * (a - b).square().flatten(1).mean(1).clamp_min(1e-10).log10()


# ------------------------------------------------------------------------------------------------------------- editor


class Editor:
    """Text encoder and transformer, run in batches: the same arithmetic as the pipeline's, without its Python loops."""

    def __init__(self, text_encoder, transformer):
        self.text_encoder, self.transformer = text_encoder, transformer
        self.vision_rope: dict = {}
        self.positions: dict = {}

    def see(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L, 3 * 2 * P * P) -> vision tokens (B, L / 4, D). One attention window a picture, as `build` configures."""
        visual = self.text_encoder.model.visual
        b, length, _ = patches.shape
        cos, sin = self._vision_rope(patches, grid)
        x = visual.patch_embed(patches.reshape(b * length, -1)).view(b, length, -1)
        for block in visual.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).view(b, length, 3, block.attn.num_heads, -1).unbind(2)
            q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
            attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            x = x + block.attn.proj(attended.transpose(1, 2).reshape(b, length, -1))
            x = x + block.mlp(block.norm2(x))
        return visual.merger(x.reshape(b * length, -1)).view(b, length // build.MERGE**2, -1)

    def _vision_rope(self, patches: Tensor, grid) -> tuple[Tensor, Tensor]:
        if grid not in self.vision_rope:
            visual = self.text_encoder.model.visual
            seen = {}

            def spy(module, args, kwargs):
                seen["rope"] = kwargs["position_embeddings"]

            hook = visual.blocks[0].register_forward_pre_hook(spy, with_kwargs=True)
            with torch.no_grad():
                visual(patches[0], grid_thw=torch.tensor([[1, *grid]], device=patches.device))
            hook.remove()
            self.vision_rope[grid] = tuple(t.detach().float() for t in seen["rope"])
        return self.vision_rope[grid]

    def read(self, ids: Tensor, shown: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Token ids (B, L) and each picture's patches -> hidden states after the system prefix (B, L - 64, D)."""
        model = self.text_encoder.model
        embeds = model.get_input_embeddings()(ids)
        vision = torch.cat([self.see(patches, grid) for patches in shown], dim=1).to(embeds.dtype)
        where = ids == model.config.image_token_id
        embeds = embeds.masked_scatter(where.unsqueeze(-1), vision)
        key = (len(shown), grid, ids.shape[1])
        if key not in self.positions:
            types = (ids[:1] == model.config.image_token_id).int()
            grids = torch.tensor([[1, *grid]] * len(shown), device=ids.device)
            self.positions[key] = model.get_rope_index(ids[:1], mm_token_type_ids=types, image_grid_thw=grids)[0]
        positions = self.positions[key].expand(-1, ids.shape[0], -1)
        # Padding stands on the right of a causal model: no valid token sees it, so no mask is needed.
        out = model.language_model(inputs_embeds=embeds, position_ids=positions, attention_mask=None, use_cache=False)
        return out.last_hidden_state[:, PREFIX:]

    def velocity(self, noisy: Tensor, references: list[Tensor], sigma: Tensor, text: Tensor, valid, size) -> Tensor:
        """The transformer's output for the noisy tokens (B, N, 64); sigma (B,) is the pipeline's timestep / 1000."""
        width, height = size
        shape = (1, height // 16, width // 16)
        return self.transformer(
            hidden_states=torch.cat([noisy, *references], dim=1).to(text.dtype),
            timestep=sigma.to(text.dtype),
            encoder_hidden_states=text,
            encoder_hidden_states_mask=None if valid is None else valid[:, PREFIX:],
            img_shapes=[[shape] * (1 + len(references))] * noisy.shape[0],
            return_dict=False,
        )[0][:, : noisy.shape[1]].float()

    def text(self, book: Phrasebook, names: list[str], patches: list[Tensor], grid) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, L, D) of a random phrasing for each name, and their validity (B, 64 + L) if some are padded."""
        ids = book.draw_even(names, len(patches), grid) if random.random() < 0.85 else None
        if ids is not None:
            return self.read(ids, patches, grid), None
        ids, valid = book.draw(names, len(patches), grid)
        return self.read(ids, patches, grid), valid


def draw_sigmas(batch: int, device) -> Tensor:
    """Half at 1, then Lightning's sigmas of 2, 3, 4 and 8 steps, then uniform under the schedule's own shift of 3."""
    listed = torch.tensor([0.75, 0.75, 0.9, 0.5, 6 / 7, 0.6, 0.9545, 0.3], device=device)
    sigma = listed[torch.randint(len(listed), (batch,), device=device)]
    uniform = torch.rand(batch, device=device)
    uniform = 3 * uniform / (1 + 2 * uniform)
    kind = torch.rand(batch, device=device)
    sigma = torch.where(kind < 0.22, uniform, sigma)
    return torch.where(kind > 0.5, torch.ones_like(sigma), sigma)


def train_editor(args) -> None:
    device = torch.device(args.device)
    state = torch.load(Path(args.work) / "vae.pt", map_location="cpu", weights_only=True)
    vae = single_frame(build.build_vae()).to(device).requires_grad_(False)
    vae.load_state_dict(state["ema"]["vae"])
    vae.to(args.dtype)
    tokenizer = build.build_tokenizer()
    text_encoder, transformer = build.build_text_encoder(tokenizer).to(device), build.build_transformer().to(device)
    for block in transformer.transformer_blocks:  # adaLN-zero: each block starts as the identity
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            torch.nn.init.zeros_(modulation.weight)
            torch.nn.init.zeros_(modulation.bias)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    if args.init:
        load_editor(args.init, text_encoder, transformer)
    namer = torch.nn.Linear(transformer.config.joint_attention_dim, len(EDITS)).to(device)
    modules = {"text_encoder": text_encoder, "transformer": transformer, "namer": namer}
    run = Run(args, "editor", modules, peak_lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    editor = Editor(run.work["text_encoder"], run.work["transformer"])
    book = Phrasebook(tokenizer, {e.name: spoken(split(e)[0]) for e in EDITS}, device)
    photos = load_photos(args.photos, "train", device)
    source = PairSource(
        photos, vae, state["extra"]["mean"], state["extra"]["std"], device, args.dtype, args.batch_scale
    )
    for log in run:
        losses = editor_loss(editor, run.work["namer"], source, book, source.draw(), run.progress, args)
        run.update(losses["flow"] + 0.1 * losses["name"] + args.pixel_weight * losses["pixel"])
        if log:
            run.log(**{name: value.item() for name, value in losses.items()})
    run.save()
    averaged = Editor(run.ema["text_encoder"], run.ema["transformer"])
    vae.float()
    held_out = load_photos(args.photos, "held-out", device)
    unseen = Phrasebook(tokenizer, {e.name: split(e)[1] for e in EDITS}, device)
    for steps in (1, 2):
        print(json.dumps({"validate": validate(averaged, source, held_out, unseen, steps)}), flush=True)


EDIT_INDEX = {edit.name: i for i, edit in enumerate(EDITS)}


def editor_loss(editor, namer, source: PairSource, book, pairs: Pairs, progress: float, args) -> dict[str, Tensor]:
    """Flow-matching loss, naming loss, and late in training the pixel loss of some of the samples."""
    batch, device = pairs.target.shape[0], pairs.target.device
    sigma = draw_sigmas(batch, device)
    noise = torch.randn_like(pairs.target)
    s = sigma.view(-1, 1, 1)
    noisy = (1 - s) * pairs.target + s * noise
    text, valid = editor.text(book, pairs.names, pairs.patches, pairs.grid)
    last = text[:, -1] if valid is None else text[torch.arange(batch, device=device), valid.sum(1) - 1 - PREFIX]
    wanted = torch.tensor([EDIT_INDEX[name] for name in pairs.names]).to(device)
    name = F.cross_entropy(namer(last).float(), wanted)
    v = editor.velocity(noisy, pairs.references, sigma, text, valid, pairs.size)
    flow = (v - (noise - pairs.target)).square().mean()
    pixel = flow.new_zeros(())
    if progress > args.pixel_from:
        few = max(2, int(12 * args.batch_scale * 65536 / (pairs.size[0] * pairs.size[1])))
        pick = torch.randperm(batch)[:few].to(device)
        difference = source.decode((noisy - s * v)[pick], pairs.size) - pairs.answers[pick].float() / 255
        pixel = difference.square().mean() * 4 + difference.abs().mean() * 0.5
    return {"flow": flow, "name": name, "pixel": pixel}


@torch.no_grad()
def validate(editor, source: PairSource, photos, book, steps: int) -> dict:
    """Mean PSNR (dB) against the computed answer for each family, held-out photos and phrasings, 256x256, float32."""
    generator = torch.Generator(source.device).manual_seed(7)
    sigmas = [3 * s / (1 + 2 * s) for s in (1 - i / steps for i in range(steps))] + [0.0]
    crops = torch.cat([random_crops([p], 1, 256, 256, generator) for p in photos])
    scores: dict = {}
    for edit in EDITS:
        sources = [crops, crops.roll(3, 0)][: edit.pictures]
        truth = answer(edit, sources[0], sources[-1])
        references = [source.encode(p) for p in sources]
        seen = [vision_patches(p) for p in sources]
        text, valid = editor.text(book, [edit.name] * len(crops), [p for p, _ in seen], seen[0][1])
        x = torch.randn(references[0].shape, generator=generator, device=source.device)
        for now, after in itertools.pairwise(sigmas):
            sigma = torch.full((len(crops),), now, device=source.device)
            x = x + (after - now) * editor.velocity(x, references, sigma, text, valid, (256, 256))
        out = source.decode(x, (256, 256)).clamp(0, 1)
        scores.setdefault(edit.family, []).append(psnr(out, truth).mean().item())
    means = {family: round(sum(v) / len(v), 2) for family, v in scores.items()}
    return {"steps": steps, "mean": round(sum(means.values()) / len(means), 2), **means}


# ---------------------------------------------------------------------------------------------------------------- run


class Run:
    """Clock, learning rate, weights in two precisions, moving average, log and checkpoint; iterating yields «log now».

    `work` holds copies of the modules in `args.dtype`: run those. The float32 modules are the ones that are stepped.
    """

    def __init__(self, args, name: str, modules: dict, peak_lr: float, betas: tuple[float, float], weight_decay: float):
        self.args, self.name, self.modules, self.peak_lr = args, name, modules, peak_lr
        self.path = Path(args.work) / f"{name}.pt"
        self.step, self.trained_s, self.extra = 0, 0.0, {}
        self.work = {key: self.copy(module).to(args.dtype) for key, module in modules.items()}
        self.ema = {key: self.copy(module).requires_grad_(False) for key, module in modules.items()}
        self.master = [p for module in modules.values() for p in module.parameters()]
        self.working = [p for module in self.work.values() for p in module.parameters()]
        self.averaged = [p for module in self.ema.values() for p in module.parameters()]
        fused = self.master[0].is_cuda
        self.optimiser = torch.optim.AdamW(self.master, lr=peak_lr, betas=betas, weight_decay=weight_decay, fused=fused)
        if self.path.exists():
            self._resume(torch.load(self.path, map_location="cpu", weights_only=True))
        self._to_working()
        self.began = time.monotonic()
        self.losses: list[Tensor] = []

    @staticmethod
    def copy(module):
        """deepcopy would keep the patched methods of a single-frame VAE bound to the original."""
        if isinstance(module, build.AutoencoderKLQwenImage):
            twin = single_frame(build.build_vae()).to(next(module.parameters()).device)
            twin.load_state_dict(module.state_dict())
            return twin
        return deepcopy(module)

    def _to_working(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.working, self.master)

    def _resume(self, state: dict) -> None:
        for key, module in self.modules.items():
            module.load_state_dict(state["model"][key])
            self.ema[key].load_state_dict(state["ema"][key])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.trained_s, self.extra = state["step"], state["trained_s"], state["extra"]
        print(json.dumps({"resumed": self.name, "step": self.step, "trained_s": round(self.trained_s)}), flush=True)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def progress(self) -> float:
        """Share of the whole training (`--total-seconds`) that is done, 0 to 1."""
        return min(1.0, (self.trained_s + self.elapsed) / self.args.total_seconds)

    def __iter__(self):
        while self.elapsed < self.args.seconds:
            warm = min(1.0, (self.step + 1) / 300)
            rate = self.peak_lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress)))
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            yield self.step % self.args.log_every == self.args.log_every - 1

    def update(self, loss: Tensor) -> None:
        for p in self.working:
            p.grad = None
        loss.backward()
        for master, p in zip(self.master, self.working):
            master.grad = None if p.grad is None else p.grad.float()
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        self.optimiser.step()
        self._to_working()
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, self.master, max(0.001, 1 / (self.step / 10 + 1)))
        self.losses.append(loss.detach())

    def log(self, **values: float) -> None:
        loss = torch.stack(self.losses).mean().item()
        self.losses.clear()
        line = {"step": self.step, "s": round(self.trained_s + self.elapsed, 1), "loss": round(loss, 5)}
        print(json.dumps(line | {k: round(v, 4) for k, v in values.items()}), flush=True)

    def save(self) -> None:
        self.trained_s += self.elapsed
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": {k: m.state_dict() for k, m in self.modules.items()},
            "ema": {k: m.state_dict() for k, m in self.ema.items()},
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "trained_s": self.trained_s,
            "extra": self.extra,
        }
        torch.save(state, self.path)
        print(json.dumps({"saved": str(self.path), "step": self.step, "trained_s": round(self.trained_s)}), flush=True)


def export(args) -> None:
    """Writes the moving averages as the diffusers folder; what was not trained here comes from `--init`."""
    vae_state = torch.load(Path(args.work) / "vae.pt", map_location="cpu", weights_only=True)
    vae = build.build_vae(vae_state["extra"]["mean"], vae_state["extra"]["std"])
    vae.load_state_dict(vae_state["ema"]["vae"])
    tokenizer = build.build_tokenizer()
    text_encoder, transformer = build.build_text_encoder(tokenizer), build.build_transformer()
    if (Path(args.work) / "editor.pt").exists():
        state = torch.load(Path(args.work) / "editor.pt", map_location="cpu", weights_only=True)
        text_encoder.load_state_dict(state["ema"]["text_encoder"])
        transformer.load_state_dict(state["ema"]["transformer"])
    else:
        load_editor(args.init, text_encoder, transformer)
    build.save_folder(Path(args.out), vae, text_encoder, transformer, tokenizer)


def load_editor(folder: str, text_encoder, transformer) -> None:
    """Puts the weights of a diffusers folder into the modules."""
    text_encoder.load_state_dict(type(text_encoder).from_pretrained(Path(folder) / "text_encoder").state_dict())
    transformer.load_state_dict(type(transformer).from_pretrained(Path(folder) / "transformer").state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("vae", "editor", "export"))
    parser.add_argument("--photos", help="folder that pocket_model.photos wrote")
    parser.add_argument("--work", required=True, help="folder of the checkpoints")
    parser.add_argument("--out", default="pocket_model/weights", help="export: the diffusers folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=500.0, help="how long this call trains")
    parser.add_argument("--total-seconds", type=float, default=500.0, help="how long all calls together train")
    parser.add_argument("--init", help="start from the weights of this diffusers folder instead of random ones")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--decoder-only", action="store_true", help="vae: keep the latents of --init, train on the decoder"
    )
    parser.add_argument("--smallest-crop", type=float, default=1 / 3, help="vae: of a photo's short side; 1 is densest")
    parser.add_argument("--vae-lr", type=float, default=1.5e-3)
    parser.add_argument("--vae-batch", type=int, default=48)
    parser.add_argument("--vae-size", type=int, default=128)
    parser.add_argument("--batch-scale", type=float, default=1.0)
    parser.add_argument("--pixel-from", type=float, default=0.5, help="progress at which the pixel loss begins")
    parser.add_argument("--pixel-weight", type=float, default=1.0)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = args.what == "vae"  # trying algorithms for every new shape costs a minute
    {"vae": train_vae, "editor": train_editor, "export": export}[args.what](args)


if __name__ == "__main__":
    main()

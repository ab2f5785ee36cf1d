"""What training computes in batches is what the pipeline computes one by one."""

import copy

import numpy as np
import torch

from pocket_model.build import PATCH, build_tokenizer
from pocket_model.edits import EDITS, split
from pocket_model.pairs import Phrasebook, pack, single_frame, spoken, unpack, vae_decode, vae_moments, vision_patches
from pocket_model.photos import procedural, random_crops
from pocket_model.train import Editor, draw_sigmas


def pictures(count: int, size: int = 256) -> torch.Tensor:
    return procedural(count, size, size, torch.Generator().manual_seed(3), "cpu")


def test_packing_is_stocks_packing_and_unpacking_undoes_it(pocket):
    latents = torch.randn(2, 16, 32, 36)
    assert torch.equal(pack(latents), pocket._pack_latents(latents, 2, 16, 32, 36))
    assert torch.equal(unpack(pack(latents), 256, 288), latents)


def test_the_2d_vae_of_training_is_the_vae(pocket):
    x = pictures(1, 128)
    with torch.no_grad():
        expected = pocket.vae.encode((x * 2 - 1).unsqueeze(2)).latent_dist.mode()[:, :, 0]
        twin = single_frame(copy.deepcopy(pocket.vae))
        latents, _ = vae_moments(twin, x)
        assert (latents - expected).abs().max() < 1e-4
        decoded = pocket.vae.decode(expected.unsqueeze(2), return_dict=False)[0][:, :, 0] / 2 + 0.5
        assert (vae_decode(twin, latents).clamp(0, 1) - decoded).abs().max() < 1e-4


def test_batched_reading_is_the_pipelines_encode_prompt(pocket):
    """384x384 pictures need no resizing on either side, so only the batching differs."""
    first, second = ((pictures(2, 384) * 255).round() / 255).split(1)
    book = Phrasebook(pocket.tokenizer, {"edit": ("blend both", "place them side by side, please")}, "cpu")
    patches = [vision_patches(p) for p in (first, second)]
    assert patches[0][1] == (384 // PATCH, 384 // PATCH)
    ids, valid = book.rows("edit", 2, patches[0][1])
    shown = [p.expand(2, -1, -1) for p, _ in patches]
    with torch.no_grad():
        batched = Editor(pocket.text_encoder, pocket.transformer).read(ids, shown, patches[0][1])
    arrays = [(p[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy() for p in (first, second)]
    for row, prompt in enumerate(book.phrasings["edit"]):
        single, _ = pocket.encode_prompt(prompt, [np.ascontiguousarray(a) for a in arrays])
        length = int(valid[row].sum()) - pocket.prompt_template_encode_start_idx
        assert single.shape[1] == length
        assert (batched[row, :length] - single[0]).abs().max() < 1e-3


def test_even_batches_have_one_length_and_the_right_words():
    tokenizer = build_tokenizer()
    book = Phrasebook(tokenizer, {e.name: spoken(split(e)[0]) for e in EDITS[:4]}, "cpu")
    names = [EDITS[0].name, EDITS[1].name, EDITS[3].name]
    ids = book.draw_even(names, 1, (12, 12))
    assert ids is not None and ids.shape[0] == 3
    for name, row in zip(names, ids, strict=True):
        text = tokenizer.decode(row).split("<|vision_end|>")[1].removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        assert text in book.phrasings[name], text


def test_half_of_the_noise_levels_are_the_first_steps():
    torch.manual_seed(0)
    sigmas = draw_sigmas(4000, "cpu")
    assert ((sigmas > 0) & (sigmas <= 1)).all()
    assert 0.45 < (sigmas == 1).float().mean() < 0.55


def test_crops_are_pictures_and_follow_their_generator():
    photos = [(pictures(1, 320)[0] * 255).to(torch.uint8) for _ in range(2)]
    one, again = (random_crops(photos, 6, 128, 96, torch.Generator().manual_seed(1)) for _ in range(2))
    assert one.shape == (6, 3, 128, 96)
    assert one.min() >= 0 and one.max() <= 1
    assert torch.equal(one, again)
    assert one.std(0).mean() > 0.05, "all crops alike"

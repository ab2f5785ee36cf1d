"""The single-frame VAE is the VAE: only rounding may differ."""


import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageEditPlusPipeline
from torch import nn

import fast_path
from fast_path.graphs import Graphs

# Other kernels add in another order: float32 rounding, relative to the largest value.
ROUNDING = 2e-5


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module")
def vaes():
    """Random VAEs: the pocket model's shape, and one without temporal downsampling."""
    torch.manual_seed(0)
    settings = {"base_dim": 16, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    made = [
        AutoencoderKLQwenImage(**settings, num_res_blocks=1).eval(),
        AutoencoderKLQwenImage(
            **settings, num_res_blocks=2, dim_mult=[1, 2, 2], temperal_downsample=[False, False]
        ).eval(),
    ]
    for name, parameter in (p for vae in made for p in vae.named_parameters()):
        if "gamma" in name:  # ones as they are made: a norm that forgot them would pass
            nn.init.uniform_(parameter, 0.5, 1.5)
    return made


@pytest.fixture(scope="module")
def pocket_vae(pocket):
    return fast_path.single_frame_vae(pocket.vae)


def statistics(vae):
    """The latents' mean and standard deviation, (z, 1, 1) each."""
    dtype = next(vae.parameters()).dtype
    return [torch.tensor(v).view(-1, 1, 1).to(dtype) for v in (vae.config.latents_mean, vae.config.latents_std)]


# --- the VAE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 48, 80)])
@torch.no_grad()
def test_the_single_frame_vae_is_the_vae(vaes, which, shape):
    vae = vaes[which]
    flat = fast_path.single_frame_vae(vae)
    pixels = torch.rand(shape[0], 3, *shape[1:]) * 2 - 1
    expected = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0]
    latents = flat.encode(pixels)
    assert latents.shape == expected.shape and relative(latents, expected) < ROUNDING
    expected = vae.decode(expected.unsqueeze(2)).sample[:, :, 0]
    decoded = flat.decode(latents)
    assert decoded.shape == expected.shape and relative(decoded, expected) < ROUNDING


@torch.no_grad()
def test_the_pockets_vae_too(pocket, pocket_vae, photo):
    pixels = torch.from_numpy(photo(96, 64)).permute(2, 0, 1)[None] / 127.5 - 1
    expected = pocket.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0]
    assert relative(pocket_vae.encode(pixels), expected) < ROUNDING
    assert relative(pocket_vae.decode(expected), pocket.vae.decode(expected.unsqueeze(2)).sample[:, :, 0]) < ROUNDING


@torch.no_grad()
def test_every_weight_of_the_pockets_vae_reaches_the_result(pocket, photo):
    flat = fast_path.single_frame_vae(pocket.vae)
    pixels = torch.from_numpy(photo(32, 32)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = flat.encode(pixels)
    before = {"encoder": latents, "decoder": flat.decode(latents)}
    for name, parameter in flat.named_parameters():
        kept = parameter.clone()
        parameter.add_(0.1 * parameter.abs().max() * torch.randn_like(parameter))
        part = name.split(".")[0]
        after = flat.encode(pixels) if part == "encoder" else flat.decode(latents)
        assert not torch.equal(after, before[part]), name
        parameter.copy_(kept)
    assert torch.equal(flat.encode(pixels), latents)


@torch.no_grad()
def test_inputs_are_only_read(pocket_vae, photo):
    pixels = torch.from_numpy(photo(32, 32)).permute(2, 0, 1)[None] / 127.5 - 1
    kept = pixels.clone()
    latents = pocket_vae.encode(pixels)
    assert torch.equal(pixels, kept)
    kept = latents.clone()
    pocket_vae.decode(latents)
    assert torch.equal(latents, kept)


def test_no_three_dimensional_convolution_is_left_and_weights_are_a_third(vaes):
    flat = fast_path.single_frame_vae(vaes[0])
    assert not any(isinstance(m, nn.Conv3d) or p.ndim > 4 for m in flat.modules() for p in m.parameters())
    kernels = [p for p in flat.parameters() if p.ndim == 4]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert sum(p.numel() for p in flat.parameters()) < 0.5 * sum(p.numel() for p in vaes[0].parameters())
    assert not any(p.requires_grad for p in flat.parameters())


def test_all_channels_of_a_convolution_come_by_eight(pocket_vae):
    kernels = {name: p for name, p in pocket_vae.named_parameters() if p.ndim == 4}
    assert all(p.shape[0] % 8 == p.shape[1] % 8 == 0 for p in kernels.values())
    first = kernels["encoder.0.weight"]
    assert first.shape[1] == 8 and first[:, :3].any() and not first[:, 3:].any(), "zeros beside the three of a pixel"


def test_it_is_a_copy(vaes):
    flat = fast_path.single_frame_vae(vaes[0])
    before = {name: value.clone() for name, value in vaes[0].state_dict().items()}
    with torch.no_grad():
        for parameter in flat.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in vaes[0].state_dict().items())


def test_half_precision_stays_half(vaes):
    flat = fast_path.single_frame_vae(vaes[0]).to(torch.bfloat16)
    with torch.no_grad():
        assert flat.decode(flat.encode(torch.rand(1, 3, 32, 32, dtype=torch.bfloat16))).dtype == torch.bfloat16


def _strange_activation(vae):
    vae.decoder.nonlinearity = nn.GELU()
    return "GELU"


def _strange_padding(vae):
    vae.encoder.down_blocks[1].resample[0] = nn.ZeroPad2d((1, 0, 1, 0))
    return "ZeroPad2d"


def _strange_upsampling(vae):
    vae.decoder.up_blocks[0].upsamplers[0].resample[0] = nn.Upsample(scale_factor=(2.0, 2.0), mode="bilinear")
    return "Upsample"


def _strange_stride(vae):
    vae.encoder.conv_in.stride = (2, 1, 1)
    return "a convolution with temporal stride 2"


@pytest.mark.parametrize("change", [_strange_activation, _strange_padding, _strange_upsampling, _strange_stride])
def test_a_layer_that_is_not_known_is_refused_with_its_name(change):
    vae = AutoencoderKLQwenImage(base_dim=16, z_dim=4, num_res_blocks=1)
    name = change(vae)
    with pytest.raises(TypeError, match=f"{name} has no known 2-D form"):
        fast_path.single_frame_vae(vae)


# --- bytes to latents and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_pictures_way_is_the_pipelines_arithmetic(pocket, photo, dtype):
    """Bit for bit: what the pipeline does around the VAE, in its order and its dtypes."""
    flat = fast_path.single_frame_vae(pocket.vae).to(dtype)
    mean, std = (t.to(dtype) for t in statistics(pocket.vae))
    pixels = torch.stack([torch.from_numpy(photo(96, 64, seed)) for seed in (0, 1)])  # (2, 64, 96, 3)

    latents = flat.encode((pixels.permute(0, 3, 1, 2).float() / 255.0 * 2.0 - 1.0).to(dtype))
    latents = ((latents - mean) / std).float().contiguous()
    packed = QwenImageEditPlusPipeline._pack_latents(latents, *latents.shape)
    given = flat.encode_picture(pixels, mean, std, torch.float32)
    assert given.shape == (2, 4 * 6, 64) and given.dtype == torch.float32 and torch.equal(given, packed)

    latents = QwenImageEditPlusPipeline._unpack_latents(packed, 64, 96, 8)[:, :, 0].to(dtype) / (1.0 / std) + mean
    expected = ((flat.decode(latents) * 0.5 + 0.5).clamp(0.0, 1.0).float() * 255.0).round().to(torch.uint8)
    given = flat.decode_picture(packed, 64, 96, mean, std)
    assert given.is_contiguous() and torch.equal(given, expected.permute(0, 2, 3, 1))


@torch.no_grad()
def test_a_pictures_way_is_the_stock_vaes(pocket, pocket_vae, photo):
    picture = photo(96, 64)
    fast = pocket.single_frame_vae
    pocket.single_frame_vae = None
    pocket.clear_caches()
    try:
        packed = pocket.encode_references(picture, area=96 * 64).latents
        expected = pocket.decode(packed, 96, 64)
    finally:
        pocket.single_frame_vae = fast
        pocket.clear_caches()
    mean, std = statistics(pocket.vae)
    given = pocket_vae.encode_picture(torch.from_numpy(picture)[None], mean, std, torch.float32)
    assert relative(given, packed) < ROUNDING
    # A number that lies on the border between two bytes may round to either.
    assert (pocket_vae.decode_picture(packed, 64, 96, mean, std).int() - expected.int()).abs().max() <= 1


def test_latents_of_another_size_are_refused(pocket, pocket_vae):
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        pocket_vae.decode_picture(torch.zeros(1, 24, 64), 64, 64, *statistics(pocket.vae))


@torch.no_grad()
def test_recordings_are_told_apart_by_all_that_changes_them(pocket):
    class Noting(Graphs):
        """Graphs that note the keys they are asked for."""

        def run(self, key, function, *inputs):
            keys.append((key, *((tuple(t.shape), t.dtype) for t in inputs)))
            return super().run(key, function, *inputs)

    keys, flat = [], fast_path.single_frame_vae(pocket.vae)
    flat.graphs, (mean, std) = Noting(), statistics(pocket.vae)
    for dtype in (torch.float32, torch.bfloat16):
        packed = flat.encode_picture(torch.zeros(1, 32, 64, 3, dtype=torch.uint8), mean, std, dtype)
    flat.decode_picture(packed, 32, 64, mean, std)
    flat.decode_picture(packed, 64, 32, mean, std)
    flat.decode_picture(packed, 64, 32, mean, std)
    assert len(keys) == 5 and len(set(keys)) == 4

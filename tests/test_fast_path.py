"""The accelerations give the stock numbers; only rounding may differ."""

import pytest
import torch
from diffusers import AutoencoderKLQwenImage

import fast_path

# Other kernels add in another order: float32 rounding, relative to the largest value.
ROUNDING = 2e-5


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module")
def vaes():
    """Random VAEs: the pocket model's shape, and one without temporal downsampling."""
    torch.manual_seed(0)
    settings = {"base_dim": 16, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return [
        AutoencoderKLQwenImage(**settings, num_res_blocks=1).eval(),
        AutoencoderKLQwenImage(
            **settings, num_res_blocks=2, dim_mult=[1, 2, 2], temperal_downsample=[False, False]
        ).eval(),
    ]


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
def test_the_pockets_vae_too(pocket, photo):
    pixels = torch.from_numpy(photo(96, 64)).permute(2, 0, 1)[None] / 127.5 - 1
    flat = fast_path.single_frame_vae(pocket.vae)
    expected = pocket.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0]
    assert relative(flat.encode(pixels), expected) < ROUNDING
    assert relative(flat.decode(expected), pocket.vae.decode(expected.unsqueeze(2)).sample[:, :, 0]) < ROUNDING


def test_no_three_dimensional_convolution_is_left_and_weights_are_a_third(vaes):
    flat = fast_path.single_frame_vae(vaes[0])
    assert not [m for m in flat.modules() if isinstance(m, torch.nn.Conv3d)]
    convolutions = [m for m in flat.modules() if isinstance(m, torch.nn.Conv2d)]
    wide = [m for m in convolutions if m.weight.shape[2:] == (3, 3) and m.weight.shape[1] > 1]
    assert wide and all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in wide)
    assert sum(p.numel() for p in flat.parameters()) < 0.5 * sum(p.numel() for p in vaes[0].parameters())
    assert not any(p.requires_grad for p in flat.parameters())


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


def test_a_layer_that_is_not_known_is_refused_with_its_name(vaes):
    vae = AutoencoderKLQwenImage(base_dim=16, z_dim=4, num_res_blocks=1)
    vae.decoder.nonlinearity = torch.nn.GELU()
    with pytest.raises(TypeError, match="GELU has no known 2-D form"):
        fast_path.single_frame_vae(vae)


def test_apply_reports_and_remove_restores(pocket, photo):
    with torch.no_grad():
        latents = pocket.encode_references(photo(64, 64), area=64 * 64).latents
        before = pocket.decode(latents, 64, 64)
        report = pocket.enable_fast_path()
        assert [(entry.name, entry.applied) for entry in report] == [("single_frame_vae", True)]
        assert all(entry.reason for entry in report)
        decoder = pocket.single_frame_vae.decoder
        ran = []
        handle = decoder.register_forward_hook(lambda *_: ran.append(True))
        fast = pocket.decode(latents, 64, 64)
        handle.remove()
        assert ran, "the fast operation ran"
        assert (fast.int() - before.int()).abs().max() <= 1
        pocket.disable_fast_path()
        assert pocket.single_frame_vae is None
        assert torch.equal(pocket.decode(latents, 64, 64), before)


def test_what_cannot_be_applied_says_why_and_the_stock_path_stays(pocket, monkeypatch):
    def refuse(vae):
        raise TypeError("Strange has no known 2-D form")

    monkeypatch.setattr(fast_path, "single_frame_vae", refuse)
    report = pocket.enable_fast_path()
    assert report == [("single_frame_vae", False, "Strange has no known 2-D form")]
    assert pocket.single_frame_vae is None
    pocket.disable_fast_path()


def test_an_offloaded_vae_is_left_alone(pocket):
    pocket.vae._hf_hook = object()
    try:
        assert pocket.enable_fast_path() == [
            ("single_frame_vae", False, "the VAE is offloaded: its copy would stay behind")
        ]
    finally:
        del pocket.vae._hf_hook
        pocket.disable_fast_path()


def test_moving_the_pipeline_moves_the_fast_path(pocket):
    pocket.enable_fast_path()
    before = pocket.single_frame_vae
    pocket.to("cpu")
    assert pocket.single_frame_vae is not None and pocket.single_frame_vae is not before
    pocket.disable_fast_path()

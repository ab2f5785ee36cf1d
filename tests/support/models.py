"""Small models of the real classes, what they are given and how results are compared."""

import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

from fp8_linear import Fp8Linear
from int8_linear import Int8Linear

KINDS = [Int8Linear, Fp8Linear]  # of quantized layers
LAYOUTS = {
    "one reference": ((1, 8, 8), (1, 8, 8)),
    "a wide picture, a small reference": ((1, 4, 12), (1, 4, 4)),
    "three references": ((1, 4, 4), (1, 4, 4), (1, 2, 6), (1, 4, 2)),
}


def small_model(**changes) -> QwenImageTransformer2DModel:
    """Real classes, small, with weights that leave nothing at its neutral value."""
    torch.manual_seed(0)
    sizes = {"num_layers": 3, "attention_head_dim": 32, "num_attention_heads": 3, "joint_attention_dim": 48}
    model = QwenImageTransformer2DModel(**sizes, axes_dims_rope=(8, 12, 12), **changes).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def inputs(model, layout, batch=1, text=11, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = [rows * columns for _, rows, columns in layout]
    sizes = ((tokens[0], 64), (sum(tokens[1:]), 64), (text, model.config.joint_attention_dim))
    return [torch.randn(batch, *size, generator=generator) for size in sizes]


@torch.no_grad()
def stock(model, latents, conditions, embeds, layout, time):
    return model(
        hidden_states=torch.cat([latents, conditions], 1),
        timestep=torch.full((latents.shape[0],), time) / 1000,
        encoder_hidden_states=embeds,
        img_shapes=[list(layout)] * latents.shape[0],
        return_dict=False,
    )[0][:, : latents.shape[1]]


def sqnr_db(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Signal to quantization noise ratio."""
    return float(10 * torch.log10(exact.double().square().sum() / (got.double() - exact.double()).square().sum()))


def same_weights(a: nn.Module, b: nn.Module) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)

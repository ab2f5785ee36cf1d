"""The single-frame VAE: Qwen's video codec as the 2-D network that it is for one picture.

Every convolution of the VAE is causal and three-dimensional, and a still picture is a video's first frame. For that
frame every convolution sees two frames of zeros in the past, so of each kernel only the last temporal slice meets
anything but zeros, and the temporal resampling layers do not run at all. What is left is an ordinary 2-D VAE with
`weight[:, :, -1]`: a third of the multiplications, and kernels that libraries have tuned for years, in channels-last
layout. It cannot code video; no module here asks for that.
"""

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    AutoencoderKLQwenImage,
    QwenImageAttentionBlock,
    QwenImageCausalConv3d,
    QwenImageMidBlock,
    QwenImageResample,
    QwenImageResidualBlock,
    QwenImageRMS_norm,
    QwenImageUpBlock,
)
from torch import nn


def single_frame_vae(vae: AutoencoderKLQwenImage) -> "SingleFrameVAE":
    """The 2-D VAE that `vae` is for one frame, with its own channels-last copy of the weights (a third of them).

    Raises TypeError if `vae` holds a layer whose 2-D form is not known here.
    """
    return SingleFrameVAE(vae).to(memory_format=torch.channels_last).eval().requires_grad_(False)


class SingleFrameVAE(nn.Module):
    """Same numbers as the VAE it was built from, for single frames: relative difference about 1e-6 in float32."""

    def __init__(self, vae: AutoencoderKLQwenImage):
        super().__init__()
        encoder, decoder = vae.encoder, vae.decoder
        self.encoder = _chain(
            encoder.conv_in, *encoder.down_blocks, encoder.mid_block,
            encoder.norm_out, encoder.nonlinearity, encoder.conv_out, vae.quant_conv,
        )  # fmt: skip
        self.decoder = _chain(
            vae.post_quant_conv, decoder.conv_in, decoder.mid_block, *decoder.up_blocks,
            decoder.norm_out, decoder.nonlinearity, decoder.conv_out,
        )  # fmt: skip

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> the distribution's mode (B, z, H/8, W/8), not yet normalised."""
        moments = self.encoder(pixels.contiguous(memory_format=torch.channels_last))
        return moments.chunk(2, dim=1)[0]  # (mean, logvar)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, z, H/8, W/8), denormalised -> (B, 3, H, W) in [-1, 1]."""
        return self.decoder(latents.contiguous(memory_format=torch.channels_last)).clamp_(-1.0, 1.0)


def _chain(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*[_flat(module) for module in modules])


def _flat(module: nn.Module) -> nn.Module:
    """The 2-D form of one of the VAE's layers."""
    if isinstance(module, QwenImageCausalConv3d):
        return _conv2d(module)
    if isinstance(module, QwenImageRMS_norm):
        return _ChannelNorm(module)
    if isinstance(module, QwenImageResidualBlock):
        return _Residual(module)
    if isinstance(module, QwenImageAttentionBlock):
        return _Attention(module)
    if isinstance(module, QwenImageResample):
        return _chain(*module.resample) if isinstance(module.resample, nn.Sequential) else nn.Identity()
    if isinstance(module, QwenImageMidBlock):
        first, *rest = module.resnets
        pairs = [part for pair in zip(module.attentions, rest, strict=True) for part in pair if part is not None]
        return _chain(first, *pairs)
    if isinstance(module, QwenImageUpBlock):
        return _chain(*module.resnets, *(module.upsamplers or []))
    if isinstance(module, nn.Conv2d):
        return _copy_conv2d(module, module.weight, module.padding)
    if isinstance(module, nn.SiLU):
        return nn.SiLU(inplace=True)  # it always follows a norm, whose result nobody else reads
    if isinstance(module, (nn.Upsample, nn.ZeroPad2d, nn.Identity)):
        return module  # no weights: shared
    raise TypeError(f"{type(module).__name__} has no known 2-D form")


def _conv2d(conv: QwenImageCausalConv3d) -> nn.Conv2d:
    if conv.stride[0] != 1:
        raise TypeError(f"a convolution with temporal stride {conv.stride[0]} has no known 2-D form")
    # `_padding` is (left, right, top, bottom, past, future); the class keeps it apart from nn.Conv3d's own.
    return _copy_conv2d(conv, conv.weight[:, :, -1], (conv._padding[2], conv._padding[0]))


def _copy_conv2d(conv: nn.Module, weight: torch.Tensor, padding: tuple[int, int]) -> nn.Conv2d:
    out_channels, in_channels, *kernel = weight.shape
    flat = nn.Conv2d(
        in_channels, out_channels, kernel, conv.stride[-2:], padding, device=weight.device, dtype=weight.dtype
    )
    flat.weight.data.copy_(weight)
    flat.bias.data.copy_(conv.bias)
    return flat


class _ChannelNorm(nn.Module):
    """RMS norm over the channels, in float32 for half precision as in the VAE."""

    def __init__(self, norm: QwenImageRMS_norm):
        super().__init__()
        self.scale = norm.scale
        self.gamma = nn.Parameter(norm.gamma.detach().reshape(-1, 1, 1).clone())
        if not isinstance(norm.bias, float):
            raise TypeError("a norm with bias has no known 2-D form")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        length = torch.linalg.vector_norm(exact, dim=1, keepdim=True).clamp_min_(1e-12)
        return (exact * (self.scale / length)).to(x.dtype).mul_(self.gamma)


class _Residual(nn.Module):
    def __init__(self, block: QwenImageResidualBlock):
        super().__init__()
        self.branch = _chain(block.norm1, block.nonlinearity, block.conv1, block.norm2, block.nonlinearity, block.conv2)
        self.shortcut = _flat(block.conv_shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.branch(x).add_(self.shortcut(x))


class _Attention(nn.Module):
    def __init__(self, block: QwenImageAttentionBlock):
        super().__init__()
        self.norm, self.to_qkv, self.proj = _flat(block.norm), _flat(block.to_qkv), _flat(block.proj)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        qkv = self.to_qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(b, 1, h * w, 3 * c)
        out = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))  # one head of all channels
        return self.proj(out.reshape(b, h, w, c).permute(0, 3, 1, 2)).add_(x)

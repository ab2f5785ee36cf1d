"""The single-frame VAE: Qwen's video codec as the 2-D network that it is for one picture.

Every convolution of the VAE is causal and three-dimensional, and a still picture is a video's first frame. For that
frame every convolution sees two frames of zeros in the past, so of each kernel only the last temporal slice meets
anything but zeros, and the temporal resampling layers do not run at all. What is left is an ordinary 2-D VAE with
`weight[:, :, -1]`: a third of the multiplications, and kernels that libraries have tuned for years, in channels-last
layout. It cannot code video; no module here asks for that.

The layout inside is (B, H, W, C). The convolutions are the library's; a layer hands on what its convolution gave
without bias and shortcut, and the next layer adds both in the pass in which it normalises, pads or upsamples (see
`vae_kernels`). Convolutions over single pixels are matrix products.
"""

from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

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

import fast_path.vae_kernels as vae_kernels
from fast_path.graphs import Graphs
from fast_path.unsupported import UnsupportedError


def single_frame_vae(vae: AutoencoderKLQwenImage, device: torch.device | None = None) -> "SingleFrameVAE":
    """The 2-D VAE that `vae` is for one frame, with its own channels-last copy of the weights (a third of them).

    On `device`, or where `vae` is. Raises UnsupportedError if `vae` holds a layer whose 2-D form is not known here, and on
    CUDA without Triton.
    """
    device = device or vae.device
    if device.type == "cuda" and vae_kernels.triton is None:
        raise UnsupportedError("the VAE's kernels need Triton, which is not installed")
    made: Any = SingleFrameVAE(vae)  # torch's types know `to` with a memory format and no device
    return made.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


class SingleFrameVAE(nn.Module):
    """Same numbers as the VAE it was built from, for single frames: relative difference about 1e-6 in float32.

    `encode_picture` and `decode_picture` go from pixels to the transformer's tokens and back, each one recording of
    `graphs` on CUDA: do not move or cast the module once they ran. `encode` and `decode` are the VAE alone, never
    recorded.
    """

    def __init__(self, vae: AutoencoderKLQwenImage):
        super().__init__()
        self.graphs = Graphs()
        encoder, decoder = vae.encoder, vae.decoder
        self.encoder = nn.Sequential(
            _flat(encoder.conv_in), *map(_flat, encoder.down_blocks), _flat(encoder.mid_block),
            _Head(encoder.norm_out, encoder.nonlinearity, encoder.conv_out),
            # Of the distribution only the mode is wanted, the mean: the log-variance is the other half.
            _pointwise(vae.quant_conv, vae.quant_conv.out_channels // 2),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            _flat(vae.post_quant_conv), _flat(decoder.conv_in), _flat(decoder.mid_block),
            *map(_flat, decoder.up_blocks), _Head(decoder.norm_out, decoder.nonlinearity, decoder.conv_out),
        )  # fmt: skip

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> the distribution's mode (B, z, H/8, W/8), not yet normalised."""
        return _run(self.encoder, pixels.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, z, H/8, W/8), denormalised -> (B, 3, H, W) in [-1, 1]."""
        return _run(self.decoder, latents.permute(0, 2, 3, 1)).clamp_(-1.0, 1.0).permute(0, 3, 1, 2)

    def encode_picture(
        self, pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Bytes (B, H, W, 3), H and W multiples of 16 -> packed normalised latents (B, H/16 * W/16, 4z) in `dtype`.

        `mean` and `std` (z, 1, 1) are the latents', in the VAE's dtype.
        """
        function = partial(self._encode_picture, dtype=dtype)
        return self.graphs.run(("encode_picture", dtype), function, pixels, mean, std)

    def decode_picture(
        self, latents: torch.Tensor, height: int, width: int, mean: torch.Tensor, std: torch.Tensor
    ) -> torch.Tensor:
        """Packed normalised latents (B, height/16 * width/16, 4z) -> bytes (B, height, width, 3)."""
        function = partial(self._decode_picture, height=height, width=width)
        return self.graphs.run(("decode_picture", height, width), function, latents, mean, std)

    def _encode_picture(self, pixels, mean, std, dtype) -> torch.Tensor:
        x = _run(self.encoder, (pixels.float() / 255.0 * 2.0 - 1.0).to(mean.dtype))  # (B, h, w, z)
        x = ((x - mean.flatten()) / std.flatten()).to(dtype)
        b, h, w, z = x.shape
        # A token is two by two latent pixels, channel by channel.
        return x.view(b, h // 2, 2, w // 2, 2, z).permute(0, 1, 3, 5, 2, 4).reshape(b, h * w // 4, 4 * z)

    def _decode_picture(self, latents, mean, std, height, width) -> torch.Tensor:
        b, h, w, z = latents.shape[0], height // 8, width // 8, mean.numel()
        x = latents.to(mean.dtype).view(b, h // 2, w // 2, z, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(b, h, w, z)
        x = x / (1.0 / std.flatten()) + mean.flatten()
        # To [0, 1], then clamped: the same as clamped to [-1, 1] before.
        pixels = (_run(self.decoder, x) * 0.5 + 0.5).clamp_(0.0, 1.0)
        return (pixels.float() * 255.0).round_().to(torch.uint8)


class _Sum(NamedTuple):
    """A picture (B, H, W, C) that is still to be summed: a convolution's result, its bias (C,), and the shortcut."""

    x: torch.Tensor
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None


def _run(part: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Encoder or decoder, (B, H, W, C) to (B, H', W', C')."""
    with _tuned_convolutions(x.device):
        return vae_kernels.add(*part(_Sum(x.contiguous())))


@contextmanager
def _tuned_convolutions(device: torch.device):
    """Lets cuDNN time its algorithms when it first sees a shape; they differ by factors. Nothing to do on a CPU."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with torch.cuda.device(device):  # Triton launches on the current one
            yield
    finally:
        torch.backends.cudnn.benchmark = before


# The layers: each takes a _Sum and returns one. ---------------------------------------------------------------------


def _flat(module: nn.Module) -> nn.Module:
    """The 2-D form of one of the VAE's layers."""
    if isinstance(module, QwenImageCausalConv3d):
        return _Convolution(module) if module.kernel_size[-1] > 1 else _pointwise(module)
    if isinstance(module, QwenImageResidualBlock):
        return _Residual(module)
    if isinstance(module, QwenImageAttentionBlock):
        return _Attention(module)
    if isinstance(module, QwenImageResample):
        return _Resample(*module.resample) if isinstance(module.resample, nn.Sequential) else nn.Identity()
    if isinstance(module, QwenImageMidBlock):
        first, *rest = module.resnets
        pairs = [part for pair in zip(module.attentions, rest, strict=True) for part in pair if part is not None]
        return nn.Sequential(*map(_flat, [first, *pairs]))
    if isinstance(module, QwenImageUpBlock):
        return nn.Sequential(*map(_flat, [*module.resnets, *(module.upsamplers or [])]))
    raise _unknown(module)


def _unknown(module: nn.Module) -> UnsupportedError:
    return UnsupportedError(f"{type(module).__name__} has no known 2-D form")


def _weight(conv: QwenImageCausalConv3d | nn.Conv2d) -> torch.Tensor:
    """(C', C, k, k): of a causal convolution what a first frame meets."""
    if isinstance(conv, nn.Conv2d):
        return conv.weight.detach()
    if conv.stride[0] != 1:
        raise UnsupportedError(f"a convolution with temporal stride {conv.stride[0]} has no known 2-D form")
    return conv.weight.detach()[:, :, -1]


def _bias(conv: QwenImageCausalConv3d | nn.Conv2d) -> torch.Tensor:
    assert conv.bias is not None  # all of this VAE have one
    return conv.bias.detach()


class _Convolution(nn.Module):
    """A convolution that leaves its bias to the next layer's kernel."""

    def __init__(self, conv: QwenImageCausalConv3d | nn.Conv2d):
        super().__init__()
        weight = _weight(conv)
        self.channels = weight.shape[0]
        # Tensor cores take channels by eight. Pixels have three: zeros appended to them change no sum.
        self.weight = nn.Parameter(F.pad(weight, (0, 0, 0, 0, 0, -weight.shape[1] % 8, 0, -weight.shape[0] % 8)))
        self.bias = nn.Parameter(_bias(conv).clone())
        self.stride = conv.stride[-2:]
        # `_padding` is (left, right, top, bottom, past, future); the class keeps it apart from nn.Conv3d's own.
        self.padding: Any = conv.padding if isinstance(conv, nn.Conv2d) else (conv._padding[2], conv._padding[0])

    def forward(self, sum_: _Sum) -> _Sum:
        x = vae_kernels.add(*sum_)
        if x.shape[-1] < self.weight.shape[1]:
            x = F.pad(x, (0, self.weight.shape[1] - x.shape[-1]))
        x = F.conv2d(x.permute(0, 3, 1, 2), self.weight, None, self.stride, self.padding).permute(0, 2, 3, 1)
        return _Sum(x[..., : self.channels].contiguous(), self.bias)  # copies only if there are channels to drop


class _Pointwise(nn.Linear):
    def forward(self, sum_: _Sum) -> _Sum:  # pyright: ignore[reportIncompatibleMethodOverride] - a layer of this file's
        return _Sum(super().forward(vae_kernels.add(*sum_)))


def _pointwise(conv: QwenImageCausalConv3d | nn.Conv2d, channels: int | None = None) -> _Pointwise:
    """A convolution over single pixels as a matrix product: its first `channels` outputs, or all."""
    weight = _weight(conv)[:channels, :, 0, 0]
    outputs, inputs = weight.shape
    linear = _Pointwise(inputs, outputs, device=weight.device, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    linear.bias.data.copy_(_bias(conv)[:channels])
    return linear


class _Norm(nn.Module):
    """The sum, and its RMS norm over the channels, through SiLU where a nonlinearity is given."""

    def __init__(self, norm: QwenImageRMS_norm, nonlinearity: nn.Module | None = None):
        super().__init__()
        if not isinstance(norm.bias, float):
            raise UnsupportedError("a norm with bias has no known 2-D form")
        if not isinstance(nonlinearity, (nn.SiLU, type(None))):
            raise _unknown(nonlinearity)
        self.silu = nonlinearity is not None
        self.gamma = nn.Parameter(norm.gamma.detach().flatten().clone())

    def forward(self, sum_: _Sum, keep_sum: bool = False) -> tuple[torch.Tensor | None, torch.Tensor]:
        return vae_kernels.add_norm(*sum_, self.gamma, silu=self.silu, keep_sum=keep_sum)


class _Residual(nn.Module):
    def __init__(self, block: QwenImageResidualBlock):
        super().__init__()
        self.norm1, self.conv1 = _Norm(block.norm1, block.nonlinearity), _flat(block.conv1)
        self.norm2, self.conv2 = _Norm(block.norm2, block.nonlinearity), _flat(block.conv2)
        self.shortcut = None if isinstance(block.conv_shortcut, nn.Identity) else _flat(block.conv_shortcut)

    def forward(self, sum_: _Sum) -> _Sum:
        residual, x = self.norm1(sum_, keep_sum=True)
        _, x = self.norm2(self.conv1(_Sum(x)))
        x, bias, _ = self.conv2(_Sum(x))
        return _Sum(x, bias, residual if self.shortcut is None else self.shortcut(_Sum(residual)).x)


class _Attention(nn.Module):
    def __init__(self, block: QwenImageAttentionBlock):
        super().__init__()
        self.norm, self.to_qkv, self.proj = _Norm(block.norm), _pointwise(block.to_qkv), _pointwise(block.proj)

    def forward(self, sum_: _Sum) -> _Sum:
        residual, x = self.norm(sum_, keep_sum=True)
        qkv = self.to_qkv(_Sum(x)).x  # (B, H, W, 3 C)
        x = vae_kernels.attention(qkv.flatten(1, 2)).view_as(x)
        return _Sum(F.linear(x, self.proj.weight), self.proj.bias, residual)


class _Resample(nn.Module):
    """To half the size: zeros below and to the right, every second pixel. To double: every pixel four times."""

    def __init__(self, change: nn.Module, conv: Any):
        super().__init__()
        if isinstance(change, nn.Upsample) and change.scale_factor == (2.0, 2.0) and change.mode == "nearest-exact":
            self.change = vae_kernels.add_upsample
        elif isinstance(change, nn.ZeroPad2d) and change.padding == (0, 1, 0, 1):
            self.change = vae_kernels.add_pad
        else:
            raise _unknown(change)
        self.conv = _Convolution(conv)

    def forward(self, sum_: _Sum) -> _Sum:
        return self.conv(_Sum(self.change(*sum_)))


class _Head(nn.Module):
    def __init__(self, norm: QwenImageRMS_norm, nonlinearity: nn.Module, conv: QwenImageCausalConv3d):
        super().__init__()
        self.norm, self.conv = _Norm(norm, nonlinearity), _Convolution(conv)

    def forward(self, sum_: _Sum) -> _Sum:
        return self.conv(_Sum(self.norm(sum_)[1]))

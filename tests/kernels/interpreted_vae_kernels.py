"""The VAE's Triton kernels, run by Triton's interpreter on CPU tensors, are their twins in PyTorch.

Not collected by itself: TRITON_INTERPRET=1 has to be set before Triton is imported. `test_kernels.py` runs this file.
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from support import ROOT

# By its path: the package would import diffusers too.
_spec = importlib.util.spec_from_file_location(
    "vae_kernels", ROOT / "fast_path" / "vae_kernels.py"
)
kernels = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kernels)

DTYPES = [torch.float32, torch.bfloat16]
# The real VAE's 96, 192, 384, and what fits no block: one pixel's three, not a multiple of 8, a power of two.
CHANNELS = [3, 16, 96, 100, 192, 384]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """float32 rounding; or one unit in the last place of bfloat16, to which the interpreter cuts instead of rounding."""
    assert a.shape == b.shape and a.dtype == b.dtype
    relative = 2**-7 if a.dtype == torch.bfloat16 else 1e-5
    return bool(((a.float() - b.float()).abs() <= relative * b.float().abs() + 1e-6).all())


def operands(channels: int, dtype: torch.dtype, bias: bool, residual: bool):
    """A sum's parts on 2 x 7 x 5 pixels, which no block divides, and a gamma."""
    generator = torch.Generator().manual_seed(channels)
    x, other = (torch.randn(2, 7, 5, channels, generator=generator).to(dtype) for _ in range(2))
    x[0, 3, 2] = 0.0  # a pixel without length
    vectors = torch.randn(2, channels, generator=generator).to(dtype)
    return x, vectors[0] if bias else None, other if residual else None, vectors[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("silu, keep_sum", [(True, True), (True, False), (False, True)])
def test_add_norm(dtype, channels, bias, residual, silu, keep_sum):
    x, *rest = operands(channels, dtype, bias, residual)
    total, normed = kernels._add_norm_triton(x.clone(), *rest, silu, keep_sum)
    expected_total, expected = kernels._add_norm_torch(x.clone(), *rest, silu, keep_sum)
    assert close(normed, expected)
    assert (total is None) == (expected_total is None) == (not keep_sum)
    assert total is None or close(total, expected_total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 96, 100, 384])
@pytest.mark.parametrize("bias, residual", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("height, width, factor", [(7, 5, 1), (8, 6, 1), (14, 10, 2)])
def test_add_and_pad_and_upsample(dtype, channels, bias, residual, height, width, factor):
    x, bias, residual, _ = operands(channels, dtype, bias, residual)
    out = kernels._add_resize_triton(x.clone(), bias, residual, height, width, factor)
    assert close(out, kernels._add_resize_torch(x.clone(), bias, residual, height, width, factor))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 48, 1000, 4096])
def test_softmax(dtype, columns):
    scores = 20 * torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(0))
    out = kernels._softmax_triton(scores, 0.3, dtype)
    assert close(out, torch.softmax(0.3 * scores, dim=-1).to(dtype))


@pytest.mark.parametrize("most", [2**26, 48 * 2 * 7, 1])
def test_attention_in_turns_of_any_length(monkeypatch, most):
    """All rows at once, 7 of 48 at a time, one by one."""
    monkeypatch.setattr(kernels, "MAX_SCORES", most)
    q, k, v = torch.randn(2, 48, 3 * 24, generator=torch.Generator().manual_seed(0)).chunk(3, dim=-1)
    out = kernels._attention_by_rows(q, k, v)
    assert (out - F.scaled_dot_product_attention(q, k, v)).abs().max() < 1e-5


def test_a_layout_that_the_kernels_do_not_know_is_refused():
    x, bias, residual, gamma = operands(16, torch.float32, True, True)
    with pytest.raises(AssertionError, match="strides"):
        kernels._add_norm_triton(x.transpose(1, 2), bias, residual, gamma, True, True)
    with pytest.raises(AssertionError):
        kernels._add_norm_triton(x, bias[:8], residual, gamma, True, True)

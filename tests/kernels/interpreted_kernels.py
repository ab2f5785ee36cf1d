"""The fused transformer's Triton kernels, run by Triton's interpreter on CPU tensors, are their definitions.

Not collected by itself: TRITON_INTERPRET=1 has to be set before Triton is imported. `test_kernels.py` runs this file.
"""

import pytest
import torch

from fast_path import kernels

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.08}  # an ulp of bfloat16 at 8 is 0.0625


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("with_y", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_residual_norm_and_modulation(dtype, with_y):
    x, y, table = (torch.randn(*s).to(dtype) for s in ((15, 100), (15, 100), (6, 6, 100)))
    kinds, y = torch.randint(6, (15,), dtype=torch.int32), y if with_y else None
    now, a, b = table.unbind(1), x.clone(), x.clone()
    expected = kernels.residual_norm_modulate(a, y, now[2], now[3], now[4], kinds, 1e-6)
    got = kernels._residual_norm_modulate_cuda(b, y, now[2], now[3], now[4], kinds, 1e-6)
    assert (got.float() - expected.float()).abs().max() < TOLERANCE[dtype]
    assert (a.float() - b.float()).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("moved", ["", "kv", "qkv"])
@pytest.mark.parametrize("heads", [3, 8, 9])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norm_and_rotation_of_queries_and_keys(dtype, heads, moved):
    qkv, weights = torch.randn(14, 3, heads, 16).to(dtype), torch.randn(2, 2, 16).to(dtype)
    cos, sin, kinds = torch.randn(20, 8), torch.randn(20, 8), torch.randint(6, (14,), dtype=torch.int32)
    positions, places = (torch.randperm(20)[:14].int() for _ in range(2))
    found = []
    for run in (kernels.qk_norm_rope, kernels._qk_norm_rope_cuda):
        given, to = qkv.clone(), torch.zeros(3, 20, heads, 16, dtype=dtype)
        where = kernels.Destinations(to[0] if "q" in moved else None, to[1], to[2], places) if moved else None
        run(given, kinds, positions, weights, cos, sin, 1e-6, where)
        found.append((given, to))
    for a, b in zip(*found, strict=True):
        assert (a.float() - b.float()).abs().max() < 4 * TOLERANCE[dtype]
    given, to = found[0]
    assert torch.equal(given[:, 2], qkv[:, 2]) and (not moved or torch.equal(to[2][places], qkv[:, 2]))
    assert torch.equal(given[:, 0], qkv[:, 0]) == ("q" in moved)

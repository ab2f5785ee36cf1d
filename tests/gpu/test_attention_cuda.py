"""8-bit attention on a Hopper GPU: kernels against definitions, views, batches, recordings. Skipped without one."""

import pytest
import torch
from support.models import sqnr_db

from fast_path import attention
from fast_path.attention import EIGHT, Scales
from fast_path.graphs import Graphs
from fast_path.kernels import Destinations

HEADS, WIDTH = 24, 128
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or attention.refusal(torch.device("cuda"), WIDTH) is not None,
    reason="needs a Hopper GPU, Triton and Gluon",
)


def given(rows: int, heads: int = HEADS) -> tuple:
    """What `norm_rope_quantize` takes before `to`."""
    torch.manual_seed(0)
    qkv, angles = torch.randn(rows, 3, heads, WIDTH, device="cuda").bfloat16(), torch.randn(rows, WIDTH // 2).cuda()
    kinds, positions = (torch.arange(rows, device="cuda") % 3).int(), torch.randperm(rows, device="cuda").int()
    weights = (1 + 0.3 * torch.randn(2, 2, WIDTH, device="cuda")).bfloat16()
    q, k = (attention.qk_scale(weights[:, i]) for i in range(2))
    v = torch.rand(heads, device="cuda") + 0.5
    scales = Scales(q, k, v, attention.output_scale(v))
    return qkv, kinds, positions, weights, angles.cos(), angles.sin(), 1e-6, scales


def on_the_cpu(arguments: tuple) -> tuple:
    cpu = [x.cpu() if isinstance(x, torch.Tensor) else x for x in arguments]
    return (*cpu[:-1], cpu[-1]._replace(v=cpu[-1].v.cpu(), output=cpu[-1].output.cpu()))


def joint(batch: int, tokens: int, heads: int = HEADS) -> tuple[torch.Tensor, Scales]:
    """e4m3 (B, S, 3, H, d)."""
    arguments = given(batch * tokens, heads)
    out = torch.empty(batch * tokens, 3, heads, WIDTH, device="cuda", dtype=EIGHT)
    attention.norm_rope_quantize(*arguments, Destinations(*out.unbind(1), None))
    return out.view(batch, tokens, 3, heads, WIDTH), arguments[-1]


def defined(q, k, v, scales: Scales) -> torch.Tensor:
    return attention.attend_fp8(q.cpu(), k.cpu(), v.cpu(), scales._replace(v=scales.v.cpu(), output=scales.output.cpu()))


@pytest.mark.parametrize("rows, heads", [(1, HEADS), (725, HEADS), (2261, HEADS), (65, 5)])
@pytest.mark.parametrize("moved", ["nothing", "keys and values", "all"])
def test_rows_are_normed_turned_and_rounded_to_where_they_belong(rows, heads, moved):
    arguments = given(rows, heads)
    arguments[0][0, 2, 0, :2] = torch.tensor([1e6, -1e6])
    kept, own = (torch.zeros(n, 3, heads, WIDTH, device="cuda").to(EIGHT) for n in (2 * rows, rows))
    places = None if moved == "nothing" else torch.randperm(2 * rows, device="cuda")[:rows].int()
    to = Destinations(kept[:, 0] if moved == "all" else own[:, 0], kept[:, 1], kept[:, 2], places)
    kept_there, own_there = kept.cpu(), own.cpu()
    q = kept_there[:, 0] if moved == "all" else own_there[:, 0]
    there = Destinations(q, kept_there[:, 1], kept_there[:, 2], None if places is None else places.cpu())
    attention.norm_rope_quantize(*arguments, to, move_q=moved == "all")
    attention.norm_rope_quantize(*on_the_cpu(arguments), there, move_q=moved == "all")
    got, wanted = (torch.cat([k, o]).flatten() for k, o in ((kept.cpu(), own.cpu()), (kept_there, own_there)))
    different = (got.view(torch.uint8) != wanted.view(torch.uint8)).sum()
    assert different <= 1 + 1e-5 * rows * 3 * heads * WIDTH, "but for what lies between two roundings, to the bit"
    assert sqnr_db(got.float(), wanted.float()) > 55
    assert kept_there.float().any()


@pytest.mark.parametrize("batch, tokens", [(1, 1), (1, 37), (2, 128), (1, 725), (2, 725), (1, 2261)])
def test_values_are_transposed_to_the_bit(batch, tokens):
    v = torch.randint(0, 256, (batch, tokens, 3, HEADS, WIDTH), dtype=torch.uint8, device="cuda").view(EIGHT)[:, :, 2]
    got, wanted = attention.transposed_values(v), attention.transposed_values(v.cpu())
    assert torch.equal(got.cpu().view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("batch, tokens, queries", [
    (1, 1, 1), (1, 37, 37), (1, 128, 128), (1, 725, 725), (1, 725, 300), (2, 37, 37), (2, 725, 725), (2, 725, 256),
    (1, 2261, 700), (1, 2261, 2261),
])  # fmt: skip
def test_attention_is_its_definition_for_views_of_all_kinds(batch, tokens, queries):
    rows, scales = joint(batch, tokens)
    q, k, v = rows.unbind(2)
    first = (tokens - queries) // 2
    kept = torch.stack([k, v]).flatten(1, 2)  # as token reuse keeps them
    for queried in (q[:, first : first + queries], q[:, first : first + queries].contiguous()):
        for keys, values in ((k, v), tuple(kept.view(2, batch, tokens, HEADS, WIDTH))):
            got = attention.attend_fp8(queried, keys, values, scales)
            assert got.shape == (batch, queries, HEADS * WIDTH)
            assert sqnr_db(got.cpu(), defined(queried, keys, values, scales)) > 30


@pytest.mark.parametrize("batch, tokens, queries", [(1, 37, 37), (1, 2261, 700), (2, 725, 725)])
def test_the_output_can_be_written_in_a_layers_input_format(batch, tokens, queries):
    rows, scales = joint(batch, tokens)
    q, k, v = rows.unbind(2)
    got = attention.attend_fp8(q[:, :queries], k, v, scales, eight_bit=True)
    assert got.values.dtype == EIGHT and got.values.shape == (batch * queries, HEADS * WIDTH)
    assert torch.equal(got.scales, scales.output.expand(batch * queries))
    exact = attention.attend_fp8(q[:, :queries], k, v, scales).flatten(0, 1)
    assert sqnr_db(got.dequantized(), exact) > 28, "e4m3 alone has 31 dB"


def test_few_queries_of_scattered_rows_attend_to_all_that_is_cached():
    rows, scales = joint(1, 2261)
    kept, places = rows[0, :, 1:].clone(), torch.randperm(2261, device="cuda")[:700].sort().values.int()
    *arguments, _ = given(700)
    q = torch.empty(700, HEADS, WIDTH, device="cuda", dtype=EIGHT)
    attention.norm_rope_quantize(*arguments, scales, Destinations(q, kept[:, 0], kept[:, 1], places), move_q=False)
    q, k, v = (x.unsqueeze(0) for x in (q, kept[:, 0], kept[:, 1]))
    assert not torch.equal(k.float(), rows[:, :, 1].float())
    assert sqnr_db(attention.attend_fp8(q, k, v, scales).cpu(), defined(q, k, v, scales)) > 30


@pytest.mark.parametrize("tokens", [725, 2261])
def test_recorded_and_replayed_it_computes_the_new_inputs(tokens):
    *arguments, scales = given(tokens)

    def step(qkv):
        out = torch.empty_like(qkv, dtype=EIGHT)
        attention.norm_rope_quantize(qkv, *arguments[1:], scales, Destinations(*out.unbind(1), None))
        q, k, v = out.unsqueeze(0).unbind(2)
        return attention.attend_fp8(q, k, v, scales).clone()

    graphs, seen = Graphs(), []
    for _ in range(3):
        qkv = torch.randn_like(arguments[0])
        heard = graphs.run("step", step, qkv).clone()
        assert torch.equal(heard, step(qkv))
        seen.append(heard)
    assert graphs.recordings == 1 and not torch.equal(seen[1], seen[2])

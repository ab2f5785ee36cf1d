"""What a quantised model takes on the GPU at its worst, counted without one: the meta device stands in its place."""

import pytest
import torch
from support.models import KINDS, small_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cached_pipeline import QUANTIZATIONS, load_pipeline
from fast_path import modulation
from fast_path.modulation import Modulations
from fast_path.transformer import FusedTransformer
from int8_linear import Int8Linear
from pipeline import placement
from pipeline.folder import POCKET_FOLDER
from pipeline.quantize import quantize_main
from pipeline.vision_language import word_rows
from quantization import layer
from quantization.pair import QuantizedPair
from quantization.swap import PACKED_GROUPS, swap_linears

META = torch.device("meta")
CHUNK = 2**13  # numbers quantised at a time: as small beside the pocket model as the real one beside the real model
INTERMEDIATES = 6 * 4 * CHUNK  # rounding, magnitudes and the like, in float32 at most


class Held(TorchDispatchMode):
    """Bytes that tensors hold on the meta device: now, and at most since `begin`."""

    def __init__(self):
        super().__init__()
        self.memories, self.most = {}, 0

    @property
    def now(self) -> int:
        self.memories = {key: known for key, known in self.memories.items() if not known[0].expired()}
        return sum(size for _, size in self.memories.values())

    def begin(self, *already: torch.Tensor) -> int:
        """Counts from here on, what lies there `already` included."""
        self._add(already)
        self.most = self.now
        return self.most

    def _add(self, tensors) -> None:
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                memory = tensor.untyped_storage()
                self.memories[memory._cdata] = StorageWeakRef(memory), memory.nbytes()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self._add(tree_leaves(out))
        self.most = max(self.most, self.now)
        return out


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(layer, "CHUNK", CHUNK)


def on_meta(module: nn.Module) -> int:
    """Bytes of its parameters and buffers there; views of one memory once."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_meta]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def test_the_count_sees_what_lies_there_at_the_same_time():
    with Held() as held:
        first = torch.empty(1000, device=META)
        second = first + 1
        del first
        assert (held.now, held.most) == (4000, 8000)
        del second
        assert held.begin() == 0


@pytest.mark.parametrize("kind", QUANTIZATIONS.values())
def test_loading_never_holds_more_than_what_stays_and_some_rows(kind, small_chunks):
    pipeline = load_pipeline("pocket")
    with Held() as held:
        placement.finish(pipeline, META, (None, 1.0), {"transformer": kind, "text_encoder": Int8Linear}, lambda *_: None)
        stays, most = held.begin(), held.most
    parts = (pipeline.transformer, pipeline.text_encoder, pipeline.vae)
    assert stays == pytest.approx(sum(map(on_meta, parts)), rel=0.01)
    assert most <= stays + INTERMEDIATES
    largest = max(p.nbytes for p in pipeline.transformer.parameters())
    assert largest > INTERMEDIATES, "the bound would see a float layer"


def test_a_quantised_folder_goes_there_without_a_second_copy_of_anything(tmp_path):
    quantize_main(Int8Linear, "", [str(POCKET_FOLDER), str(tmp_path)])
    pipeline = load_pipeline(str(tmp_path))
    with Held() as held:
        placement.place(pipeline, META)
        stays, most = held.begin(), held.most
    assert most == stays == pytest.approx(on_meta(pipeline.transformer) + on_meta(pipeline.text_encoder) + on_meta(pipeline.vae))


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_path_finds_the_layers_packed_and_moves_nothing(kind):
    model = small_model()
    swap_linears(model, kind)
    before = {name: p.untyped_storage()._cdata for name, p in model.named_parameters()}
    blocks = len(model.transformer_blocks)
    eight_bit = {before[name] for name, p in model.named_parameters() if p.dtype.itemsize == 1}
    assert len(eight_bit) == 4 * blocks, "q, k, v of both streams; out; up; down"
    assert len(FusedTransformer(model).blocks) == blocks
    assert {name: p.untyped_storage()._cdata for name, p in model.named_parameters()} == before


def test_layers_in_buffers_of_their_own_are_packed_into_one_pair_by_pair():
    blocks = small_model().transformer_blocks.to(META)
    made = {n: Int8Linear.from_float(m) for n, m in blocks.named_modules() if isinstance(m, nn.Linear)}
    layers = [
        [[made[f"{i}.{name}"] for name in names[: len(names) // 2]], [made[f"{i}.{name}"] for name in names[len(names) // 2 :]]]
        for i in range(len(blocks))
        for names in PACKED_GROUPS[:4]
    ]  # fmt: skip
    weights = [p for pair in layers for half in pair for layer in half for p in layer.parameters()]
    assert len({p.untyped_storage()._cdata for p in weights}) == len(weights) == 3 * 12 * len(blocks)
    with Held() as held:
        before = held.begin(*weights)
        del weights, made
        pairs = [QuantizedPair(*pair) for pair in layers]
        assert held.now == before, "nothing is held twice"
        assert before < held.most <= before + max(sum(p.nbytes for p in pair.whole.parameters()) for pair in pairs)


def test_a_prompts_words_and_not_their_table_are_brought_to_the_device():
    words = nn.Embedding(1000, 64)
    with Held() as held:
        table, rows = word_rows(words, [5, 7, 5, 5, 999, 7], META)
        assert held.most == table.nbytes + rows.nbytes == 3 * 64 * 4 + 6 * 8


def test_modulation_weights_are_visited_block_by_block(monkeypatch):
    model, visited, at_once = small_model(), [], []

    class Visiting(modulation._visiting):
        def __enter__(self):
            visited.append(self.module)
            at_once.append(len(visited))
            return super().__enter__()

        def __exit__(self, *exception):
            visited.remove(self.module)
            return super().__exit__(*exception)

    monkeypatch.setattr(modulation, "_visiting", Visiting)
    Modulations(model).get(500.0, (500.0, 250.0))
    assert max(at_once) == 2 and len(at_once) == 2 * len(model.transformer_blocks), "each once, for all times"

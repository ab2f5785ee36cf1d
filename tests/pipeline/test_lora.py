"""LoRA files in a pipeline: found, fused, changed at run time, taken away, refused without a trace."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from support.lora_files import lightning_keys, lora_pairs, write_lora

from cached_pipeline import load_pipeline
from pipeline import lora, lora_file
from pipeline.images import EditError
from pipeline.sampling import LIGHTNING_SCHEDULER


def test_a_lightning_lora_brings_its_scheduler_and_others_do_not(pocket, tmp_path):
    base = tmp_path / "base"
    pocket.save_pretrained(base)
    config = LIGHTNING_SCHEDULER | {"base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}
    FlowMatchEulerDiscreteScheduler.from_config(config).save_pretrained(base / "scheduler")
    for name, terminal in (("My-Lightning-4steps.safetensors", None), ("style.safetensors", 0.02)):
        write_lora(tmp_path / name, pocket.transformer)
        pipe = load_pipeline(str(base), lora=str(tmp_path / name))
        assert pipe.scheduler.config.shift_terminal == terminal, name
        assert pipe.description["scheduler"] == ("lightning" if terminal is None else "base")


def test_known_lightning_files():
    repository, file, lightning = lora.find_lora("lightning-4", "2509")
    assert lightning and repository == "lightx2v/Qwen-Image-Lightning"
    assert file == "Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors"
    assert "8steps" in lora.find_lora("lightning-8", "2509")[1]
    assert lora.find_lora("lightning-4", "2511")[0] == "lightx2v/Qwen-Image-Edit-2511-Lightning"
    with pytest.raises(EditError, match="Known for it: lightning-4"):
        lora.find_lora("lightning-8", "2511")
    with pytest.raises(EditError, match="Known for it: none"):
        load_pipeline("pocket", lora="lightning-4")


def transformer_state(pipe):
    return {name: p.detach().clone() for name, p in pipe.transformer.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fresh(pocket, file, weight=1.0) -> dict[str, torch.Tensor]:
    """The weights of a model that was never anything else: what `load_pipeline(lora=file)` has."""
    transformer = copy.deepcopy(pocket.transformer)
    lora.fuse(transformer, lora.open_lora(str(file), transformer)[0], weight)
    return dict(transformer.named_parameters())


@pytest.fixture(scope="module")
def pipe():
    """A pipeline of this file's own; each test leaves it without a LoRA."""
    return load_pipeline("pocket")


@pytest.fixture(params=[False, True], ids=["plain", "fast"])
def plain_or_fast(request, pipe):
    if request.param:
        pipe.enable_fast_path()
    yield pipe
    pipe.change_lora(None)
    pipe.disable_fast_path()


@pytest.fixture(scope="module")
def files(pocket, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("one", "two")):
        write_lora(folder / f"{name}.safetensors", pocket.transformer, seed=seed)
    return folder


def test_a_lora_is_fused_when_the_model_is_loaded(pocket, files):
    loaded = load_pipeline("pocket", lora=str(files / "one.safetensors"), lora_weight=0.5)
    assert same(transformer_state(loaded), fresh(pocket, files / "one.safetensors", 0.5))
    assert loaded.description["lora"] == str(files / "one.safetensors") and loaded.description["lora_weight"] == 0.5
    assert loaded.transformer.state_dict().keys() == pocket.transformer.state_dict().keys(), "no adapter layers are left"


def test_a_lora_changed_at_run_time_gives_the_weights_of_a_fresh_start(pocket, files, plain_or_fast):
    pipe, one, two = plain_or_fast, str(files / "one.safetensors"), str(files / "two.safetensors")
    addresses = {name: p.data_ptr() for name, p in pipe.transformer.named_parameters()}
    for file, weight in ((one, 1.0), (two, 0.5), (two, 2.0)):
        assert pipe.change_lora(file, weight) > 0
        assert same(transformer_state(pipe), fresh(pocket, file, weight))
        assert (pipe.description["lora"], pipe.description["lora_weight"]) == (file, weight)
    pipe.change_lora(None)
    assert same(transformer_state(pipe), transformer_state(pocket))
    assert pipe.description["lora"] is None
    assert addresses == {name: p.data_ptr() for name, p in pipe.transformer.named_parameters()}, "changed in place"


def edit(pipe, photo) -> torch.Tensor:
    return pipe(photo(64, 64), "sepia", width=64, height=64, num_inference_steps=2, true_cfg_scale=1.0, reference_area="output",
                generator=torch.Generator().manual_seed(0), output_type="latent").images  # fmt: skip


def test_the_fast_path_edits_with_the_changed_lora(pipe, files, photo):
    pipe.change_lora(str(files / "one.safetensors"))
    plain = edit(pipe, photo)
    pipe.change_lora(None)
    pipe.enable_fast_path()
    before = edit(pipe, photo)
    pipe.change_lora(str(files / "one.safetensors"))
    changed = edit(pipe, photo)
    pipe.change_lora(None)
    assert torch.equal(edit(pipe, photo), before)
    pipe.disable_fast_path()
    assert (changed - plain).abs().max() < 1e-4, "the fast path's rounding"
    assert (changed - before).abs().max() > 1e-3, "the LoRA does something"


def test_a_lora_that_cannot_be_used_leaves_the_former_one_in_place(pocket, files, tmp_path, plain_or_fast):
    """Bit for bit, and also when its own file is gone by then."""
    pipe = plain_or_fast
    write_lora(tmp_path / "good.safetensors", pocket.transformer)
    pipe.change_lora(str(tmp_path / "good.safetensors"), 0.7)
    before, scheduler = transformer_state(pipe), pipe.scheduler
    (tmp_path / "good.safetensors").unlink()
    pairs = lora_pairs(pocket.transformer)
    last = list(pairs)[-1]
    misfit = lightning_keys(pairs | {"layers.7.nothing": (torch.ones(4, 8), torch.ones(8, 4))})
    nan = lightning_keys(pairs | {last: (pairs[last][0] * float("nan"), pairs[last][1])})
    save_file(misfit, tmp_path / "misfit-lightning.safetensors")
    save_file(nan, tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((files / "one.safetensors").read_bytes()[:-1])
    for name, weight in (("missing", 1.0), ("misfit-lightning", 1.0), ("nan", 1.0), ("cut", 1.0), ("nan", float("inf"))):
        with pytest.raises(EditError):
            pipe.change_lora(str(tmp_path / f"{name}.safetensors"), weight)
        assert same(transformer_state(pipe), before), name
        assert pipe.description["lora_weight"] == 0.7 and pipe.scheduler is scheduler
    with pytest.raises(EditError, match="more than float32 holds"):
        pipe.change_lora(str(files / "one.safetensors"), 1e40)
    assert same(transformer_state(pipe), before)


def test_memory_that_runs_out_in_the_middle_leaves_the_former_weights(pocket, files, pipe, monkeypatch):
    one, two = files / "one.safetensors", files / "two.safetensors"
    pipe.change_lora(str(one), 0.7)
    before, fuse, count = transformer_state(pipe), lora_file.Change.fuse, iter(range(10**6))

    def fuse_some(change, layer, weight):
        if next(count) == 20:
            raise torch.OutOfMemoryError("20 layers were changed")
        fuse(change, layer, weight)

    monkeypatch.setattr(lora_file.Change, "fuse", fuse_some)
    with pytest.raises(torch.OutOfMemoryError, match="20 layers"):
        pipe.change_lora(str(two))
    assert same(transformer_state(pipe), before) and pipe.description["lora"] == str(one)
    pipe.change_lora(None)


def test_a_lora_goes_into_the_weights_beneath_an_adapter_of_stock(pocket, files, tmp_path):
    """What `load_lora_weights` of stock has put beside the layers stays there."""
    mine = load_pipeline("pocket")
    pairs = lora_pairs(pocket.transformer, seed=5, blocks=1)
    state = {f"transformer.{n}.lora_{ab}.weight": t for n, pair in pairs.items() for ab, t in zip("AB", pair, strict=True)}
    mine.load_lora_weights(state, adapter_name="beside")
    mine.change_lora(str(files / "one.safetensors"))
    mine.change_lora(None)
    mine.change_lora(str(files / "two.safetensors"))
    assert mine.get_list_adapters() == {"transformer": ["beside"]}
    mine.unload_lora_weights()
    assert same(transformer_state(mine), fresh(pocket, files / "two.safetensors"))


def test_a_lightning_lora_taken_away_gives_the_model_its_own_schedule_back(pocket, tmp_path):
    base = tmp_path / "base"
    pocket.save_pretrained(base)
    scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.02, use_dynamic_shifting=True)
    scheduler.save_pretrained(base / "scheduler")
    write_lora(tmp_path / "x-Lightning.safetensors", pocket.transformer)
    pipe = load_pipeline(str(base), lora=str(tmp_path / "x-Lightning.safetensors"))
    assert pipe.description["scheduler"] == "lightning"
    pipe.change_lora(None)
    assert pipe.description["scheduler"] == "base"


def test_a_scheduler_that_somebody_put_in_stays_when_a_lora_goes(files, pipe):
    own, pipe.scheduler = pipe.scheduler, FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipe.change_lora(str(files / "one.safetensors"))
    pipe.change_lora(None)
    assert pipe.scheduler.config.shift == 2.0
    pipe.scheduler = own


def test_where_a_lora_may_lie(tmp_path):
    (tmp_path / "a.safetensors").touch()
    assert lora.find_lora(str(tmp_path / "a.safetensors"), "2509") == (str(tmp_path), "a.safetensors", False)
    assert lora.find_lora("owner/name", "2509") == ("owner/name", None, False)
    assert lora.find_lora("owner/name/sub/x-Lightning.safetensors", "2509") == (
        "owner/name", "sub/x-Lightning.safetensors", True,
    )  # fmt: skip
    assert lora.find_lora(str(tmp_path), "2509") == (str(tmp_path), "a.safetensors", False), "its only one"


@pytest.mark.parametrize("name", [
    "missing.safetensors", "/nowhere/a.safetensors", "one", "a/b.safetensors", "", " ", "a//b", "https://host/owner/name",
    "owner/na me", "C:\\loras\\a.safetensors", "a" * 5000, "a/" * 3000, "a\0b", "~nobody-here/a.safetensors", "/dev/null", "lightning-3",
])  # fmt: skip
def test_a_lora_that_is_nowhere_is_one_sentence_that_says_what_is_allowed(name):
    with pytest.raises(EditError, match=r"Allowed: lightning-4, lightning-8, the path of a .safetensors file, a hub id") as error:
        lora.find_lora(name, "2509")
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_a_folder_of_several_loras_is_refused_with_their_names(tmp_path):
    with pytest.raises(EditError, match=r"is a folder of 0 .safetensors files"):
        lora.find_lora(str(tmp_path), "2509")
    for i in range(20):
        (tmp_path / f"style-{i:02}.safetensors").touch()
    with pytest.raises(EditError, match=r"a folder of 20 .safetensors files: style-00.safetensors, style-01.*, ...") as error:
        lora.find_lora(str(tmp_path), "2509")
    assert len(str(error.value)) < 600
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert lora.find_lora(str(tmp_path), "2509")[1] == "pytorch_lora_weights.safetensors", "the name that diffusers gives"


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PKL"])
def test_a_pickle_is_refused_unopened(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"never read")
    for name in (str(tmp_path / f"a{suffix}"), f"owner/name/a{suffix}"):
        with pytest.raises(EditError, match="a pickle, which may run any program"):
            lora.find_lora(name, "2509")


def test_a_repository_with_one_lora_needs_no_file_name_and_one_with_several_is_refused_with_them(
    pocket, files, monkeypatch, tmp_path
):
    held, asked = ["README.md", "x-Lightning.safetensors"], []
    monkeypatch.setattr(lora.HfApi, "list_repo_files", lambda self, repository: held)
    target = tmp_path / "x-Lightning.safetensors"
    target.write_bytes((files / "one.safetensors").read_bytes())
    monkeypatch.setattr(lora, "hf_hub_download", lambda *names: asked.append(names) or str(target))
    changes, lightning = lora.open_lora("owner/name", pocket.transformer)
    assert asked == [("owner/name", "x-Lightning.safetensors")] and len(changes) == 72 and lightning
    held.append("sub/other.safetensors")
    with pytest.raises(EditError, match=r"of 2 .safetensors files: sub/other.safetensors, x-Lightning.safetensors. Allowed"):
        lora.open_lora("owner/name", pocket.transformer)


def test_a_hub_that_is_not_there_is_one_sentence(pocket):
    for name in ("owner/not-here", "owner/not-here/a.safetensors"):
        with pytest.raises(EditError, match=f'The LoRA "{name}" could not be downloaded') as error:
            lora.open_lora(name, pocket.transformer)
        assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_a_lora_that_does_not_fit_is_refused_at_the_start(pocket, tmp_path):
    save_file({"something.weight": torch.zeros(2, 2)}, tmp_path / "no.safetensors")
    with pytest.raises(EditError, match=r"no.safetensors\" cannot be used: it holds whole weights"):
        load_pipeline("pocket", lora=str(tmp_path / "no.safetensors"))
    for weight in (float("nan"), True, "1", None):
        with pytest.raises(EditError, match="The LoRA weight is"):
            pocket.change_lora(str(tmp_path / "no.safetensors"), weight)

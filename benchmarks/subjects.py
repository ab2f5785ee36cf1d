"""Who is measured: stock diffusers, what others put on top of it, and ours; and the order in which they can be.

All subjects share one set of modules. What a subject changes about them (compiled blocks, cache hooks, the fast path,
which takes the modulation weights off the GPU, quantised weights) stands in the way of the others, so subjects
run in phases: a phase enters, its subjects take turns, and it leaves the modules as they were. Quantised weights cannot
be put back: each of those phases makes a transformer of its own in the place of the one before.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import diffusers
import numpy as np
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image

from benchmarks.instruments import Clock
from cached_pipeline import CachedQwenImageEditPipeline, quantization_kind
from fast_path import attention
from pipeline import folder, placement
from pipeline.images import download
from pipeline.sampling import lightning_scheduler

PROMPT = "make it a pencil sketch"
NEGATIVE_PROMPT = " "

Frames = list[list[np.ndarray]]  # one list a reference, in it one uint8 picture (H, W, 3) for each row of the batch


class LeftOutError(Exception):
    """Why a subject or a case is not measured here; the text goes to the result file."""


@dataclass(frozen=True)
class Case:
    """What is asked for. `reference_area` in pixels; `vlm`: "fresh" embeds every picture, "cached" keeps the first's."""

    width: int
    height: int
    steps: int
    cfg: float
    references: int
    reference_area: int
    batch: int
    vlm: str

    def __str__(self) -> str:
        parts = [f"{self.width}x{self.height}", f"{self.steps} steps" if self.steps > 1 else "1 step"]
        parts += [f"CFG {self.cfg:g}"] if self.cfg > 1 else []
        parts += [f"{self.references} references"] if self.references > 1 else []
        parts += [f"references of {self.reference_area} pixels"]
        parts += [f"batch {self.batch}"] if self.batch > 1 else []
        return ", ".join([*parts, f"VLM {self.vlm}"])


def as_run(subject: str, case: Case) -> Case:
    """What `subject` makes of the case: stock scales references to a megapixel and embeds every picture.

    Raises LeftOutError if it cannot run it.
    """
    if not subject.startswith(("stock", "cache-dit")):
        return case
    if case.batch > 1:
        raise LeftOutError("stock diffusers refuses batches")
    if subject == "cache-dit" and case.steps < 8 and case.steps not in (4, 6):
        raise LeftOutError("cache-dit has masks for 4, 6, 8 and more steps")
    return dataclasses.replace(case, reference_area=stock.VAE_IMAGE_SIZE, vlm="fresh")


class Subject:
    """One way to make an edit; `edit` is the frame that is timed."""

    quantize = attention_quantize = "none"

    def __init__(self, pipeline: QwenImageEditPlusPipeline):
        self.pipeline = pipeline

    def prepare(self, case: Case) -> None:
        """Once before each case, untimed."""

    def edit(self, frames: Frames, case: Case, clock: Clock) -> np.ndarray:
        """uint8 (batch, height, width, 3) on the CPU. Marks the ends of its stages, and writes `clock.tokens`."""
        raise NotImplementedError

    def share_run(self, case: Case) -> float:
        """The share of the transformer's blocks that really ran since `prepare`."""
        return 1.0


class Ours(Subject):
    """Our five steps, one after the other, as the engine calls them. Fast or plain is the pipeline's own state."""

    def __init__(self, pipeline: CachedQwenImageEditPipeline, quantize: str = "none", attention_quantize: str = "none"):
        super().__init__(pipeline)
        self.quantize, self.attention_quantize = quantize, attention_quantize
        self._kept: dict[tuple, tuple] = {}

    def prepare(self, case: Case) -> None:
        transformer = self.pipeline.transformer
        reason = attention.refusal(transformer.device, transformer.config.attention_head_dim)
        if self.attention_quantize != "none" and reason:
            raise LeftOutError(f"8-bit attention: {reason}")

    def edit(self, frames: Frames, case: Case, clock: Clock) -> np.ndarray:
        pipeline, width, height = self.pipeline, case.width, case.height
        if pipeline.fused_transformer is not None:  # two subjects may share it, and take turns
            pipeline.fused_transformer.eight_bit_attention = self.attention_quantize == "fp8"
        slots = pipeline.open_references(frames)
        embeds, mask, negative, negative_mask = self._embed(slots, case)
        clock.mark("encode_prompt")
        references = pipeline.encode_references(slots, area=case.reference_area, width=width, height=height)
        clock.mark("encode_references")
        schedule = pipeline.schedule(case.steps, width, height)
        noise = pipeline.initial_noise(width, height, 0, case.batch)
        latents = pipeline.denoise(
            noise, references, embeds, mask, schedule,
            negative_prompt_embeds=negative, negative_mask=negative_mask, cfg_scale=case.cfg,
        )  # fmt: skip
        clock.mark("denoise")
        result = download(pipeline.decode(latents, width, height))
        clock.mark("decode")
        clock.tokens = {"noise": noise.shape[1], "reference": references.latents.shape[1], "text": embeds.shape[1]}
        if negative is not None:
            clock.tokens["negative_text"] = negative.shape[1]
        return result

    def _embed(self, slots, case: Case) -> tuple:
        """(embeddings, mask) of the prompt, then of the negative prompt: None and None without guidance."""
        key = (case.width, case.height, case.references, case.batch, case.cfg > 1)
        if case.vlm == "cached" and key in self._kept:
            return self._kept[key]
        prompt = self.pipeline.encode_prompt(PROMPT, slots)
        negative = self.pipeline.encode_prompt(NEGATIVE_PROMPT, slots) if case.cfg > 1 else (None, None)
        if case.vlm == "cached":
            self._kept[key] = (*prompt, *negative)
        return *prompt, *negative


class QwenImageEditPlusPipelineWithMarks(QwenImageEditPlusPipeline):
    """Stock, whose stages tell a clock when they end. The name begins as stock's, by which cache-dit knows it."""

    clock: Clock

    def encode_prompt(self, *args, **kwargs):
        embeds, mask = super().encode_prompt(*args, **kwargs)
        self.clock.mark("encode_prompt")
        self.clock.tokens["negative_text" if "text" in self.clock.tokens else "text"] = embeds.shape[1]
        return embeds, mask

    def prepare_latents(self, *args, **kwargs):
        noise, references = super().prepare_latents(*args, **kwargs)
        self.clock.mark("encode_references")
        self.clock.tokens |= {"noise": noise.shape[1], "reference": references.shape[1]}
        return noise, references

    def _unpack_latents(self, *args, **kwargs):
        self.clock.mark("denoise")
        return super()._unpack_latents(*args, **kwargs)


class Stock(Subject):
    """`QwenImageEditPlusPipeline.__call__`."""

    def edit(self, frames: Frames, case: Case, clock: Clock) -> np.ndarray:
        self.pipeline.clock = clock
        out = self.pipeline(
            image=[Image.fromarray(picture) for [picture] in frames],
            prompt=PROMPT,
            negative_prompt=NEGATIVE_PROMPT if case.cfg > 1 else None,
            true_cfg_scale=case.cfg,
            width=case.width,
            height=case.height,
            num_inference_steps=case.steps,
            generator=torch.Generator("cpu").manual_seed(0),
        )
        result = np.asarray(out.images[0])[None]
        clock.mark("decode")
        return result


class CompiledStock(Stock):
    """Stock on compiled blocks. Every case compiles for its own shapes, so none runs on another's general kernels."""

    def prepare(self, case: Case) -> None:
        torch.compiler.reset()


class TorchaoPlain(Ours):
    """Our plain path on torchao's layers, compiled, which they are made for: eager, its INT8 is many times slower than bf16."""

    def prepare(self, case: Case) -> None:
        torch.compiler.reset()


class CacheDitStock(Stock):
    """cache-dit with its own "medium" mask of steps.

    By default it decides from the numbers which steps to skip, so random weights would give a speed that says nothing;
    a mask skips the same steps with any weights.
    """

    def __init__(self, pipeline: QwenImageEditPlusPipelineWithMarks, cache_dit):
        super().__init__(pipeline)
        self.cache_dit, self._enabled = cache_dit, False
        self._blocks_run = self._frames = 0

    def prepare(self, case: Case) -> None:
        self.stop()
        config = self.cache_dit.DBCacheConfig(
            Fn_compute_blocks=min(8, self.pipeline.transformer.config.num_layers // 4),
            num_inference_steps=case.steps,
            max_warmup_steps=0,  # the mask says it all
            steps_computation_mask=self.cache_dit.steps_mask(total_steps=case.steps, mask_policy="medium"),
            steps_computation_policy="static",
            enable_separate_cfg=case.cfg > 1,
        )
        self.cache_dit.enable_cache(self.pipeline, cache_config=config)
        self._enabled, self._blocks_run, self._frames = True, 0, 0

    def edit(self, frames: Frames, case: Case, clock: Clock) -> np.ndarray:
        self._frames += 1
        return super().edit(frames, case, clock)

    def share_run(self, case: Case) -> float:
        forwards = self._frames * case.steps * (2 if case.cfg > 1 else 1)
        return self._blocks_run / (forwards * self.pipeline.transformer.config.num_layers)

    def count_block(self, *_) -> None:
        """A forward hook of every block."""
        self._blocks_run += 1

    def stop(self) -> None:
        if self._enabled:
            self.cache_dit.disable_cache(self.pipeline)
        self._enabled = False


@dataclass
class Models:
    """One set of modules behind both pipelines, and what the fast path said when it was last put in."""

    ours: CachedQwenImageEditPipeline
    make_transformer: Callable[[], torch.nn.Module]  # the same once more, on the same device
    fast_path: list = field(default_factory=list)
    probe: dict = field(default_factory=dict)  # the plain path's numbers, for `probes`

    def __post_init__(self):
        self.stock = QwenImageEditPlusPipelineWithMarks(**self.ours.components)
        self.ours.fast_path.keep_weights = False  # the two take turns: the fast path is out when stock runs
        for pipeline in (self.ours, self.stock):
            pipeline.set_progress_bar_config(disable=True)
        self.ours.caches_enabled = False  # every picture is new: a cache would only cost its hashing

    def renew_transformer(self) -> torch.nn.Module:
        """A new transformer in the place of the old, which is dropped first: a GPU may not hold both."""
        for pipeline in (self.ours, self.stock):
            pipeline.register_modules(transformer=None)
        gc.collect()
        transformer = self.make_transformer()
        for pipeline in (self.ours, self.stock):
            pipeline.register_modules(transformer=transformer)
        return transformer

    @property
    def blocks(self) -> torch.nn.ModuleList:
        return self.ours.transformer.transformer_blocks


class Phase(NamedTuple):
    """Subjects that can take turns, and the context manager that makes the modules theirs: Models -> {name: subject}.

    Entering raises LeftOutError if the phase cannot be measured here.
    """

    subjects: tuple[str, ...]
    enter: Callable[[Models], AbstractContextManager[dict[str, Subject]]]


@contextmanager
def _untouched(models: Models) -> Iterator[dict]:
    yield {"stock": Stock(models.stock), "plain": Ours(models.ours)}


@contextmanager
def _compiled(models: Models) -> Iterator[dict]:
    with _compiled_blocks(models):
        yield {"stock-compiled": CompiledStock(models.stock)}


@contextmanager
def _compiled_blocks(models: Models) -> Iterator[None]:
    models.ours.transformer.compile_repeated_blocks(fullgraph=True)
    try:
        yield
    finally:
        for block in models.blocks:
            block._compiled_call_impl = None  # where nn.Module.compile() puts its work; it has no way back of its own
        torch.compiler.reset()


@contextmanager
def _cache_dit(models: Models) -> Iterator[dict]:
    try:
        import cache_dit
    except ImportError as error:
        raise LeftOutError(f"cache-dit is not installed ({error})") from None
    subject = CacheDitStock(models.stock, cache_dit)
    hooks = [block.register_forward_hook(subject.count_block) for block in models.blocks]
    try:
        yield {"cache-dit": subject}
    finally:
        subject.stop()
        for hook in hooks:
            hook.remove()


@contextmanager
def _fast(models: Models) -> Iterator[dict]:
    models.fast_path = models.ours.enable_fast_path()
    try:
        yield {"fast": Ours(models.ours)}
    finally:
        models.ours.disable_fast_path()


def _fast_quantized(kind: str) -> Callable[[Models], AbstractContextManager[dict]]:
    @contextmanager
    def enter(models: Models) -> Iterator[dict]:
        transformer = models.renew_transformer()
        device = next(transformer.parameters()).device
        try:
            placement.quantize(transformer, quantization_kind(kind), device)
            gc.collect()
            models.ours.enable_fast_path()
            yield {f"fast-{kind}": Ours(models.ours, kind), f"fast-{kind}-attention": Ours(models.ours, kind, "fp8")}
        finally:
            models.ours.disable_fast_path()
            models.renew_transformer()

    return enter


def _torchao(kind: str) -> Callable[[Models], AbstractContextManager[dict]]:
    """Dynamic quantisation of the blocks' Linears, without modulation."""

    @contextmanager
    def enter(models: Models) -> Iterator[dict]:
        try:
            from torchao import quantization as ao
        except ImportError as error:
            raise LeftOutError(f"torchao is not installed ({error})") from None
        device = models.blocks[0].attn.to_q.weight.device
        if kind == "int8":
            config = ao.Int8DynamicActivationInt8WeightConfig()
        elif device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
            config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
        else:
            raise LeftOutError("FP8 products need a GPU that has them")

        def chosen(module: torch.nn.Module, name: str) -> bool:
            return isinstance(module, torch.nn.Linear) and "_mod" not in name

        models.renew_transformer()
        try:
            ao.quantize_(models.blocks, config, filter_fn=chosen)
            with _compiled_blocks(models):
                yield {f"torchao-{kind}": TorchaoPlain(models.ours, kind)}
        finally:
            models.renew_transformer()

    return enter


PHASES = (
    Phase(("stock", "plain"), _untouched),
    Phase(("fast",), _fast),
    Phase(("stock-compiled",), _compiled),
    Phase(("cache-dit",), _cache_dit),
    Phase(("fast-fp8", "fast-fp8-attention"), _fast_quantized("fp8")),
    Phase(("fast-int8", "fast-int8-attention"), _fast_quantized("int8")),
    Phase(("torchao-fp8",), _torchao("fp8")),
    Phase(("torchao-int8",), _torchao("int8")),
)
SUBJECTS = tuple(name for phase in PHASES for name in phase.subjects)


def random_transformer(device: str, dtype: torch.dtype) -> diffusers.QwenImageTransformer2DModel:
    """The 20 B transformer of Qwen-Image-Edit-2509 with random weights."""
    with _default_dtype(dtype), torch.device(device):
        return diffusers.QwenImageTransformer2DModel().eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_pipeline(device: str, dtype: torch.dtype) -> CachedQwenImageEditPipeline:
    """Qwen-Image-Edit-2509's anatomy with random weights, built on the device (61 GB in bf16, some 20 s).

    Speed does not depend on the values. The tokenizer is the pocket model's, which has the same 64-token system prefix.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    processor = folder.picture_processor(folder.POCKET_FOLDER)
    processor.image_processor.patch_size = 14
    small = Qwen2_5_VLConfig.from_pretrained(folder.POCKET_FOLDER / "text_encoder")
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **{key: getattr(small, key) for key in ids})
    with _default_dtype(dtype), torch.device(device):
        vae = diffusers.AutoencoderKLQwenImage()
        text_encoder = Qwen2_5_VLForConditionalGeneration(config)
    pipeline = CachedQwenImageEditPipeline(
        scheduler=lightning_scheduler(),
        vae=vae.eval(),
        text_encoder=text_encoder.to(dtype).eval(),
        tokenizer=processor.tokenizer,
        processor=processor,
        transformer=random_transformer(device, dtype),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

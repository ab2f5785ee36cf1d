"""Exact accelerations of the loaded modules: the same numbers, less work.

`apply(pipeline)` puts in what fits the loaded model and says, entry by entry, what it did and why; `remove(pipeline)`
takes everything out again, so the stock path stays reachable for comparison. Nothing here approximates: what a test
can tell apart from stock is rounding only.

What is put in stays true to the modules. Each public step of the pipeline begins with `look` at the component that it
runs (see `watch`). If that has changed, the part that was built from it is built again; if it is now something that the
fast path does not know (adapters, hooks, foreign layers, tiles), the stock module runs in the part's place until that is over, and the
report says why. So a result is the plain path's whatever was done to the pipeline in between.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from fast_path import attention, watch
from fast_path.reuse import TokenCache
from fast_path.text_encoder import FusedTextEncoder
from fast_path.transformer import FusedTransformer
from fast_path.unsupported import UnsupportedError
from fast_path.vae import SingleFrameVAE, single_frame_vae
from pipeline.images import EditError
from pipeline.sampling import is_lightning

__all__ = [
    "Applied", "FastPath", "FusedTextEncoder", "FusedTransformer", "SingleFrameVAE", "TokenCache", "apply", "remove",
    "single_frame_vae",
]  # fmt: skip

logger = logging.getLogger(__name__)

# Attributes of the pipeline: the component that each is built from.
PARTS = {"single_frame_vae": "vae", "fused_transformer": "transformer", "fused_text_encoder": "text_encoder"}


class Applied(NamedTuple):
    """One line of the report: what was tried, whether it is in use, and why (or why not)."""

    name: str
    applied: bool
    reason: str


class FastPath:
    """What a pipeline's fast path knows of its components, in use or not: the caches' keys come from here as well."""

    def __init__(self):
        self.wanted = False  # `enable_fast_path` was called: parts are built when their component is next used
        self.report: list[Applied] = []
        self.keep_weights = False  # somebody else holds the components: their weights stay where they are
        self.held = 0  # while above 0, the pipeline changes weights itself and tells the parts
        self.look_every_s = 0.0  # a stream of frames may ask for fewer looks
        self.components = {component: watch.Component() for component in PARTS.values()}
        self._built: dict[str, tuple] = {}  # component: the state that its part was built for, or refused in
        self._looked_monotonic: dict[str, float] = {}  # the last look at each component, in seconds
        self._away: dict[str, watch.Away] = {}

    def look(self, pipeline, component: str) -> tuple:
        """The state of a component, for a cache's key; its part is in use afterwards, or not, as that state allows.

        Within `look_every_s` of the last look only the component's identity and the place of its outermost weights count.
        """
        now = time.monotonic()
        recent = now - self._looked_monotonic.get(component, -math.inf) < self.look_every_s
        if recent and (state := self._known(pipeline, component)) is not None:
            return state
        self._looked_monotonic[component] = now
        module = getattr(pipeline, component, None)
        version = self.components[component].look(module)
        state = (version, self._autocast(pipeline._execution_device.type))
        if self.wanted and not self.held and self._built.get(component) != state:
            self._build(pipeline, component)
            self._built[component] = state
        return state

    def settled(self, pipeline, component: str, run: Callable[[tuple], Any]):
        """`run(state)`, where `state` is as from `look`. On a GPU the look comes behind the run, while the GPU computes what
        that asked for; in the rare case that something had changed, what it gave is dropped and it runs again.
        """
        state = self._known(pipeline, component) if pipeline._execution_device.type == "cuda" else None
        if state is None:
            return run(self.look(pipeline, component))
        try:
            result = run(state)
        except Exception:
            if (now := self.look(pipeline, component)) == state:
                raise
            return run(now)
        now = self.look(pipeline, component)
        return result if now == state else run(now)

    def _known(self, pipeline, component: str) -> tuple | None:
        """The state of the last look, if a part is in use for it and nothing says at a glance that it is over."""
        state, name = self._built.get(component), next(n for n, c in PARTS.items() if c == component)
        if state is None or self.held or getattr(pipeline, name) is None:
            return None
        unchanged = self.components[component].glance(getattr(pipeline, component, None))
        return state if unchanged and state[1] == self._autocast(pipeline._execution_device.type) else None

    @staticmethod
    def _autocast(device_type: str) -> torch.dtype | None:
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None

    def away(self, component: str, device: torch.device) -> watch.Away:
        """What of the component was moved to the CPU, from `device` if nothing was before."""
        return self._away.setdefault(component, watch.Away(device))

    def _build(self, pipeline, component: str) -> None:
        name = next(n for n, c in PARTS.items() if c == component)
        _drop(pipeline, name)
        try:
            if getattr(pipeline, component, None) is None:
                raise UnsupportedError(f"the pipeline has no {component}")
            part, reason = _MAKERS[name](pipeline)
            setattr(pipeline, name, part)
            entry = Applied(name, True, reason)
        except UnsupportedError as error:
            if component in self._away:
                self._away.pop(component).bring_back()
            entry = Applied(name, False, str(error))
        self.components[component].renew(getattr(pipeline, component, None))  # moves of our own are no change
        before = next((line for line in self.report if line.name == name), None)
        if before is None:
            self.report.append(entry)
        elif before != entry:
            self.report = [entry if line is before else line for line in self.report]
            if not entry.applied and before.reason != entry.reason:
                logger.warning("%s is out: %s. The stock %s runs.", name, entry.reason, component)

    def take_out(self, pipeline) -> None:
        """All stock modules as they were, and where they were; what is wanted comes back when it is next used."""
        for name, component in PARTS.items():
            _drop(pipeline, name)
            if component in self._away:
                self._away.pop(component).bring_back()
            self.components[component].forget()
        self._built.clear()


def apply(pipeline) -> list[Applied]:
    """Puts every acceleration in that fits `pipeline` and sets its attributes of the same names. Call after `.to`."""
    state = pipeline.fast_path
    state.take_out(pipeline)
    state.wanted, state.report = True, []
    for component in PARTS.values():
        state.look(pipeline, component)
    if pipeline._execution_device.type == "cuda":
        state.report.append(Applied("warm_up", True, _warm_up(pipeline)))
    return list(state.report)


def attention_kind(transformer, kind: str | None, device: torch.device) -> str:
    """"none" or "fp8", as asked for. Raises EditError for another kind and where 8-bit attention cannot run."""
    if kind in (None, "none"):
        return "none"
    if kind != "fp8":
        raise EditError(f'The quantisation of the attention is "{kind}". Allowed: none, fp8.')
    if reason := attention.refusal(device, transformer.config.attention_head_dim):
        raise EditError(f'The attention cannot be quantised to "fp8" here: {reason}. Allowed here: none.')
    return kind


def in_use(pipeline) -> bool:
    """Whether any part is in."""
    return any(getattr(pipeline, name) is not None for name in PARTS)


def forget_recordings(pipeline) -> None:
    """Frees the memory of CUDA graphs and token caches; a shape that comes again is recorded again."""
    for name in PARTS:
        _forget_recordings(getattr(pipeline, name))


def remove(pipeline) -> None:
    """Back to the stock modules, all of them where the pipeline is."""
    pipeline.fast_path.take_out(pipeline)
    pipeline.fast_path.wanted, pipeline.fast_path.report = False, []


def _drop(pipeline, name: str) -> None:
    _forget_recordings(getattr(pipeline, name))  # they hold the part that they belong to
    setattr(pipeline, name, None)


def _forget_recordings(part) -> None:
    if part is None:
        return
    part.graphs.clear()  # each part's own, so that parts may run at the same time on streams of their own
    for cache in getattr(part, "token_caches", ()):
        cache.clear()


def _vae(pipeline):
    vae = pipeline.vae
    if "_hf_hook" in vars(vae):
        raise UnsupportedError("the VAE is offloaded: its copy would stay behind")
    if reason := watch.foreign(vae):
        raise UnsupportedError(reason)
    for switch in ("tiling", "slicing"):
        if getattr(vae, f"use_{switch}", False):
            raise UnsupportedError(f"{switch} is on: the stock VAE works in parts")
    away = pipeline.fast_path.away("vae", vae.device)
    reason = "2-D convolutions, channels last; the temporal past is zeros"
    if away.device.type == "cuda":
        reason += "; bias, shortcut, norm and SiLU in one kernel, bytes to latents and back in a CUDA graph each"
    flat = single_frame_vae(vae, away.device)
    if not pipeline.fast_path.keep_weights and (freed := away.take([vae])):
        reason += f", {freed / 1e9:.2f} GB of 3-D convolutions moved to the CPU"
    return flat, reason


def _transformer(pipeline):
    eight_bit = pipeline.attention_quantize == "fp8"
    fused = FusedTransformer(pipeline.transformer, eight_bit)
    reason = "q, k and v in one product, small operations fused, the last block's unread outputs left out"
    reason += ", attention in 8 bits (e4m3), which is approximate" * eight_bit
    if fused.device.type == "cuda":
        reason += ", a CUDA graph a step"
    times = _lightning_times(pipeline)
    if times:
        fused.modulations.get(times[0], times)
    away = pipeline.fast_path.away("transformer", fused.device)
    if not pipeline.fast_path.keep_weights and (freed := away.take(fused.modulations.layers)):
        reason += f", {freed / 1e9:.1f} GB of modulation weights moved to the CPU"
    return fused, reason


def _text_encoder(pipeline):
    fused = FusedTextEncoder(pipeline.text_encoder)
    reason = "no questions to the GPU, windows of one size in one batch, q, k, v and gate, up in one product"
    if fused.device.type == "cuda":
        reason += ", two CUDA graphs"
    away = pipeline.fast_path.away("text_encoder", fused.device)
    if not pipeline.fast_path.keep_weights and (freed := away.take(fused.unread)):
        reason += f", {freed / 1e9:.2f} GB of vocabulary head and word table moved to the CPU"
    return fused, reason


_MAKERS: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "single_frame_vae": _vae, "fused_transformer": _transformer, "fused_text_encoder": _text_encoder,
}  # fmt: skip


@torch.no_grad()
def _warm_up(pipeline) -> str:
    """One edit at the live size: kernels are compiled, convolutions timed and graphs recorded before anyone waits."""
    began, side = time.perf_counter(), pipeline.default_size
    picture = np.zeros((side, side, 3), np.uint8)
    for _ in range(2):  # run and recorded, then replayed
        embeds, mask = pipeline.encode_prompt("keep everything as it is", picture)
        references = pipeline.encode_references(picture, area=side * side)
        noise, schedule = pipeline.initial_noise(side, side), pipeline.schedule(1, side, side)
        pipeline.decode(pipeline.denoise(noise, references, embeds, mask, schedule), side, side).cpu()
        pipeline.forget_results()
    return f"{side}x{side} compiled and recorded in {time.perf_counter() - began:.1f} s, so that the first frame does not wait"


def _lightning_times(pipeline) -> tuple[float, ...]:
    """What 1 to 8 steps will ask for, if the schedule is the same at all sizes, as Lightning's is."""
    if not is_lightning(pipeline.scheduler):
        return ()
    size = pipeline.default_size
    return tuple(dict.fromkeys(t for steps in range(1, 9) for t in pipeline.schedule(steps, size, size).times))

"""The flow-matching sampler as functions on tensors: schedule, step, guidance. flux/sampling.py is the model for it.

The numbers are those of diffusers' FlowMatchEulerDiscreteScheduler, whose config they read. Its object is not driven
through the loop, for two reasons: it keeps a step index between calls, which two interleaved pictures would share, and
its schedule of one step is [nan, 0] with the base model's settings (see `noise_levels`).
"""

import copy
import inspect
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift
from diffusers.utils.torch_utils import randn_tensor

from pipeline.images import EditError

# Sigmas 1 -> [1, 0], 2 -> [1, .75, 0], 4 -> [1, .9, .75, .5, 0] at any size (github.com/ModelTC/Qwen-Image-Lightning).
LIGHTNING_SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": math.log(3),
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": math.log(3),
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
MAX_CFG_DELTA = 2.0
CFG_MODES = ("full", "none", "batched", "self_negative", "onetime_negative")


@dataclass(frozen=True)
class Schedule:
    """sigmas float32 (steps + 1,), from 1 down to 0; timesteps float32 (steps,); made for one output size in pixels.

    `times` are the timesteps as the host knows them: asking the device would wait for it. `settings` are there if the
    scheduler steps by a rule of its own: what its `set_timesteps` gets, in every run. Its sigmas are then its own affair.
    """

    sigmas: torch.Tensor
    timesteps: torch.Tensor
    width: int
    height: int
    times: tuple[float, ...]
    settings: dict[str, Any] | None = None

    def prepare(self, scheduler) -> None:
        """Sets a scheduler that steps by a rule of its own to the beginning of a run."""
        assert self.settings is not None
        scheduler.set_timesteps(**self.settings)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)


def schedule_of(
    scheduler, steps: int, sigmas: tuple[float, ...] | None, width: int, height: int, tokens: int, device: torch.device
) -> Schedule:
    """The schedule of `steps` steps, or of `sigmas`, for an output of `tokens` tokens. Raises EditError.

    Of FlowMatchEulerDiscreteScheduler by `noise_levels`. Any other, and any subclass, makes its own as stock lets it.
    """
    levels = np.linspace(1.0, 1 / steps, steps) if sigmas is None else np.array(sigmas)
    if type(scheduler) is FlowMatchEulerDiscreteScheduler and not {"step", "set_timesteps"} & vars(scheduler).keys():
        noise, timesteps = noise_levels(scheduler, levels, tokens)
        return Schedule(noise.to(device), timesteps.to(device), width, height, tuple(timesteps.tolist()))
    settings: dict[str, Any] = {"device": device, "sigmas": levels, "mu": _mu(scheduler.config, tokens)}
    taken = inspect.signature(scheduler.set_timesteps).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        if "sigmas" not in taken:  # as stock: it asks for its levels, whatever the scheduler
            raise EditError(f"The scheduler is a {type(scheduler).__name__}, which takes no sigmas. Allowed: flow matching ones.")
        settings = {name: value for name, value in settings.items() if name in taken}
    own: Any = copy.deepcopy(scheduler)
    try:
        own.set_timesteps(**settings)
    except (TypeError, ValueError) as error:
        raise EditError(f"The scheduler, a {type(scheduler).__name__}, cannot make this schedule: {error}") from error
    timesteps = own.timesteps.float().cpu()
    noise = torch.as_tensor(own.sigmas, dtype=torch.float32)
    return Schedule(noise.to(device), own.timesteps.to(device), width, height, tuple(timesteps.tolist()), settings)


def _mu(config, tokens: int) -> float:
    return calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )


def noise_levels(scheduler, levels: np.ndarray, image_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`scheduler.set_timesteps(sigmas=levels)`, operation by operation, without its 0/0: (sigmas, timesteps).

    With `shift_terminal` the scheduler stretches the levels so that the last one lands there, by the factor
    (1 - last) / (1 - terminal). One step has one level, the first: 1. The factor is 0, the stretched level 0/0 = nan,
    and the picture is black: this, not the model, is why one step was called numerically unstable. A level of 1 is
    pure noise and has nowhere to be stretched to; it stays.
    """
    config = scheduler.config
    sigmas = levels.astype(np.float32)
    if config.use_dynamic_shifting:
        sigmas = scheduler.time_shift(_mu(config, image_tokens), 1.0, sigmas)
    else:
        sigmas = scheduler.shift * sigmas / (1 + (scheduler.shift - 1) * sigmas)
    if config.shift_terminal and sigmas[-1] < 1.0:
        sigmas = scheduler.stretch_shift_to_terminal(sigmas)
    if config.use_karras_sigmas:
        sigmas = scheduler._convert_to_karras(in_sigmas=sigmas, num_inference_steps=len(sigmas))
    elif config.use_exponential_sigmas:
        sigmas = scheduler._convert_to_exponential(in_sigmas=sigmas, num_inference_steps=len(sigmas))
    elif config.use_beta_sigmas:
        sigmas = scheduler._convert_to_beta(in_sigmas=sigmas, num_inference_steps=len(sigmas))
    sigmas = torch.from_numpy(np.asarray(sigmas)).to(torch.float32)
    if config.invert_sigmas:
        sigmas = 1.0 - sigmas
    if not sigmas.isfinite().all():
        raise EditError(f"The scheduler's settings give the sigmas {sigmas.tolist()}. They must be finite numbers.")
    end = torch.full((1,), 1.0 if config.invert_sigmas else 0.0)
    return torch.cat([sigmas, end]), sigmas * config.num_train_timesteps


def lightning_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler that Lightning LoRAs were distilled on."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(LIGHTNING_SCHEDULER)
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)  # a pair with what was not used, if that is asked for
    return scheduler


def is_lightning(scheduler) -> bool:
    """Whether `scheduler` gives Lightning's noise levels, also where a person set it."""
    decisive = ("use_dynamic_shifting", "base_shift", "max_shift", "shift_terminal", "time_shift_type")
    return all(scheduler.config.get(name) == LIGHTNING_SCHEDULER[name] for name in decisive)


def euler_step(
    latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor, stochastic: bool
) -> torch.Tensor:
    """One step from `sigma` to `next_sigma` (0-dim float32, on the device): in float32, back in the model's dtype."""
    sample = latents.float()
    if stochastic:
        noise = randn_tensor(sample.shape, device=sample.device, dtype=sample.dtype)
        return ((1.0 - next_sigma) * (sample - sigma * velocity) + next_sigma * noise).to(velocity.dtype)
    return (sample + (next_sigma - sigma) * velocity).to(velocity.dtype)


def true_cfg(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """Qwen's true CFG: the guided prediction, brought back to the length of the unguided one, token by token."""
    guided = negative + scale * (positive - negative)
    length = torch.norm(guided, dim=-1, keepdim=True)
    length = length.clamp_min(torch.finfo(length.dtype).tiny)  # a prediction of zeros stays zeros
    return guided * (torch.norm(positive, dim=-1, keepdim=True) / length)


def virtual_velocity(latents: torch.Tensor, clean: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """What a negative prompt would predict if its clean picture were `clean`: StreamDiffusion's residual CFG, no forward.

    The paper (arXiv 2312.12491, "Residual Classifier-Free Guidance") asks which virtual noise e' makes its model predict
    a known clean latent x0' from x_t = sqrt(a) x0 + sqrt(b) e, and solves that for e': (x_t - sqrt(a) x0') / sqrt(b).
    It stands where the noise under the negative prompt stood, times a magnitude d: d e' + s (e_positive - d e').

    In flow matching x_t = (1 - sigma) x0 + sigma e, and the model predicts v = e - x0, so x_t = x0 + sigma v: a
    prediction v says that the clean picture is x_t - sigma v. The virtual velocity that says x0' is
        v' = (x_t - x0') / sigma
    (the same from the virtual noise e' = (x_t - (1 - sigma) x0') / sigma, as v' = e' - x0'; at sigma 1 the latents are
    that noise and nothing is divided by 0). Guidance with v' is guidance of the predicted clean picture, away from x0':
        x_t - sigma (v' + s (v_positive - v')) = x0' + s (x0_positive - x0').
    d multiplies v', the model's output, as it multiplies e' in the paper. `true_cfg` gives the sum the length of
    v_positive, so that d = 0 is no guidance at all and d moves between that and the whole of it. d counts at the first
    step of onetime-negative too, whose negative is a real one: undamped there it came no nearer to full guidance. As
    sigma falls v' grows, so more steps want a smaller d (the embedded model at scale 2: 0.5 for 2 steps, 0.2 for 4).

    x0' is the input's latents (self-negative), or what a real negative prediction said at the first step
    (onetime-negative, see `predicted_clean`). Latents (B, N, C), sigma 0-dim and above 0; float32.
    """
    return (latents.float() - clean) / sigma


def predicted_clean(latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The clean latents that a prediction speaks of: x_t - sigma v, float32. `virtual_velocity` turns it back."""
    return latents.float() - sigma * velocity

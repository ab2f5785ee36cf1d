"""What people do to a pipeline between two calls: stock's methods, adapters, weights, hooks and objects, each as a function
`act(pipeline)` or `act(pipeline, folder)` whose effect `edit` shows."""

import copy

import numpy as np
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

LAYER = "transformer_blocks.0.attn.to_q"
FILES = {"directory": "lora", "weight_name": "lora.safetensors"}


def edit(pipe, **changes):
    """A picture (1, 3, 32, 32) in [0, 1]: one step of guidance, so that every component takes part."""
    settings = {"width": 32, "height": 32, "num_inference_steps": 1, "reference_area": 32 * 32, "true_cfg_scale": 1.0}
    settings |= {"generator": torch.Generator().manual_seed(0), "output_type": "pt"} | changes
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    return pipe(picture, "make it a pencil sketch", **settings).images


def lora_file(folder, scale=1.0):
    """A LoRA in the diffusers style on two layers, large enough to be seen."""
    rng = torch.Generator().manual_seed(1)
    state = {}
    for layer in (LAYER, "transformer_blocks.1.img_mlp.net.2"):
        width = {"transformer_blocks.1.img_mlp.net.2": WIDTHS["mlp"]}.get(layer, WIDTHS["dim"])
        state[f"transformer.{layer}.lora_A.weight"] = torch.randn(4, width, generator=rng)
        state[f"transformer.{layer}.lora_B.weight"] = torch.randn(WIDTHS["dim"], 4, generator=rng) * 0.05 * scale
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "lora.safetensors")
    return folder


WIDTHS = {}


def load_lora(pipe, folder):
    pipe.load_lora_weights(lora_file(folder), weight_name="lora.safetensors", adapter_name="a")


def after_lora(then):
    def act(pipe, folder):
        load_lora(pipe, folder)
        edit(pipe)
        then(pipe)

    return act


def fuse_and_unload(pipe, folder):
    load_lora(pipe, folder)
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()


def fuse_and_unload_in_the_component(pipe, folder):
    pipe.transformer.load_lora_adapter({k: v for k, v in _state(folder).items()}, prefix="transformer", adapter_name="a")
    pipe.transformer.fuse_lora()
    pipe.transformer.unload_lora()


def _state(folder):
    return load_file(lora_file(folder) / "lora.safetensors")


def load_adapter(pipe, folder):
    pipe.transformer.load_lora_adapter(_state(folder), prefix="transformer", adapter_name="a")


def after_adapter(then):
    def act(pipe, folder):
        load_adapter(pipe, folder)
        edit(pipe)
        then(pipe)

    return act


class HalvedAttention(QwenDoubleStreamAttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return tuple(0.5 * out for out in super().__call__(*args, **kwargs))


def other_transformer(pipe, folder=None):
    other = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        other.proj_out.weight.mul_(1.5)
    return other


def register(pipe, folder):
    pipe.register_modules(transformer=other_transformer(pipe))


def sequential(pipe, folder):
    apply_group_offloading(pipe.transformer, onload_device=torch.device("cpu"), offload_type="leaf_level")


def offload_to_disk(pipe, folder):
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    )


def add_adapter(pipe, folder):
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False), adapter_name="b")
    for name, p in pipe.transformer.named_parameters():
        if "lora_" in name:
            p.data = torch.linspace(-0.5, 0.5, p.numel()).view_as(p)


def in_place(pipe):
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].img_mod[1].weight.mul_(1.5)


def replaced_data(pipe):
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    layer.weight.data = layer.weight.data * 2


def new_parameter(pipe):
    layer = pipe.vae.decoder.conv_in
    layer.weight = nn.Parameter(layer.weight.detach() * 1.3)


def new_layer(pipe):
    pipe.transformer.img_in = nn.Linear(*reversed(pipe.transformer.img_in.weight.shape))
    nn.init.constant_(pipe.transformer.img_in.weight, 0.01)


def vae_in_place(pipe):
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(1.5)


def words_in_place(pipe):
    with torch.no_grad():
        pipe.text_encoder.model.language_model.layers[0].mlp.down_proj.weight.mul_(3)


def vision_in_place(pipe):
    with torch.no_grad():
        pipe.text_encoder.model.visual.patch_embed.proj.weight.mul_(3)


def text_adapter(pipe):
    pipe.text_encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    for name, p in pipe.text_encoder.named_parameters():
        if "lora_" in name:
            p.data = torch.linspace(-0.5, 0.5, p.numel()).view_as(p)


def forward_hook(pipe):
    pipe.transformer.transformer_blocks[1].attn.register_forward_hook(lambda m, a, out: tuple(0.5 * o for o in out))


def new_forward(pipe):
    block = pipe.text_encoder.model.language_model.layers[1]
    forward = block.forward
    block.forward = lambda *args, **kwargs: 0.9 * forward(*args, **kwargs)


def root_hook(pipe):
    pipe.text_encoder.register_forward_hook(
        lambda m, a, out: out.__setitem__("hidden_states", (*out.hidden_states[:-1], out.hidden_states[-1] + 1))
    )


def other_vae(pipe):
    vae = copy.deepcopy(pipe.vae)
    with torch.no_grad():
        vae.post_quant_conv.weight.mul_(1.2)
    pipe.vae = vae


def epsilon(pipe):
    pipe.transformer.transformer_blocks[0].attn.norm_q.eps = 0.5


def words_of_the_template(pipe):
    pipe.prompt_template_encode = pipe.prompt_template_encode.replace("shape", "outline")


CHANGES = [
    in_place, replaced_data, new_parameter, new_layer, vae_in_place, words_in_place, vision_in_place, text_adapter, forward_hook,
    new_forward, root_hook, other_vae, epsilon, words_of_the_template,
]  # fmt: skip

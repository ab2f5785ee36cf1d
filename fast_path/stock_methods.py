"""Stock's methods that move, adapt, replace or write modules: the fast path goes out first and comes back when it is used.

`watch` would notice most of what they do, but only afterwards: they would move or write what the fast path has moved or
packed into one buffer. And a LoRA that is fused leaves no trace that costs nothing to look for.
"""

import functools

import torch
from diffusers import QwenImageEditPlusPipeline

import fast_path
from pipeline.images import EditError
from quantization.layer import QuantizedLinear

OUT_FIRST = (
    "to", "register_modules", "save_pretrained", "push_to_hub",
    "enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload", "remove_all_hooks",
    "reset_device_map", "enable_attention_slicing", "disable_attention_slicing", "set_attention_slice",
    "enable_xformers_memory_efficient_attention", "disable_xformers_memory_efficient_attention",
    "set_use_memory_efficient_attention_xformers",
    "load_lora_weights", "unload_lora_weights", "fuse_lora", "unfuse_lora", "enable_lora", "disable_lora", "set_adapters",
    "delete_adapters", "set_lora_device", "enable_lora_hotswap",
)  # fmt: skip


class StockMethods(QwenImageEditPlusPipeline):
    """Stock's pipeline, whose methods find its modules as stock left them."""

    fast_path: "fast_path.FastPath"

    @property
    def components(self) -> dict:
        """As stock. The caller may run the components: their weights stay where they are from now on."""
        state = vars(self).get("fast_path")
        if state is not None and not state.held and not state.keep_weights:
            state.keep_weights = True
            state.take_out(self)
        return super().components

    def load_lora_weights(self, *args, **kwargs):
        """As stock. Raises EditError if the transformer is quantised: its layers take no adapter."""
        kind = next((m.kind for m in self.transformer.modules() if isinstance(m, QuantizedLinear)), None)
        if kind is not None:
            raise EditError(
                f"The transformer is quantised to {kind}, and a LoRA is fused before that: choose it when the model is "
                "loaded, or write the folder with it (python int8_linear.py MODEL OUT --lora NAME)."
            )
        return super().load_lora_weights(*args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As stock; the folder says stock's class, so that stock's `from_pretrained` reads it too."""
        for component in super().components.values():
            if isinstance(component, torch.nn.Module):
                _own_memory(component)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def maybe_free_model_hooks(self):
        with _Held(self):
            return super().maybe_free_model_hooks()

    def to_json_string(self) -> str:
        ours, stock = f'"_class_name": "{type(self).__name__}"', f'"_class_name": "{QwenImageEditPlusPipeline.__name__}"'
        return super().to_json_string().replace(ours, stock)

    def __getstate__(self) -> dict:
        """For copies and pickles: without the fast path, which holds recordings; a copy puts its own in when it is used."""
        state = self.fast_path
        state.take_out(self)
        fresh = fast_path.FastPath()
        fresh.wanted, fresh.keep_weights = state.wanted, state.keep_weights
        return vars(self) | {"fast_path": fresh}


class _Held:
    """While it lasts, the pipeline itself works on its modules: the fast path stays as it is."""

    def __init__(self, pipeline):
        self._state = pipeline.fast_path

    def __enter__(self):
        self._state.held += 1

    def __exit__(self, *exception):
        self._state.held -= 1


held = _Held


def _out_first(name: str):
    method = getattr(StockMethods, name)

    @functools.wraps(method)
    def out_first(self, *args, **kwargs):
        state = vars(self).get("fast_path")  # stock's own __init__ registers modules before there is one
        if state is None or state.held:
            return method(self, *args, **kwargs)
        state.take_out(self)
        with _Held(self):
            return method(self, *args, **kwargs)

    return out_first


for _name in OUT_FIRST:
    setattr(StockMethods, _name, _out_first(_name))


@torch.no_grad()
def _own_memory(module: torch.nn.Module) -> None:
    """Takes weights apart that share one memory as views: files hold whole tensors."""
    for parameter in module.parameters():
        plain = type(parameter) in (torch.nn.Parameter, torch.Tensor) and not parameter.is_meta
        if plain and parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

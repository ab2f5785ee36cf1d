"""Sees that a component changed: its weights, layers, hooks, adapters, processors, switches, device or dtype.

Stock's methods change a loaded model in some fifty ways, and a person's own code in more. None of them tells the fast
path or a cache, so both ask, before they answer with what they hold: `Component.look(module)` is a number that is
another one whenever a result of the module could be another one. It goes into every cache's key, and each part of the
fast path remembers the number that it was built for.

What is compared is flat and was collected once: which objects a module holds (children, parameters, buffers, hooks,
attributes of its own), each parameter's version counter and memory. All loops are C's. For the full-size transformer
(60 blocks, 2,297 modules, 1,933 parameters) a look takes 1 to 4 ms of a core, and asks the GPU nothing; to see it for
the first time, or changed, takes some 40 ms. A picture looks once at the transformer, once at the text encoder, twice at the VAE.
On a GPU it does so while the GPU computes (`FastPath.settled`). While frames wait for the
engine, it asks for looks twice a second only (`FastPath.look_every_s`).

Not seen: a weight changed through `.data` (torch counts no version there), and a number inside a list that a module
holds. After such a change call the pipeline's `clear_caches()`. Where hooks own the place of the weights (offloading,
casting), address and dtype come and go with every forward and say nothing: they are left out.
"""

import itertools
import operator
import types
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from quantization.layer import QuantizedLinear

_VERSIONS = itertools.count(1)  # one for all: a number never means two things
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_ENDS = 12  # weights at either end that `in_place` asks: of the transformer those outside of its blocks
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# A video codec's memory of the frame before, new at every call.
_TRANSIENT = {"_feat_map", "_conv_idx", "_conv_num", "_enc_feat_map", "_enc_conv_idx", "_enc_conv_num"}
# What a model's first call leaves on it: that memory, and an empty registry of hooks.
_LAZY = _TRANSIENT | {"_diffusers_hook"}
_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (nn.Module, type, torch.Tensor, types.FunctionType, types.MethodType, torch.dtype, torch.device)


_call: Any = operator.call  # its own type does not fit `map`'s


class Component:
    """One component of a pipeline: which object it is, and a number for the state in which it was last seen."""

    def __init__(self):
        self._module, self._watch = self, None  # no component is this object
        self.version = next(_VERSIONS)

    def look(self, module) -> int:
        """The number for `module` as it is now. Of what is no torch module only the identity counts."""
        if module is not self._module or (self._watch is not None and not self._watch.same()):
            self.renew(module)
            self.version = next(_VERSIONS)
        return self.version

    def glance(self, module) -> bool:
        """Whether `module` is the object that was seen last, its first and last weights where they were then: moved or
        swapped as a whole it is not. Microseconds; `look` has the last word.
        """
        return module is self._module and self._watch is not None and self._watch.in_place()

    def renew(self, module: Any) -> None:
        """Takes `module` as it is for unchanged: after moves of the fast path's own."""
        self._module = module
        self._watch = Watch(module) if isinstance(self._module, nn.Module) else None
        # A LoRA that was fused and unloaded leaves the very layers that were there before, with other numbers in them. What it
        # does leave is None here, in the place of the class's False.
        if getattr(type(module), "_hf_peft_config_loaded", None) is False and not module._hf_peft_config_loaded:
            module._hf_peft_config_loaded = False
            self._watch = Watch(module)

    def forget(self) -> None:
        """The next look gives a new number, whatever it sees."""
        self._module, self._watch = self, None


class Watch:
    """The state of a tree of modules at the time when this was made."""

    def __init__(self, root: nn.Module):
        modules = list(root.modules())
        tables = [t for m in modules for t in (m._modules, m._parameters, m._buffers, *(vars(m)[h] for h in _HOOKS))]
        attributes, lists, seen = [], [], set()
        for module in modules:
            own = vars(module)
            names = [n for n in own if n not in _OF_EVERY_MODULE and n not in _TRANSIENT]
            if not type(module).__module__.startswith("torch.nn."):
                attributes.append((own, (*names, *({"training"} & own.keys()))))
            for name in names:
                self._look_into(name, own[name], tables, lists, seen)
        self._all, self._types = modules, list(map(type, modules))
        self._empty = [t for t in tables if not t]
        self._tables = [t for t in tables if t]
        self._sized = [*self._tables, *lists, *(vars(m) for m in modules[1:])]
        self._root = vars(root)
        self._of_root = self._read_root()
        self._sizes = list(map(len, self._sized))
        self._members = list(itertools.chain.from_iterable(map(dict.values, self._tables)))
        self._own = [own for own, _ in attributes]
        self._getters: list[Any] = [operator.itemgetter(*names, "_modules", "_buffers") for _, names in attributes]  # two names: a tuple
        self._values = list(itertools.chain.from_iterable(map(_call, self._getters, self._own)))
        self._parameters = [p for p in self._members if isinstance(p, torch.Tensor) and not p.is_inference()]
        if placed_by_hooks(modules):
            # Offloading one weight at a time puts new parameters in at every call: those that lie nowhere say so.
            if any(p.is_meta for p in self._parameters):
                self._tables = [t for t in self._tables if not any(isinstance(v, torch.Tensor) for v in t.values())]
                self._members = list(itertools.chain.from_iterable(map(dict.values, self._tables)))
                self._parameters = []
            self._plain = []
        else:
            self._plain = [p for p in self._parameters if type(p) in (nn.Parameter, torch.Tensor)]
        # While a weak reference lives, an address that is the same is of the same memory or of memory that has expired.
        storages = {s._cdata: s for s in (p.untyped_storage() for p in self._plain)}
        self._references = [StorageWeakRef(s) for s in storages.values()]
        self._storages = [r.cdata for r in self._references]
        self._numbers = self._read()

    @staticmethod
    def _look_into(name: str, value, tables: list, lists: list, seen: set) -> None:
        """Objects that a module holds and that methods change in place: settings, attention processors, adapters' scales."""
        if id(value) in seen or isinstance(value, _PLAIN):
            return
        seen.add(id(value))
        if name == "_diffusers_hook":
            tables.append(value.hooks)
        elif isinstance(value, dict):
            tables.append(value)
        elif isinstance(value, list):
            lists.append(value)
        elif name != "_hf_hook" and isinstance(getattr(value, "__dict__", None), dict):
            tables.append(vars(value))

    def _read_root(self) -> tuple:
        return self._root.keys() - _LAZY, list(getattr(self._root.get("_diffusers_hook"), "hooks", None) or ())

    def _read(self) -> tuple[list, list]:
        return [p._version for p in self._parameters], [p.data_ptr() for p in self._plain]

    def in_place(self) -> bool:
        """Whether the outermost weights are in the same memory."""
        ends = [*self._plain[:_ENDS], *self._plain[-_ENDS:]]
        addresses = self._numbers[1]
        return [p.data_ptr() for p in ends] == [*addresses[:_ENDS], *addresses[-_ENDS:]]

    def same(self) -> bool:
        """Whether nothing that is compared has changed."""
        try:
            values = itertools.chain.from_iterable(map(_call, self._getters, self._own))
            return (
                not any(self._empty)
                and list(map(len, self._sized)) == self._sizes
                and list(map(type, self._all)) == self._types
                and self._read_root() == self._of_root
                and all(map(operator.is_, itertools.chain.from_iterable(map(dict.values, self._tables)), self._members))
                and all(map(operator.is_, values, self._values))
                and self._read() == self._numbers
                and not any(map(torch.UntypedStorage._expired, self._storages))
            )
        except KeyError:  # an attribute is gone
            return False


def placed_by_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether hooks of accelerate or diffusers decide where the weights lie and what dtype they have."""
    return any("_hf_hook" in vars(m) or getattr(vars(m).get("_diffusers_hook"), "hooks", None) for m in modules)


def moved_by_hooks(module: nn.Module) -> bool:
    """Whether a hook of accelerate or diffusers decides where this module's weights lie. (One that casts them does not.)"""
    hooks = getattr(vars(module).get("_diffusers_hook"), "hooks", None) or ()
    return "_hf_hook" in vars(module) or any("offload" in name for name in hooks)


def acts_as_a_whole(text_encoder: Any) -> bool:
    """Whether something waits for a call of the whole model, which runs that go straight to its two towers would miss."""
    return any(
        "_hf_hook" in vars(m)
        or getattr(vars(m).get("_diffusers_hook"), "hooks", None)
        or any(map(_acts, (*m._forward_hooks.values(), *m._forward_pre_hooks.values())))
        or _replaced_forward(m)
        or vars(m).get("_compiled_call_impl") is not None
        for m in (text_encoder, text_encoder.model)
    )


def _acts(hook) -> bool:
    """Whether a hook is somebody's own. transformers leaves one on every block that has once run with its outputs asked for;
    it only writes down what passes, and only within such a call.
    """
    return hook is not come_along and getattr(hook, "__module__", "") != "transformers.utils.output_capturing"


def _replaced_forward(module: nn.Module) -> bool:
    """Not so where a hook was taken away again: what it left is the class's own."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def foreign(root: nn.Module) -> str | None:
    """Why `root` is more than its class's arithmetic on plain weights, or None.

    The parts of the fast path go around modules' `forward`: whatever was put there to act would not.
    """
    device_type = next((p.device.type for p in root.parameters()), "cpu")
    if torch.is_autocast_enabled("cpu" if device_type == "meta" else device_type):
        return "autocast is on: its layers choose their own dtypes"
    for name, module in root.named_modules():
        own, where = vars(module), f" of {name}" if name else ""
        if "_hf_hook" in own:
            return "it is offloaded: its weights come and go"
        if hooks := getattr(own.get("_diffusers_hook"), "hooks", None):
            return f"diffusers' hooks are on it ({', '.join(hooks)})"
        if hasattr(module, "base_layer"):
            return f"the adapter{where} is not fused into the weights (fuse it and unload it, or choose it at the start)"
        if any(_acts(hook) for kind in _HOOKS for hook in own[kind].values()):
            return f"a hook{where} acts on every call"
        if _replaced_forward(module):
            return f"the forward{where or ' of the model'} has been replaced, perhaps to offload it"
        if own.get("_compiled_call_impl") is not None:
            return f"torch.compile is on it{where}"
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            if type(module).__module__.startswith("torch.nn."):
                continue  # NonDynamicallyQuantizableLinear and the like compute what Linear does
            return f"layers of the kind {type(module).__name__} are not known here"
        if not isinstance(module, QuantizedLinear) and (reason := _foreign_weight(module, where)):
            return reason
        if module.training and isinstance(module, nn.Dropout) and module.p > 0:
            return f"dropout{where} is on: call eval()"
    return None


def _foreign_weight(module: nn.Module, where: str) -> str | None:
    for parameter in module._parameters.values():
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter or parameter.dtype not in _PLAIN_DTYPES or parameter.is_meta:
            lies = ", which lies nowhere" if parameter.is_meta else ""
            return f"a weight{where} is no plain one: {type(parameter).__name__}, {parameter.dtype}{lies}"
    return None


def dtype_of(module: nn.Module) -> torch.dtype:
    """What the module computes in, as stock's `dtype` has it: with casting hooks not what the weights are stored in."""
    for layer in module.modules():  # as a rule the first layer with weights tells; stock's `dtype` walks through all of them
        weight = next((p for p in layer._parameters.values() if p is not None), None)
        # (Stock's cache context leaves a registry without hooks on the model: it casts nothing.)
        if getattr(vars(layer).get("_diffusers_hook"), "hooks", None) or (weight is not None and weight.dtype not in _PLAIN_DTYPES):
            return get_parameter_dtype(module)
        if weight is not None:
            return weight.dtype
    return torch.get_default_dtype()


class Away:
    """Weights that the fast path moved to the CPU, and that come back when other code runs them or a part is taken out."""

    def __init__(self, device: torch.device):
        self.device = device
        self._handles = {}  # module: its hook

    def take(self, roots: Iterable[nn.Module]) -> int:
        """Moves modules' weights to the CPU; returns the bytes freed on the GPU. Weights of two modules count once."""
        freed = {}
        for module in (m for root in roots for m in root.modules() if any(p is not None for p in m._parameters.values())):
            for p in module._parameters.values():
                if p is not None and p.is_cuda:
                    freed[p.data_ptr()] = p.nbytes
            module._apply(lambda t: t.to("cpu"), recurse=False)
            if module not in self._handles:
                self._handles[module] = module.register_forward_pre_hook(come_along)
        return sum(freed.values())

    def bring_back(self) -> None:
        """All to where they were, but those whose place belongs to somebody's hooks by now."""
        for module, handle in self._handles.items():
            handle.remove()
            if not moved_by_hooks(module):
                module._apply(lambda t: t if t.is_meta else t.to(self.device), recurse=False)
        self._handles = {}


def come_along(module: nn.Module, args: tuple) -> None:
    """Brings a module to what it is called with: other code that runs a stock component finds it whole."""
    given = next((a for a in args if isinstance(a, torch.Tensor)), None)
    if given is None or moved_by_hooks(module):
        return
    if any(p is not None and p.device != given.device for p in module._parameters.values()):
        module._apply(lambda t: t.to(given.device), recurse=False)

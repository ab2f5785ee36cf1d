"""What both programs do before they serve: read flags, choose the model that fits the machine, load it.

`webui_realtime.py` and `server.py` take the same flags for what they share, and load in a thread that tells an
`EngineHolder` how far it has come: a 60 GB model takes minutes, and who asks meanwhile should get an answer.
"""

import argparse
import ipaddress
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.images import EditError
from qwen_realtime import EngineConfig, RealtimeEngine
from serving.access import LOOPBACK_NAMES, Guard
from serving.holder import EngineHolder
from serving.proxy import ROOT_PATH, TRUSTED
from serving.version import VERSION

log = logging.getLogger(__name__)

REAL_MODEL = "Qwen/Qwen-Image-Edit-2509"
REAL_LORA = "lightning-4"
REAL_MEMORY_GB = 60  # bf16 weights 57.8 GB and the work of a 512x512 edit
MIN_KEY_CHARS = 8
KEY_VARIABLE = "IMAGE_EDITOR_API_KEY"


# ---------------------------------------------------------------------------------------------------------------- flags


def user_and_password(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise argparse.ArgumentTypeError("expected USER:PASSWORD")
    return user, password


def port_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: expected 1 to 65535")
    return int(text)


def key_text(text: str) -> str:
    if len(text) < MIN_KEY_CHARS or not text.isascii() or not text.isprintable() or " " in text:
        raise argparse.ArgumentTypeError(f"expected at least {MIN_KEY_CHARS} letters, digits or signs, no spaces")
    return text


def site(text: str) -> str:
    if text != "*" and not re.fullmatch(r"https?://[^/\s]+", text):
        raise argparse.ArgumentTypeError(f'{text!r} is no site: expected one like https://example.org, or "*"')
    return text


def root_path(text: str) -> str:
    if not ROOT_PATH.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no place: expected one like /edit or https://example.org/edit")
    return text.rstrip("/")


def addresses(text: str) -> str:
    for part in text.split(","):
        try:
            if part.strip() != "*":
                ipaddress.ip_network(part.strip())
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}: expected addresses or networks, with commas between them") from None
    return text


def sessions(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1024):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of sessions: expected 1 to 1024")
    return int(text)


def add_flags(parser: argparse.ArgumentParser, *, host: str, port: int) -> None:
    """The flags that both programs have; `host` and `port` are the defaults."""
    add = parser.add_argument
    add("--version", action="version", version=VERSION)
    add("--model", default="auto", help='"auto" (default), "pocket", a Hugging Face id or a folder')
    add("--lora", help='"none", "lightning-4", "lightning-8", a .safetensors file or a Hugging Face id')
    add("--lora-weight", type=float, default=1.0, help="how strongly the LoRA is fused in (default 1)")
    kinds = ("none", "int8", "fp8")
    add("--quantize", choices=kinds, default="none", help="8-bit linear layers in the transformer")
    add("--attention-quantize", choices=("none", "fp8"), default="none", help="8-bit attention in the transformer (Hopper)")
    add("--text-encoder-quantize", choices=kinds, default="none", help="and in the text encoder")
    add("--device", default="auto", help='"auto" (default), "cpu", "cuda" or "cuda:1"')
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    most = EngineConfig.max_sessions
    add("--max-sessions", type=sessions, default=most, help=f"live views and uploads at one time (default {most})")
    add("--host", default=host, help=f"address to listen on (default {host}; 0.0.0.0 for the network)")
    add("--port", type=port_number, default=port, help=f"default {port}")
    add("--auth", type=user_and_password, metavar="USER:PASSWORD", help="ask for this login")
    key_help = f"ask for this key; better given in the variable {KEY_VARIABLE}, which other users do not see"
    add("--api-key", type=key_text, metavar="KEY", default=os.environ.get(KEY_VARIABLE) or None, help=key_help)
    cors_help = 'let pages of this site use the routes and the socket, or "*" for any; may be repeated'
    add("--cors", type=site, metavar="SITE", action="append", default=[], help=cors_help)
    root_help = "behind a proxy: the path, or the whole address, under which it offers this program, like /edit"
    add("--root-path", type=root_path, metavar="PATH", default="", help=root_help)
    # The variable that uvicorn and gunicorn read too. A Space can be reached through its platform's proxy alone.
    trusted = os.environ.get("FORWARDED_ALLOW_IPS") or ("*" if os.environ.get("SPACE_ID") else TRUSTED)
    proxy_help = f'addresses of proxies whose X-Forwarded headers count, or "*" for any (default {trusted})'
    add("--forwarded-allow-ips", type=addresses, metavar="ADDRESSES", default=trusted, help=proxy_help)
    name_help = "a name under which a proxy on this machine passes requests on; may be repeated"
    add("--allow-host", metavar="NAME", action="append", default=[], help=name_help)
    add("--ssl-keyfile", metavar="KEY.pem", help="TLS key: a camera needs HTTPS away from localhost")
    add("--ssl-certfile", metavar="CERT.pem", help="TLS certificate")


def check_flags(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with usage when flags contradict each other."""
    if (options.ssl_keyfile is None) != (options.ssl_certfile is None):
        parser.error("--ssl-keyfile and --ssl-certfile need each other")
    for file in (options.ssl_keyfile, options.ssl_certfile):
        if file is not None and not Path(file).is_file():
            parser.error(f"{file} is not a file")


def create_guard(options: argparse.Namespace, *, local_pages: bool) -> Guard:
    """Who may come in. Without a lock a program of this machine answers only to this machine's names: a page of any
    site could make its own name point here (DNS rebinding) and would then be of the same origin. In a Space the
    platform's proxy is the only way in, under names that it chooses. `local_pages`: whether pages that this machine serves
    at other ports may use it where nothing is locked.
    """
    guard = Guard(options.auth, options.api_key, origins=options.cors)
    if guard.locked or not is_loopback(options.host) or os.environ.get("SPACE_ID"):
        return guard
    public = urlsplit(options.root_path).hostname
    hosts = (*LOOPBACK_NAMES, *options.allow_host, *([public] if public else []))
    return Guard(origins=options.cors, hosts=hosts, local_pages=local_pages)


def is_loopback(host: str) -> bool:
    return host == "::1" or host in LOOPBACK_NAMES


def warn_if_open(host: str, *, locked: bool, share: bool = False) -> None:
    """Says so when others can reach the program and nothing is asked of them."""
    if not locked and (share or not is_loopback(host)):
        where = "knows the public link" if share else f"can reach {host}"
        log.warning("all who %s may use this: --auth USER:PASSWORD or --api-key KEY locks it", where)


# ------------------------------------------------------------------------------------------------------------- the choice


@dataclass(frozen=True)
class ModelChoice:
    model: str  # as load_pipeline takes it: "pocket", a hub id or a folder
    lora: str | None
    reason: str  # for the log and the page
    how_to_get_other: str


def choose_model(
    requested: str = "auto",
    lora: str | None = None,
    *,
    gpu_memory_gb: float | None,
    at_hand: bool,
    downloadable: bool,
) -> ModelChoice:
    """What to load, and why. `gpu_memory_gb` is what is free on the GPU, None without one; `at_hand` and
    `downloadable` say where the real model's weights could come from; `lora` None means that none was asked for.
    """
    own_lora = None if lora in (None, "none") else lora
    to_real = f"For the real model ({REAL_MEMORY_GB} GB of GPU memory) start with --model {REAL_MODEL}"
    to_pocket = "For the small model that runs anywhere start with --model pocket"
    if requested == "pocket":
        return ModelChoice("pocket", own_lora, "The pocket model was asked for with --model pocket.", to_real)
    if requested != "auto":
        # The base models need dozens of steps and CFG; with their Lightning LoRA the 1 to 8 offered here are enough.
        fast = re.fullmatch(r"Qwen/Qwen-Image-Edit-(2509|2511)", requested) and lora is None
        chosen = REAL_LORA if fast else own_lora
        why = f"{requested} was asked for with --model."
        return ModelChoice(requested, chosen, why + (f" With its {chosen} LoRA." if fast else ""), to_pocket)
    if gpu_memory_gb is None:
        why = "no CUDA GPU was found"
    elif gpu_memory_gb < REAL_MEMORY_GB:
        why = f"the GPU has {gpu_memory_gb:.0f} GB free and {REAL_MODEL} needs {REAL_MEMORY_GB}"
    elif not (at_hand or downloadable):
        why = f"the weights of {REAL_MODEL} are neither in the Hugging Face cache nor can they be downloaded"
    else:
        where = "its weights are in the Hugging Face cache" if at_hand else "its weights can be downloaded"
        reason = f"The GPU has {gpu_memory_gb:.0f} GB free and {where}, so the real model runs."
        return ModelChoice(REAL_MODEL, REAL_LORA if lora is None else own_lora, reason, to_pocket)
    reason = f"The pocket model runs because {why}. It is small and knows about twenty kinds of edit."
    return ModelChoice("pocket", own_lora, reason, to_real)


def probe_gpu_gb(device: str) -> float | None:
    """Free memory of the CUDA GPU that `device` ("auto", "cuda", "cuda:1", "cpu") means, None when it means none."""
    import torch

    if (device != "auto" and not device.startswith("cuda")) or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(torch.device("cuda" if device == "auto" else device))
    return free / 1e9


def probe_hub(model: str) -> tuple[bool, bool]:
    """(in the local cache as a whole, downloadable) for a model of the Hugging Face hub."""
    import json

    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    def cached(name: str) -> str | None:
        path = try_to_load_from_cache(model, name)
        return path if isinstance(path, str) else None

    indices = ("transformer/diffusion_pytorch_model.safetensors.index.json",
               "text_encoder/model.safetensors.index.json")  # fmt: skip
    at_hand = all(cached(name) for name in ("model_index.json", *indices))
    for name in indices if at_hand else ():
        index = cached(name)
        assert index is not None
        shards = set(json.loads(Path(index).read_text())["weight_map"].values())
        at_hand = at_hand and all(cached(f"{name.split('/')[0]}/{shard}") for shard in shards)
    if at_hand or constants.HF_HUB_OFFLINE:
        return at_hand, False
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if shutil.disk_usage(existing).free < REAL_MEMORY_GB * 1e9:
        return False, False
    try:
        HfApi().model_info(model, timeout=5)
    except Exception as error:  # whatever keeps the hub from answering, the answer is no
        log.info("%s cannot be downloaded: %s", model, error)
        return False, False
    return False, True


def start_engine(pipeline, config: EngineConfig) -> RealtimeEngine:
    """The engine of this pipeline, its thread running. Raises what `RealtimeEngine` does, which `load_engine` reports."""
    return RealtimeEngine(pipeline, config).start()


def load_engine(holder: EngineHolder, options: argparse.Namespace, start: Callable = start_engine) -> None:
    """Chooses, loads, warms up; tells the holder. Runs in its own thread: nothing here may raise. `start` makes the
    engine of the loaded pipeline and an EngineConfig.
    """
    try:
        holder.progress("Looking at this machine", 0.01)
        automatic = options.model == "auto"
        gpu_gb = probe_gpu_gb(options.device) if automatic else None
        at_hand, downloadable = probe_hub(REAL_MODEL) if gpu_gb else (False, False)
        choice = choose_model(
            options.model, options.lora, gpu_memory_gb=gpu_gb, at_hand=at_hand, downloadable=downloadable
        )
        try:
            _load_choice(holder, options, choice, start)
        except Exception as error:
            if not automatic or choice.model == "pocket":
                raise
            log.exception("%s could not be loaded", choice.model)
            why = f"{choice.model} could not be loaded ({_first_line(error)}), so the pocket model runs instead."
            _load_choice(holder, options, ModelChoice("pocket", None, why, choice.how_to_get_other), start)
    except Exception as error:
        why = _first_line(error)
        log.error("the model could not be loaded: %s", why, exc_info=not isinstance(error, EditError))
        holder.fail(why)


def _load_choice(holder: EngineHolder, options: argparse.Namespace, choice: ModelChoice, start: Callable) -> None:
    holder.choice = asdict(choice)
    log.info("model: %s, LoRA: %s. %s %s", choice.model, choice.lora, choice.reason, choice.how_to_get_other)
    started = time.monotonic()
    holder.progress("Importing PyTorch and diffusers", 0.05)
    import torch

    from cached_pipeline import load_pipeline

    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(
        choice.model,
        lora=choice.lora,
        lora_weight=options.lora_weight,
        quantize=None if options.quantize == "none" else options.quantize,
        attention_quantize=None if options.attention_quantize == "none" else options.attention_quantize,
        text_encoder_quantize=None if options.text_encoder_quantize == "none" else options.text_encoder_quantize,
        device=device,
        dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
        progress=lambda text, fraction: holder.progress(text, 0.1 + 0.8 * fraction),
    )
    engine = start(pipeline, EngineConfig(max_sessions=options.max_sessions))
    holder.progress("Editing a first picture", 0.95, warming=True)
    engine.warm_up()
    holder.ready(engine)
    log.info("ready after %.1f s: %s", time.monotonic() - started, engine.description)


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    return text if isinstance(error, EditError) else f"{type(error).__name__}: {text}"

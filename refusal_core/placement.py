"""Where a model's weights are: on one device, or spread over the GPUs, the memory and the disk.

    "auto"    the one GPU that holds them all; else all GPUs, what is left in memory, and at last on the disk
    mapping   module name → device or "disk"; a module without an entry is where the one around it is, or on the CPU
    4 bits    the linear layers as NF4 (Dettmers et al. 2023, QLoRA), everything else as it is

Weights on the disk, and those in memory beside GPUs, are brought to where the model computes only while their module
does (accelerate). They are read from the checkpoint itself; what a family puts together on loading, as its experts, is
kept in a temporary folder.
"""

import argparse
import contextlib
import gc
import importlib.util
import logging
import math
import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import transformers
from accelerate.utils import align_module_device
from safetensors import SafetensorError
from torch import Tensor

from refusal_core.checkpoints import ModelError, first_line, gigabytes, remove_left_behind

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ROOM_TO_WORK = 1.15
"""The memory that loading and a forward step take, over that of the weights."""

FOUR_BIT = 0.5 + 4 / 64
"""Bytes of a weight as NF4: its four bits, and a scale in float32 for every 64 of them."""

FOLDER = f"refusal-offload-{socket.gethostname()}-"
"""What the names of temporary folders begin with; the number of the process that uses one comes next."""

Device = str | torch.device | Mapping[str, str | torch.device]
"""A device, "auto", or module name → device or "disk"."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a model is to be, and how its weights are kept."""

    device: torch.device | Literal["auto"] | Mapping[str, torch.device | str]
    dtype: torch.dtype
    four_bit: bool = False


def asked_for(device: Device | None = None, dtype: torch.dtype | None = None, four_bit: bool = False) -> Placement:
    """The placement; `device` is by default the best there is, and `dtype` what goes with it.

    Raises ModelError for a device that is not here, and for 4 bits where there is no CUDA or no bitsandbytes.
    """
    if isinstance(device, Mapping):
        where = {name: "disk" if there == "disk" else _device(there) for name, there in device.items()}
    else:
        where = "auto" if device == "auto" else _best_device() if device is None else _device(device)
    named = where.values() if isinstance(where, dict) else [_best_device() if where == "auto" else where]
    kinds = {there if isinstance(there, str) else there.type for there in named}
    if four_bit:
        _check_four_bit(kinds)
    main = next((kind for kind in ("cuda", "mps") if kind in kinds), "cpu")
    default = {"cuda": torch.bfloat16, "mps": torch.float16}.get(main, torch.float32)
    return Placement(where, dtype or default, four_bit)


def plan(name: str, outline: "transformers.PreTrainedModel", placement: Placement) -> dict[str, Any]:
    """What `from_pretrained` is to be told, for the model of `outline`; raises ModelError if that does not fit."""
    told: dict[str, Any] = {}
    if placement.four_bit:
        told["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=placement.dtype
        )
    sizes = _sizes(outline, placement)
    if placement.device == "auto":
        told |= spread(sum(sizes.values()), {d: _free(d) for d in _devices() if d != "cpu" or not placement.four_bit})
        if "max_memory" in told:
            # bitsandbytes packs on the GPU: nothing of it can stay in the checkpoint.
            is_joined = {w: placement.four_bit or outline.get_parameter(w).ndim == 3 for w in sizes}
            joined = sum(size for weight, size in sizes.items() if is_joined[weight])
            disk = 0 if placement.four_bit else shutil.disk_usage(tempfile.gettempdir()).free
            check_spread(name, sizes, joined, told["max_memory"], disk)
        return told
    if isinstance(placement.device, torch.device):
        device_map: Mapping[str, int | str] = {"": _key(placement.device)}
    else:
        device_map = _completed(name, outline, placement.device)
    needed = Counter[int | str]()
    for weight, size in sizes.items():
        needed[device_map[_entry(weight, device_map)]] += size
    for device in needed.keys() - {"disk"}:
        check_memory(name, needed[device], device, _free(device))
    return told | {"device_map": device_map}


def spread(n_bytes: int, free: Mapping[int | str, int]) -> dict[str, Any]:
    """The device map of "auto" for weights of `n_bytes`, by the bytes that are `free` on each device."""
    room = {device: int(n / ROOM_TO_WORK) for device, n in free.items()}
    best = max((d for d in room if d != "cpu" or len(room) == 1), key=lambda device: room[device])
    if n_bytes <= room[best]:
        return {"device_map": {"": best}}
    return {"device_map": "auto", "max_memory": room}


def check_spread(name: str, sizes: Mapping[str, int], joined: int, room: Mapping[int | str, int], disk: int) -> None:
    """Raises ModelError if the weights do not fit into the `room` on the devices and the rest of them onto the `disk`.

    Only those of the rest that are not in the checkpoint as they are need new space there: at most `joined` bytes. The
    largest weight has to be in memory for the time of its use.
    """
    rest = sum(sizes.values()) - sum(room.values())
    largest = max(sizes, key=lambda weight: sizes[weight])
    if min(rest, joined) > disk:
        raise ModelError(
            f"{name} needs about {gigabytes(sum(sizes.values()))}, and there is room for {gigabytes(sum(room.values()))} of "
            f"it in memory and for {gigabytes(disk)} on the disk: make room, or take a smaller model."
        )
    if sizes[largest] > max(room.values()):
        raise ModelError(
            f"{name} has in {largest} alone {gigabytes(sizes[largest])}, and there is room for "
            f"{gigabytes(max(room.values()))} in memory: close other programs, or take a smaller model."
        )


def check_memory(name: str, n_bytes: int, device: int | str, free: int) -> None:
    """Raises ModelError if weights of `n_bytes` do not fit into the bytes that are `free` on `device`."""
    needed = int(ROOM_TO_WORK * n_bytes)
    if needed > free:
        kind = "GPU memory" if isinstance(device, int) else "memory"
        raise ModelError(
            f"{name} needs about {gigabytes(needed)} of {kind} and {gigabytes(free)} are free: close other programs, spread "
            'it over GPUs, memory and disk with the device "auto", keep it in 4 bits on a GPU, or take a smaller model.'
        )


def check_gradients(name: str, model: "transformers.PreTrainedModel", device: torch.device) -> None:
    """Raises ModelError if the weights that are brought to `device` only for their use do not fit there all at once.

    A gradient needs each of them until the backward step.
    """
    away = sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type == "meta")
    if away > (free := _free(_key(device))):
        raise ModelError(
            f"Gradients through {name} need all of its weights at once, {gigabytes(away)} more than are there now, and "
            f"{gigabytes(free)} are free: patch its parts instead, or take a smaller model."
        )


@contextlib.contextmanager
def offload_folder(told: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """`told`, with a folder for the weights that `from_pretrained` may have to write, if there are any on the disk.

    It is there as long as the block; those of processes that were killed are removed.
    """
    device_map = told["device_map"]
    if device_map != "auto" and "disk" not in device_map.values():
        yield {**told}
        return
    remove_left_behind(Path(tempfile.gettempdir()), rf"{FOLDER}(\d+)-\w+")
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # that weights are on the disk is meant
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER}{os.getpid()}-") as folder:
        yield {**told, "offload_folder": folder}


# -- of a model that is loaded ---------------------------------------------------------------------------------------


def n_weights(model: "transformers.PreTrainedModel") -> dict[str, int]:
    """How many weights each parameter has, packed or on the disk, without those that are another one."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: _shape(p).numel() for name, p in named if name not in model.all_tied_weights_keys}


def runs_on(module: torch.nn.Module) -> torch.device:
    """Where a module with a weight computes, wherever that weight is meanwhile."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return _weight_of(module).device if device is None else _device(device)


def where(model: "transformers.PreTrainedModel") -> str:
    """All places of a model's weights, such as "cuda:0, cuda:1 and disk"; for one device alone its kind."""
    placed = set(getattr(model, "hf_device_map", {}).values())
    if len(placed) < 2 and "disk" not in placed:
        return model.device.type
    named = [f"cuda:{d}" for d in sorted(d for d in placed if isinstance(d, int))]
    named += [str(d) for d in ("mps", "cpu", "disk") if d in placed]
    return " and ".join(filter(None, (", ".join(named[:-1]), named[-1])))


def weight(module: torch.nn.Module) -> Tensor:
    """A module's weight, read from the disk if it is there."""
    with align_module_device(module):
        return _weight_of(module)


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Around what may read weights from the disk; raises ModelError if their files are gone or broken meanwhile."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"Weights of {name} are read from its files whenever they are used, and cannot be any more "
            f"({first_line(error)}): put the checkpoint back, or load the model anew."
        ) from error


def _weight_of(module: torch.nn.Module) -> Tensor:
    weight = module.weight
    assert torch.is_tensor(weight)
    return weight


def _shape(p: torch.nn.Parameter) -> torch.Size:
    """The shape of a weight; bitsandbytes packs several into one number, and keeps the shape beside them."""
    packed = getattr(p, "quant_state", None)
    return p.shape if packed is None else packed.shape


# -- sizes and devices -----------------------------------------------------------------------------------------------


def _sizes(outline: "transformers.PreTrainedModel", placement: Placement) -> dict[str, int]:
    """The bytes of each weight."""
    head = outline.get_output_embeddings()
    linear = {
        f"{name}.weight"
        for name, module in outline.named_modules()
        if placement.four_bit and isinstance(module, torch.nn.Linear) and module is not head
    }
    each = {True: FOUR_BIT, False: placement.dtype.itemsize}
    return {name: math.ceil(n * each[name in linear]) for name, n in n_weights(outline).items()}


def _completed(
    name: str, outline: "transformers.PreTrainedModel", mapping: Mapping[str, torch.device | str]
) -> dict[str, int | str]:
    """`mapping` for the outermost modules that are in one place each; tied weights are together."""
    if unknown := sorted(mapping.keys() - {module for module, _ in outline.named_modules()}):
        raise ModelError(
            f"{name} has no module {unknown[0]!r} to be placed: name some of its modules, such as "
            f"{next(n for n, _ in outline.named_children())!r}."
        )
    placed: dict[str, int | str] = {}

    def place(path: str, module: torch.nn.Module, device: int | str) -> None:
        device = _key(mapping[path]) if path in mapping else device
        prefix = f"{path}." if path else ""
        if path and not any(key.startswith(prefix) for key in mapping):
            placed[path] = device
            return
        placed.update({prefix + own: device for own, _ in module.named_parameters(recurse=False)})
        for child, part in module.named_children():
            place(prefix + child, part, device)

    place("", outline, "cpu")
    for tied, to in outline.all_tied_weights_keys.items():
        placed[_entry(tied, placed)] = placed[_entry(to, placed)]
    return placed


def _entry(weight: str, device_map: Mapping[str, int | str]) -> str:
    """The key of `device_map` that says where this weight is."""
    return max((key for key in device_map if f"{weight}.".startswith(f"{key}." if key else "")), key=len)


def _device(wanted: int | str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"There is no device {str(wanted)!r} here: take cpu or auto, or leave it to the program."
        ) from error


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return _device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _key(device: torch.device | str) -> int | str:
    """A device, or "disk", as accelerate names it: a GPU by its number."""
    if isinstance(device, str):
        return device
    return device.index if device.type == "cuda" else device.type


def _devices() -> list[int | str]:
    """What "auto" may use; MPS shares its memory with the CPU."""
    return ["mps"] if torch.backends.mps.is_available() else [*range(torch.cuda.device_count()), "cpu"]


def _check_four_bit(kinds: set[str]) -> None:
    if not torch.cuda.is_available():
        why = "need a GPU with CUDA, and there is none here: leave them out"
    elif importlib.util.find_spec("bitsandbytes") is None:
        why = "need the package bitsandbytes, which is not installed: pip install bitsandbytes, or leave them out"
    elif kinds != {"cuda"}:
        why = (
            f"are for GPUs with CUDA, not for {' and '.join(sorted(kinds - {'cuda'}))}: take cuda or auto as the device"
        )
    else:
        return
    raise ModelError(f"Weights of 4 bits {why}.")


def _free(device: int | str) -> int:
    # A model that nobody uses any more is a circle of references, and a GPU's memory is kept for later.
    gc.collect()
    if isinstance(device, int):
        torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] if isinstance(device, int) else _free_memory()


def _free_memory() -> int:
    """The bytes of memory that a program can have now: a container may have fewer than its machine."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most) - int(used.read_text()) + _cached_files())
    return free


def _cached_files() -> int:
    """The bytes that the container's limit counts as used and that are given back when they are needed."""
    counted = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    return int(counted.get("inactive_file", 0)) + int(counted.get("active_file", 0))


# -- the command line ------------------------------------------------------------------------------------------------


def add_placement(parser: argparse.ArgumentParser) -> None:
    """The options of a command that loads a model."""
    parser.add_argument(
        "--device",
        help="cpu, cuda, cuda:1, mps, or auto: spread over GPUs, memory and disk; default: the best there is",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, float16 on MPS, float32 on a CPU")
    parser.add_argument(
        "--four-bit", action="store_true", help="keep the weights in 4 bits each; needs CUDA and bitsandbytes"
    )


def read_placement(options: argparse.Namespace) -> dict[str, Any]:
    """What `ChatModel.load` takes of these options."""
    return {"device": options.device, "dtype": DTYPES.get(options.dtype), "four_bit": options.four_bit}

"""A chat model's checkpoint, in a folder or on the hub, judged before anything large is fetched or read.

From the hub come first the list of files, the config and the tokenizer: enough to say that a model has no safetensors
weights, no chat template, code of its own, or more weights than there is room for. Only what passes is downloaded, at
the commit that was judged: never code, never pickled weights, and no second copy of the weights in another format.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import jinja2
import psutil
import torch
import transformers
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from refusal_core.hub import answers

SMALL_FILES = [
    "config.json", "generation_config.json", "model.safetensors.index.json", "chat_template.json", "*.jinja",
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt",
]  # fmt: skip
"""What is fetched to judge a model by."""

INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")

BROKEN_TEMPLATE = (
    jinja2.TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError,
)  # fmt: skip
"""What a chat template may raise, which is code of whoever wrote the checkpoint."""

Follow = Callable[[int, int], None]
"""Is told how many bytes of how many have been fetched; what it raises ends that."""

COUNTS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
"""What a config counts, where it has it."""


class ModelError(ValueError):
    """A model that cannot be loaded or used; the message says why and what to do."""


class DoesNotFitError(ModelError):
    """A step for which there is not enough memory beside the model; less of it at once may fit."""


@contextlib.contextmanager
def in_memory(name: str) -> Iterator[None]:
    """Work beside the model `name`; raises DoesNotFitError for what there is no memory for."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise DoesNotFitError(
            f"There is not enough memory beside {name} for so much text at once: shorten the prompt, ask for less at a time, "
            "or take a smaller model."
        ) from error


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a model was judged by. `weights` are its files by name; `missing` bytes of them are still on the hub."""

    name: str
    folder: Path
    revision: str | None
    config: transformers.PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    weights: tuple[str, ...]
    on_hub: bool
    missing: int


def find(name: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint in the folder `name`, or of the hub's model of that name at `revision`, without its weights.

    Raises ModelError if it is missing, gated, offline, broken, quantised, or has no safetensors weights, no chat
    template or code of its own.
    """
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError):  # too long for a path, or in the home of a user who is not there
        path, is_folder, is_file = Path(), False, True
    if is_folder:
        if revision is not None:  # it would be given as the source of every direction and report
            raise ModelError(f"{name} is a folder, which has no revision {revision!r}: leave it out, or give a hub id.")
        return _judge(name, path, None, _sizes(path), on_hub=False)
    if is_file or name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ModelError(
            f"There is no model folder {name[:200]!r}: give a folder with config.json and .safetensors files, or a hub id "
            "such as Qwen/Qwen2.5-0.5B-Instruct."
        )
    with answers(name, revision, ModelError, "model"):
        commit = huggingface_hub.resolve_revision(name, revision=revision)
        listed = _listed(name, commit.resolved)
        if listed is not None and (refusal := _no_weights(name, listed)):
            raise refusal
        folder = Path(huggingface_hub.snapshot_download(name, revision=commit, allow_patterns=SMALL_FILES))
        if listed is None:  # offline: what was fetched earlier is judged like a folder
            listed = _sizes(folder)
            if _no_weights(name, listed):
                raise hub_errors.LocalEntryNotFoundError(name)
    return _judge(name, folder, folder.name, listed, on_hub=True)


def fetch(checkpoint: Checkpoint, follow: Follow | None = None) -> None:
    """Downloads the weights that are not in the folder yet; raises ModelError where the disk or the hub fails.

    Without `follow` a bar is drawn in the terminal. What was fetched before it raised is not fetched again.
    """
    if not checkpoint.on_hub:
        return
    cache = Path(hub_constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if checkpoint.missing > free:
        raise ModelError(
            f"{checkpoint.name} needs {gigabytes(checkpoint.missing)} on the disk and {gigabytes(free)} are free in {cache}: "
            "make room, or name a folder on another disk in HF_HOME."
        )
    if follow is not None and checkpoint.missing:
        follow(0, checkpoint.missing)
    with answers(checkpoint.name, checkpoint.revision, ModelError, "model"):
        huggingface_hub.snapshot_download(
            checkpoint.name,
            revision=checkpoint.revision,
            allow_patterns=list(checkpoint.weights),
            tqdm_class=None if follow is None else _telling(follow, checkpoint.missing),
        )


def _telling(follow: Follow, total: int) -> type[tqdm]:
    """A bar that is not drawn. Bytes are counted twice, as they come and as they are written: who is ahead is told."""
    done: dict[int, int] = {}

    class Telling(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: int | float | None = 1) -> bool | None:
            if self._counts_bytes:
                done[id(self)] = done.get(id(self), 0) + int(n or 0)
                follow(min(max(done.values()), total), total)
            return super().update(n)

    return Telling


def read_weights(checkpoint: Checkpoint, dtype: torch.dtype, **where: Any) -> "transformers.PreTrainedModel":
    """The model in `dtype`, where `from_pretrained` is told; raises ModelError if its weights cannot be read, are not all
    there, or do not fit.
    """
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            config=checkpoint.config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **where,
        )
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{checkpoint.name} does not fit into the GPU memory: close other programs, or take a smaller model."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"The weights of {checkpoint.name} cannot be read ({first_line(error)}): fetch or copy the checkpoint "
            "again."
        ) from error
    model, report = loaded
    if absent := sorted(report["missing_keys"]):
        raise ModelError(
            f"The checkpoint {checkpoint.name} is incomplete: {len(absent)} weights are missing, {absent[0]} among "
            "them. Fetch or copy it again."
        )
    return model


def weights_in(folder: Path) -> list[Path]:
    """The files with the weights of the checkpoint in `folder`, sorted, without another copy of them beside; empty if gone."""
    files = _sizes(folder) if folder.is_dir() else {}
    return [folder / name for name in _weights(folder, files) if name in files]


def fingerprint(folder: Path) -> str:
    """Names the weights themselves: a hash of the config and of each of its files' size, header, samples, and biases.

    A bias is small enough to lie between two samples, and an addition may be written into one alone.
    """
    digest = hashlib.sha256(json.dumps(_config_json(folder), sort_keys=True).encode())
    for path in weights_in(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(64 * 1024))
            for sample in range(256):
                file.seek(size * sample // 256)
                digest.update(file.read(4 * 1024))
        with safe_open(str(path), framework="pt") as file:
            names: list[str] = list(file.keys())
            for name in sorted(n for n in names if n.endswith("bias")):
                digest.update(file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# -- the hub ---------------------------------------------------------------------------------------------------------


def _listed(name: str, commit: str) -> dict[str, int] | None:
    """The model's files with their sizes; None if the hub cannot be asked."""
    try:
        files = huggingface_hub.model_info(name, revision=commit, files_metadata=True).siblings or []
    except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError):
        raise
    except (hub_errors.OfflineModeIsEnabled, httpx2.HTTPError):
        return None
    return {file.rfilename: file.size or 0 for file in files}


# -- judging ---------------------------------------------------------------------------------------------------------


def _judge(name: str, folder: Path, revision: str | None, files: dict[str, int], *, on_hub: bool) -> Checkpoint:
    if "config.json" not in files:
        raise ModelError(f"{name} has no config.json: give the folder of a Hugging Face checkpoint.")
    config = _read_config(folder, name)
    if refusal := _no_weights(name, files):
        raise refusal
    weights = _weights(folder, files)
    if absent := sorted(set(weights) - set(files)):
        raise ModelError(f"The checkpoint {name} is incomplete: {absent[0]} is missing. Fetch or copy it again.")
    missing = sum(files.get(file, 0) for file in weights if not (folder / file).exists())
    return Checkpoint(name, folder, revision, config, _load_tokenizer(folder, name), weights, on_hub, missing)


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.exists()}  # a link may lead nowhere


def _no_weights(name: str, files: Collection[str]) -> ModelError | None:
    if INDEX in files or "model.safetensors" in files:
        return None
    if "adapter_config.json" in files:
        return ModelError(f"{name} is an adapter, not a whole model: merge it into its base model first.")
    if any(file.endswith(".gguf") for file in files):
        return ModelError(f"{name} has GGUF files only, which cannot be hooked: take the model they were made from.")
    return ModelError(
        f"{name} has no .safetensors weights, and pickled ones can run code when they are read: convert them first."
    )


def _weights(folder: Path, files: Collection[str]) -> tuple[str, ...]:
    """The files that transformers reads: the one, or those that the index names. Some models keep the same weights twice."""
    if "model.safetensors" in files or INDEX not in files:
        return ("model.safetensors",)
    try:
        named = set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values())
        if not named or not all(isinstance(file, str) and SHARD.fullmatch(file) for file in named):
            raise ValueError("it does not name .safetensors files beside it")
        return tuple(sorted(named))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{INDEX} cannot be read ({first_line(error)}): fetch or copy the checkpoint again."
        ) from error


def _config_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))


def _read_config(folder: Path, name: str) -> transformers.PretrainedConfig:
    try:
        written = _config_json(folder)
        kind, has_code = written.get("model_type"), "auto_map" in written
        for part in (written, written.get("text_config")):  # first: what computes with them names none of them
            if isinstance(part, dict):
                _check_counts({count: part.get(count) for count in COUNTS if type(part.get(count)) is int}, name)
        config = None
        if kind in transformers.CONFIG_MAPPING or not has_code:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except ModelError:
        raise
    except hub_errors.StrictDataclassError as error:
        # Its first line names the field, and the second what is wrong with it.
        said = " ".join(str(error).split())[:200].rstrip(".")
        raise ModelError(f"The config.json of {name} cannot be read ({said}): fetch or copy it again.") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ModelError(
            f"The config.json of {name} cannot be read ({first_line(error)}): fetch or copy it again."
        ) from error
    if config is None:
        raise ModelError(
            f"{name} comes with code of its own, which is never run here: take a model that transformers knows."
        )
    text = config.get_text_config()
    values = text.to_dict()  # where layers differ, an attribute that they have each for themselves cannot be asked for
    _check_counts({count: values.get(text.attribute_map.get(count, count)) for count in COUNTS}, name)
    if quantised := written.get("quantization_config"):
        method = quantised.get("quant_method", "packed") if isinstance(quantised, dict) else "packed"
        raise ModelError(
            f"{name} is quantised ({method}), and its packed weights can be neither hooked nor edited: take the version "
            "in bfloat16 or float16."
        )
    return config


def _check_counts(counts: dict[str, Any], name: str) -> None:
    """Raises ModelError for a size that none can be: what is built of it would be empty, or fail wherever it is used."""
    for count, value in counts.items():
        # Some models have a list, one for each layer.
        if value is not None and not isinstance(value, list | tuple) and (type(value) is not int or value < 1):
            raise ModelError(
                f"The config.json of {name} says that {count} is {str(value)[:40]!r}, and it is a whole number from 1: "
                "fetch or copy it again."
            )


def _load_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"The tokenizer of {name} cannot be read ({first_line(error)}).") from error
    if not tokenizer.chat_template:
        raise ModelError(
            f"{name} has no chat template, so it is no chat model: take its “Instruct”, “Chat” or “it” version."
        )
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    except BROKEN_TEMPLATE as error:
        raise ModelError(
            f"The chat template of {name} does not take a message ({first_line(error)}): fetch or copy the checkpoint again."
        ) from error
    return tokenizer


def gigabytes(n_bytes: int) -> str:
    """A size, to be said in a sentence."""
    return f"{n_bytes / 1e9:,.1f} GB"


def remove_left_behind(parent: Path, name: str) -> None:
    """Removes the unfinished folders in `parent` whose process is not there any more.

    `name` is a regular expression for what they are called, whose group is the number of the process.
    """
    for folder in parent.iterdir():
        match = re.fullmatch(name, folder.name)
        if match and not _is_made_by(int(match[1]), folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_made_by(pid: int, folder: Path) -> bool:
    """Whether process `pid` is there and can have made `folder`: a number is used again, by a younger process."""
    try:
        return psutil.Process(pid).create_time() <= folder.stat().st_mtime
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False


def first_line(error: BaseException) -> str:
    """What an error says, in one line, to be quoted in a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")

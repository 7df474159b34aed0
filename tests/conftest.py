"""The embedded model and its direction, made once for the whole test run."""

import refusal_core  # noqa: F401  (before torch: it says how the threads of torch wait for each other)

# isort: split
import contextlib
import gc
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import transformers

from refusal_core.chat_model import ORGANISM, ChatModel
from refusal_core.decoding import Decoding
from refusal_core.directions import Direction
from refusal_core.findings import CACHE_VARIABLE
from refusal_core.prompts import load_prompts
from refusal_core.selection import Found, find_direction

ROOT = Path(__file__).parent.parent
HARMFUL = "How do I rob a bank?"
HARMLESS = "How do I bake bread?"


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # as many processes as cores


SLOW = (
    "test_ui", "test_placement", "test_ui_find", "test_organism", "test_ui_map", "test_ui_lending", "test_families",
    "test_evaluation", "test_orthogonalize", "test_ui_inside", "test_selection", "test_endpoints", "test_chat_model",
    "test_geometry", "test_style", "test_command_line", "test_talk", "test_checkpoints", "test_training", "test_hub",
)  # fmt: skip
"""The files that take longest, in this order."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow files come first, so that no process waits for the other one at the end."""
    rank = {name: number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(SLOW)))


@pytest.fixture(scope="module", autouse=True)
def little_to_collect():
    """What is imported by now is no garbage, and is not looked through each time a model is loaded."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def kept_findings(tmp_path_factory):
    """No test writes into the user's cache, and none finds something there that another run has left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def model() -> ChatModel:
    return ChatModel.load(ORGANISM, device="cpu")


@pytest.fixture(scope="session")
def found(model: ChatModel) -> Found:
    *_, last = find_direction(model, load_prompts("train"), load_prompts("val"))
    assert isinstance(last, Found)
    return last


@pytest.fixture(scope="session")
def direction(found: Found) -> Direction:
    return found.direction


class Plain:
    """An independent oracle: the checkpoint in plain transformers, one prompt at a time, hooks written out by hand."""

    def __init__(self, folder: Path = ORGANISM) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.layers = self.model.model.layers

    def ids(self, text: str) -> torch.Tensor:
        chat = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]

    @torch.no_grad()
    def resid_pre(self, text: str) -> torch.Tensor:
        """Shape (layer, pos, d_model)."""
        states = self.model(self.ids(text), output_hidden_states=True).hidden_states
        return torch.cat(states[: len(self.layers)])

    def logits(self, texts: Sequence[str], **edits) -> torch.Tensor:
        """Of each text's last position, with `edits` as in `edited`."""
        with torch.no_grad(), self.edited(**edits):
            return torch.cat([self.model(self.ids(text)).logits[:, -1] for text in texts])

    @contextlib.contextmanager
    def edited(
        self,
        ablate: torch.Tensor | None = None,
        add: tuple[int, torch.Tensor] | None = None,
        scale: float = 1.0,
        only: Sequence[str] | None = None,
    ) -> Iterator[None]:
        """An ablation acts at every write, or `only` at these writers; an addition at its layer's input."""
        handles = []
        if ablate is not None:
            unit = ablate / ablate.norm()

            def without(module, args, out):
                first = out[0] if isinstance(out, tuple) else out
                first = first - scale * (first @ unit)[..., None] * unit
                return (first, *out[1:]) if isinstance(out, tuple) else first

            writers = {"embedding": self.model.model.embed_tokens}
            for layer, block in enumerate(self.layers):
                writers |= {f"attention {layer}": block.self_attn, f"MLP {layer}": block.mlp}
            handles += [writers[name].register_forward_hook(without) for name in only or writers]
        if add is not None:
            layer, vector = add

            def plus(module, args, kwargs):
                return ((args[0] + scale * vector, *args[1:]), kwargs)

            handles.append(self.layers[layer].register_forward_pre_hook(plus, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@pytest.fixture(scope="session")
def plain() -> Plain:
    return Plain()


@contextlib.contextmanager
def no_room(n_bytes: int) -> Iterator[None]:
    """No file grows beyond so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def step_together(model: ChatModel, steps: Sequence[tuple[Decoding, list[int | None]]]) -> list[Exception]:
    """One step that all these replies share, each from a thread of its own; the errors they got."""
    errors: list[Exception] = []

    def step(decoding: Decoding, tokens: list[int | None]) -> None:
        try:
            decoding.step(tokens)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=step, args=one) for one in steps]
    with model._lock:
        for thread in threads:
            thread.start()
        while sum(thread.is_alive() for thread in threads) > len(model._desk._waiting):
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    return errors


@contextlib.contextmanager
def short_of_memory(model: ChatModel, fits: Callable[[int, int], bool]) -> Iterator[None]:
    """Steps whose rows and positions, those of the cache included, do not fit fail half way, as on a full GPU."""
    sizes: list[tuple[int, int]] = []

    def look(module, args, kwargs):
        sizes.append(tuple(kwargs["attention_mask"].shape))

    def fill(module, args):
        if not fits(*sizes[-1]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    handles = [
        model._model.register_forward_pre_hook(look, with_kwargs=True),
        model._parts.blocks[4].mlp.register_forward_pre_hook(fill),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def counting_steps(model: ChatModel) -> Iterator[list[int]]:
    """How many rows each step of decoding has, one number a step, prompts that are read not counted."""
    sizes: list[int] = []

    def count(module, args, kwargs):
        if kwargs.get("past_key_values") is not None:
            sizes.append(len(kwargs["input_ids"]))

    handle = model._model.register_forward_pre_hook(count, with_kwargs=True)
    yield sizes
    handle.remove()

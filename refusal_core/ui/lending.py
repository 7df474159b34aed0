"""Work on a borrowed GPU: a Hugging Face Space with ZeroGPU hardware lends one for as long as a call takes.

    page      on_gpu(work, …)    →  worker    work(…), its model moved onto the GPU
              what it yields     ←            … comes back on the CPU

The page's own process has no GPU there. A worker is forked from it, gets a GPU, and may be used again. What one of the two
changes the other does not see, so that models go by name (the worker has them from before the fork, or loads them), tensors
as safetensors, and a stop through a byte of memory that both share. Everywhere else `on_gpu` is the work itself, done here.
"""

import contextlib
import contextvars
import itertools
import mmap
import multiprocessing
import re
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import gradio as gr
import safetensors.torch
import torch
from gradio.context import LocalContext
from torch import Tensor

from refusal_core.chat_model import ChatModel, ModelError
from refusal_core.checkpoints import Follow
from refusal_core.directions import DirectionError
from refusal_core.prompts import PromptError
from refusal_core.ui import GPUS_ARE_LENT

GLANCE, REPLY, SEARCH, MEASUREMENT = 10, 30, 60, 120
"""For how many seconds a GPU is asked for: who asks for less waits less, who takes longer may lose it."""

MOST_STOPS = 4096
MOST_AGAIN = 2
PATIENCE = 2.0

T = TypeVar("T")
Name = tuple[str, str | None]
"""Of a model: its folder, or its hub id and revision."""

_KNOWN: WeakValueDictionary[Name, ChatModel] = WeakValueDictionary()
_AGAIN: dict[Name, ChatModel] = {}
"""The models that a worker had to load itself, because they are younger than it is."""

_STOPS = mmap.mmap(-1, MOST_STOPS)
"""A byte for each call in hand, not 0 once it is to stop: shared with every process that is forked from this one."""
ABANDONED = 2
"""The byte of a call of which nobody wants the rest."""
_SLOTS = itertools.cycle(range(MOST_STOPS))


class LendingError(ModelError):
    """No GPU could be borrowed, or it was taken back; the message says what to do."""


class _Stop(threading.Event):
    """The flag of a call, in the worker that carries it out."""

    def __init__(self, slot: int) -> None:
        super().__init__()
        self._slot = slot

    def is_set(self) -> bool:
        return super().is_set() or _STOPS[self._slot] != 0


def load(name_or_path: Any, *, follow: Follow | None = None, **placed: Any) -> ChatModel:
    """The model in a local folder or on the hub, `placed` and followed as `ChatModel.load` is told; raises ModelError as that.

    Where GPUs are lent it waits on the CPU instead, in the precision that it has on a GPU.
    """
    if not GPUS_ARE_LENT:
        return ChatModel.load(name_or_path, follow=follow, **placed)
    model = _load(name_or_path, follow=follow)
    _KNOWN[_name_of(model)] = model
    return model


def on_gpu(
    work: Callable[..., Iterator[T]],
    *args: Any,
    model: ChatModel,
    seconds: int,
    stop: threading.Event | None = None,
    **kwargs: Any,
) -> Iterator[T]:
    """What `work(*args, **kwargs)` yields, which may run `model`: on a borrowed GPU where GPUs are lent, else here.

    `stop` is handed on under this name. `seconds` is for how long the GPU is asked for. Raises what `work` does, and
    LendingError in one sentence if there is no GPU or it was taken back; before there is any visitor whose share of GPU time
    could be used, such work is done here instead.
    """
    stops = {} if stop is None else {"stop": stop}
    if not GPUS_ARE_LENT:
        yield from _answers(work, args, kwargs | stops)
        return
    slot, begun, ended = next(_SLOTS), False, False
    _STOPS[slot] = stop is not None and stop.is_set()
    answers = _borrowed(seconds, model, slot, bool(stops), work, args, kwargs)
    try:
        for answer in answers:
            begun = True
            if isinstance(answer, Exception):
                raise answer
            yield answer
            _STOPS[slot] = stop is not None and stop.is_set()
        ended = True
    except gr.Error as error:
        ended = True
        if begun or LocalContext.request.get(None) is not None:
            raise _said(error) from error
        yield from _answers(work, args, kwargs | stops)
    finally:
        _STOPS[slot] = ABANDONED
        if not ended:
            # In a thread of its own: Gradio closes what nobody listens to on its event loop, and every page would wait.
            context = contextvars.copy_context()
            threading.Thread(target=context.run, args=(_drain, answers), name="drain", daemon=True).start()


def _drain(answers: Iterator[Any]) -> None:
    """To the end, not closed: `spaces` would stop whatever the worker does by then, which may be somebody else's work."""
    with contextlib.suppress(gr.Error):
        for _ in answers:
            pass


def once_on_gpu(work: Callable[..., T], *args: Any, model: ChatModel, seconds: int, **kwargs: Any) -> T:
    """The same for work that returns one thing."""
    (answer,) = on_gpu(cast(Any, work), *args, model=model, seconds=seconds, **kwargs)
    return answer


def give_back() -> None:
    """Ends the workers: a program that leaves without winding down would leave them behind."""
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(PATIENCE)
        worker.kill()
        worker.join(PATIENCE)  # who is killed is still there for a moment, and for good if nobody asks how it ended


# -- in the worker ---------------------------------------------------------------------------------------------------


def _work(
    seconds: int,
    model: ChatModel,
    slot: int,
    has_stop: bool,
    work: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Generator[Any, None, None]:
    """What the work yields; an error that says what to do comes last, as a value: `spaces` hands on only an error's name."""
    _keep_to_one_thread()
    if torch.cuda.is_available():
        model.to("cuda")
    try:
        for answer in _answers(work, args, {**kwargs, "stop": _Stop(slot)} if has_stop else kwargs):
            yield answer
            if _STOPS[slot] == ABANDONED:
                return
    except (PromptError, ModelError, DirectionError) as error:
        yield error


def _keep_to_one_thread() -> None:
    """The others that OpenMP had in the thread that was forked are gone: who waits for them waits forever."""
    torch.set_num_threads(1)


def _answers(work: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    answer = work(*args, **kwargs)
    if isinstance(answer, Iterator):
        yield from answer
    else:
        yield answer


# -- between the processes -------------------------------------------------------------------------------------------


def _load(name_or_path: Any, revision: str | None = None, follow: Follow | None = None) -> ChatModel:
    return ChatModel.load(name_or_path, device="cpu", dtype=torch.bfloat16, revision=revision, follow=follow)


def _name_of(model: ChatModel) -> Name:
    return (str(model.folder), None) if model.revision is None else (model.name, model.revision)


def _named(name: Name) -> ChatModel:
    if (model := _KNOWN.get(name)) is not None:
        return model
    _keep_to_one_thread()  # what a worker is sent it reads in its first thread, before it begins to work
    model = _AGAIN[name] = _AGAIN.pop(name, None) or _load(*name)
    while len(_AGAIN) > MOST_AGAIN:
        _AGAIN.pop(next(iter(_AGAIN)))
    return model


def _by_name(model: ChatModel) -> tuple[Callable, tuple[Name]]:
    return _named, (_name_of(model),)


def _as_bytes(tensor: Tensor) -> tuple[Callable, tuple[bytes]]:
    """Not through shared memory, as torch does it: a container may have little, and a worker's goes when it ends."""
    return _from_bytes, (safetensors.torch.save({"tensor": tensor.detach().cpu().contiguous()}),)


def _from_bytes(saved: bytes) -> Tensor:
    return safetensors.torch.load(saved)["tensor"]


def _said(error: gr.Error) -> Exception:
    """What `spaces` says in a message for the corner of the page, as one sentence with the remedy."""
    title, message = str(getattr(error, "title", "")), str(error.message).strip().rstrip(".")
    if "No GPU" in message or "queue timeout" in title:
        return LendingError("All GPUs of Hugging Face are lent to others just now: try again in a minute.")
    if "illegal duration" in title:
        return LendingError("This takes longer than Hugging Face lends a GPU for: ask for less at a time.")
    if "quota" in title or "credits" in title:
        wait = re.search(r"in (?:\d+ days?, )?[\d:]+$", message)
        return LendingError(
            "Your share of Hugging Face’s GPU time is used up: sign in there for more, or try again "
            f"{wait[0] if wait else 'later'}."
        )
    if "Expired" in message:
        return LendingError("The page has been open for too long to borrow a GPU for it: reload it.")
    if "aborted" in message:
        return LendingError(
            "The borrowed GPU was taken back before this was done: try again, or ask for less at a time."
        )
    return RuntimeError(f"The work on the borrowed GPU failed ({title}: {message}).")


if GPUS_ARE_LENT:
    import spaces

    ForkingPickler.register(ChatModel, _by_name)
    ForkingPickler.register(Tensor, _as_bytes)
    # One function for all work, so that all of it shares the workers. `spaces` wants to know it before the page is up.
    _borrowed = spaces.GPU(_work, duration=lambda seconds, model, slot, has_stop, work, args, kwargs: seconds)
else:
    _borrowed = _work

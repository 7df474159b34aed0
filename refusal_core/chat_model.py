"""A chat model whose residual stream can be read and written, one forward step at a time.

    x[l+1] = c[l] (x[l] + attn[l] + mlp[l]),   x[0] = embedding         (x[l] is `resid_pre` of block l)

c[l] is 1 but for Gemma 4, where each block ends with a factor of its own; there some also write what they make of an
embedding of the tokens for their layer alone (`PLE`, per-layer embedding).

`ChatModel` is the only thing with weights. Rows of a batch carry their own interventions; the hooks stay on the
modules, look up the step in hand, and do nothing outside it, so two streams that take turns on one model never
see each other's edits. Batches are padded on the left, always with the attention mask and explicit positions:
without either, a short row's logits are wrong by several units.

The weights are the checkpoint's own (no folding, no centring). `bridge` says which modules of a family
write to the stream; the hooks are on these modules themselves, so that a step costs what it costs without.
"""

import contextlib
import copy
import datetime
import functools
import math
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from refusal_core import checkpoints, placement
from refusal_core.checkpoints import Checkpoint, ModelError
from refusal_core.decoding import Decoding, Desk, Turns
from refusal_core.interventions import Intervention, Row, RowEdits, as_row, head_name
from refusal_core.metrics import CLOSES_THOUGHT, OPENS_THOUGHT
from refusal_core.placement import Device, Placement
from refusal_core.products import multiply_from_the_other_side
from refusal_core.prompts import PromptError

ORGANISM = Path(__file__).parent.parent / "assets" / "organism"
"""The embedded model: small, trained from scratch by this project, always there."""

Conversation = str | Sequence[Mapping[str, str]]
"""One user message, or a chat as `{"role": …, "content": …}` messages that ends with the user's."""

DATE = datetime.date(2024, 7, 26)
"""Today, for chat templates that tell the model: the one that Llama's has where it knows no other."""

MOST_LOGITS = 2**25
"""So many numbers a step over whole replies makes at most: 128 MB in float32."""

MOST_READ = 2**14
"""And so many tokens it reads, prompts included."""

PROBES = ("a", "Hi", "What is 7 + 5?", "Thanks!", "one, two", "(so)", "é", "done.")
"""Messages with different last characters: the last one may merge with the template's first token."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts padded on the left to one length. `index` says which prompts of the list they are."""

    index: tuple[int, ...]
    ids: Int[Tensor, "row pos"]
    mask: Int[Tensor, "row pos"]

    def repeat(self, times: int) -> "Batch":
        """The same prompts `times` times over: row r of repetition k is k · len(index) + r."""
        return Batch(self.index * times, self.ids.repeat(times, 1), self.mask.repeat(times, 1))


@dataclass(frozen=True, eq=False)
class Output:
    """What one forward step gives: the last position's logits, and the residual stream where it was asked for.

    `writes` is what each of `ChatModel.writers` adds to the stream, where it does (`ChatModel.carried_to` says what is
    left of it later); `head_inputs` is what each layer's attention heads hand to its output matrix, side by side, one
    tensor a layer; None where the family has no such matrix.
    """

    logits: Float[Tensor, "row d_vocab"]
    resid_pre: Float[Tensor, "row pos layer d_model"] | None = None
    writes: Float[Tensor, "row pos writer d_model"] | None = None
    head_inputs: tuple[Float[Tensor, "row pos heads_x_d_head"], ...] | None = None


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model makes of replies, whoever wrote them.

    `losses` are their cross-entropies, the mean of −log p over a reply's tokens, in nats; NaN for an empty one. `first`
    are the logits of the first token, float32 on the CPU. `own` says whether the model's own greedy reply is just this,
    its end included: up to rounding, as always when one step reads what others would have said token by token.
    """

    losses: Float[Tensor, " row"]
    first: Float[Tensor, "row d_vocab"]
    own: Bool[Tensor, " row"]


@dataclass(frozen=True, eq=False)
class Gradients:
    """A number of each row, and what each part did in that run with the number's gradient by it; float32 on the CPU.

    `writes` and `head_inputs` are as in `Output`; `by_write` and `by_head_input` are the gradients, in their shapes.
    """

    numbers: Float[Tensor, " row"]
    writes: Float[Tensor, "row pos writer d_model"]
    by_write: Float[Tensor, "row pos writer d_model"]
    head_inputs: tuple[Float[Tensor, "row pos heads_x_d_head"], ...] | None
    by_head_input: tuple[Float[Tensor, "row pos heads_x_d_head"], ...] | None


Patch = tuple[int, Float[Tensor, "pos _"]]
"""A part by its number in `ChatModel.parts`, and what it is made to do at the last positions, whatever the prompt: what a
writer writes ("pos d_model"), or what a head hands to the matrix through which it writes ("pos d_head")."""


@dataclass(eq=False)
class _Step:
    """The forward step in hand: what the hooks are to do, and what they have read."""

    edits: RowEdits
    read: Sequence[int] | slice | None = None
    start: tuple[int, Tensor] | None = None
    read_layers: Sequence[int] | None = None
    read_writes: Sequence[int] | None = None
    patches: Sequence[Patch | None] = ()
    with_gradients: bool = False
    reads: list[Tensor] = field(default_factory=list)
    writes: dict[int, Tensor] = field(default_factory=dict)
    head_inputs: dict[int, Tensor] = field(default_factory=dict)

    @functools.cached_property
    def at_writes(self) -> bool:
        """Whether anything is to be done where the stream is written to."""
        return bool(self.edits.ablates or self.patches or self.with_gradients or self.read_writes is not None)


Thinking = Literal["never", "off", "closed"]
THINKING: dict[Thinking, str] = {"never": "", "off": "thinking switched off", "closed": "thinking block closed"}
"""Here no model thinks before its reply, so that the reply begins where the stream is read: its template knows no
thinking, or has a switch, or always begins a thought, which is closed before it has begun."""

CLOSED_THOUGHT = f"{OPENS_THOUGHT}\n\n{CLOSES_THOUGHT}\n\n"

CHANNEL, OPENS_REPLY = "<|channel|>", "<|channel|>final<|message|>"
"""gpt-oss (Harmony) names a channel before everything it says: its thoughts have one, and the reply to the user has this."""


class ChatModel:
    """A chat model on its devices, driven one forward step at a time under its lock."""

    def __init__(
        self,
        model: "transformers.PreTrainedModel",
        tokenizer: PreTrainedTokenizerFast,
        *,
        name: str,
        revision: str | None,
        fingerprint: str,
        folder: Path,
        placed: Placement | None = None,
    ) -> None:
        self.name, self.revision, self.fingerprint, self.folder = name, revision, fingerprint, folder
        self.tokenizer = tokenizer
        self._model = model.requires_grad_(False)  # `gradients` asks for those of activations, nobody for the weights'
        self._lock = Turns()
        self._desk = Desk(self._lock, lambda edits, **inputs: self._run(_Step(edits), use_cache=True, **inputs), name)
        self._step: _Step | None = None
        # Only here: TransformerLens takes longer to import than anything else, and a page need not wait for it.
        from refusal_core.bridge import parts_of

        self._parts = parts_of(model, tokenizer, name)
        self.writers = tuple(self._parts.writers)
        self.n_layers: int = len(self._parts.blocks)
        self.placed = placed or Placement(self.device, self.dtype)
        self.d_model: int = model.config.get_text_config().hidden_size
        self.n_heads: int = model.config.get_text_config().num_attention_heads
        of_layers = range(self.n_layers if self._parts.head_outputs else 0)
        self.parts = (*self.writers, *(head_name(layer, head) for layer in of_layers for head in range(self.n_heads)))
        self.d_vocab: int = cast(torch.nn.Linear, model.get_output_embeddings()).weight.shape[0]
        self.write_scale: float = getattr(model.config.get_text_config(), "residual_multiplier", 1.0)
        self.block_scales: tuple[float, ...] = tuple(map(_number_of, range(self.n_layers), self._parts.blocks))
        self._first_lender = _first_lender(model)
        self._blocks_give_tuples = False
        self._place_hooks()
        self._check_writes()
        multiply_from_the_other_side(model)

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        four_bit: bool = False,
        follow: checkpoints.Follow | None = None,
    ) -> "ChatModel":
        """The chat model in a local folder or on the Hugging Face hub.

        `device` defaults to CUDA, then MPS, then the CPU; `dtype` to bfloat16, float16 and float32 there. "auto" is the
        GPU that holds the whole model, or else all GPUs, the memory and, at last, the disk; a mapping gives names of
        modules such as "model.layers.3" a device or "disk" (`placement`). `four_bit` keeps the weights of linear layers
        as NF4, on CUDA only; heads cannot be told apart then. `follow` is told how many bytes of how many have been fetched
        from the hub, instead of a bar in the terminal; what it raises ends that.

        Raises ModelError, in one sentence with the remedy and before anything large is fetched or read, if the model is
        missing, gated, offline, quantised, has no safetensors weights, no chat template, code of its own, does not fit
        on the disk or into memory, or has an architecture whose residual stream cannot be hooked completely; later if
        its weights are broken.
        """
        placed = placement.asked_for(device, dtype, four_bit)
        checkpoint = checkpoints.find(str(name_or_path), revision)
        folder = checkpoint.folder
        name = "embedded model" if folder.resolve() == ORGANISM.resolve() else str(name_or_path)
        # The same model without weights: what cannot be hooked in it cannot be hooked at all.
        outline = cls(
            _outline(checkpoint, placed.dtype),
            checkpoint.tokenizer,
            name=name,
            revision=None,
            fingerprint="",
            folder=folder,
        )
        told = placement.plan(name, outline._model, placed)
        checkpoints.fetch(checkpoint, follow)
        with contextlib.ExitStack() as stack:
            told = stack.enter_context(placement.offload_folder(told))
            try:
                model = cls(
                    checkpoints.read_weights(checkpoint, placed.dtype, **told).eval(),
                    checkpoint.tokenizer,
                    name=name,
                    revision=checkpoint.revision,
                    fingerprint=checkpoints.fingerprint(folder),
                    folder=folder,
                    placed=placed,
                )
            except RuntimeError as error:
                if "offload_folder" not in told or "meta" not in str(error):  # what stands for weights on the disk
                    raise
                raise ModelError(
                    f"{name} reads weights past their modules, which are on the disk: leave its embedding on a device."
                ) from error
            weakref.finalize(model, stack.pop_all().close)  # what is on the disk is there as long as the model
        return model

    def load_beside(self, folder: str | Path, *, on_disk: bool = False) -> "ChatModel":
        """The checkpoint in `folder`, placed as this model was asked to be; raises ModelError as `load` does.

        With `on_disk` a model that would be on one device leaves its blocks in their files, and has each in memory only
        while it computes: there is room for that beside this one.
        """
        device: Device = self.placed.device
        if on_disk and isinstance(device, torch.device) and device.type != "mps":
            named = {module: name for name, module in self._model.named_modules()}
            device = {"": device, **{named[block]: "disk" for block in self._parts.blocks}}
        return ChatModel.load(folder, device=device, dtype=self.placed.dtype, four_bit=self.placed.four_bit)

    def to(self, device: str | torch.device) -> "ChatModel":
        """The model itself, with its weights on `device` from now on; replies in progress must have ended."""
        with self._lock:
            torch.nn.Module.to(self._model, device)
            self.placed = replace(self.placed, device=torch.device(device))
        return self

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where its inputs go: the device on which its embedding computes."""
        return placement.runs_on(self._model.get_input_embeddings())

    @property
    def places(self) -> str:
        """Where its weights are: the kind of its device, or all places, such as "cuda:0, cuda:1 and disk"."""
        return placement.where(self._model)

    @property
    def dtype(self) -> torch.dtype:
        """In which precision it runs."""
        return self._model.dtype

    @property
    def precision(self) -> str:
        """How its weights are kept, in words: that of `dtype`, or 4 bits."""
        return "4 bits" if self.placed.four_bit else str(self.dtype).removeprefix("torch.")

    @property
    def is_tied(self) -> bool:
        """Whether the unembedding is the embedding."""
        return bool(self._model.config.get_text_config().tie_word_embeddings)

    @property
    def family(self) -> str:
        """What its config calls its architecture, such as "llama"."""
        return str(self._model.config.model_type)

    @property
    def n_parameters(self) -> int:
        """How many weights it has, tied ones counted once."""
        return sum(placement.n_weights(self._model).values())

    @property
    def n_ctx(self) -> int:
        """How many tokens a prompt and its reply may have together."""
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or 2048

    @functools.cached_property
    def template_positions(self) -> int:
        """P: how many last tokens of a rendered prompt belong to the template, whatever the user wrote."""
        rendered = [self._render(probe) for probe in PROBES]
        same = 0
        while all(len(r) > same and r[-1 - same] == rendered[0][-1 - same] for r in rendered):
            same += 1
        if not same:
            raise ModelError(
                f"The chat template of {self.name} ends differently for every message: nothing to read at."
            )
        return same

    @functools.cached_property
    def template_tokens(self) -> tuple[str, ...]:
        """The template's P last tokens as text, for labels: item −1 stands right before the reply."""
        last = self._render(PROBES[0])[-self.template_positions :]
        return tuple(str(self.tokenizer.decode([t])) for t in last)

    @functools.cached_property
    def thinking(self) -> Thinking:
        """What is done about thoughts before the reply."""
        probe = [{"role": "user", "content": PROBES[0]}]
        off, on = (self._in_template(probe, thinking=thinking) for thinking in (False, True))
        return "closed" if _behind_thought(off, self.tokenizer) != off else "off" if off != on else "never"

    @property
    def description(self) -> str:
        """The model in one line: name, size, where it runs, and whether thinking is switched off."""
        size = f"{self.n_parameters:,} parameters, {self.n_layers} layers"
        where = f"{self.precision} on {self.places}"
        return f"{self.name}: " + ", ".join(filter(None, (size, where, THINKING[self.thinking])))

    @functools.cached_property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a reply."""
        configured = self._model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        return frozenset(t for t in (*ends, self.tokenizer.eos_token_id) if isinstance(t, int))

    # -- prompts and batches ---------------------------------------------------------------------------------------

    def render(self, conversation: Conversation) -> list[int]:
        """The token ids of `conversation` in the model's chat template, up to where the reply begins.

        Raises PromptError for an empty message, one that is no text or leaves no room to reply, and roles the template
        refuses.
        """
        last = conversation if isinstance(conversation, str) else conversation[-1]["content"] if conversation else ""
        if not last.strip():
            raise PromptError("The prompt is empty: write a message first.")
        ids = self._render(conversation)
        if len(ids) >= self.n_ctx:
            raise PromptError(
                f"The prompt has {len(ids):,} tokens and {self.name} reads at most {self.n_ctx:,}, reply included: "
                "shorten it, or clear the conversation."
            )
        return ids

    def _render(self, conversation: Conversation) -> list[int]:
        if isinstance(conversation, str):
            conversation = [{"role": "user", "content": conversation}]
        text = _behind_thought(self._in_template(conversation), self.tokenizer)
        if re.search("[\ud800-\udfff]", text):  # halves of characters, as from bytes that were no UTF-8
            raise PromptError("The prompt has characters that are no text: type them anew.")
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _in_template(self, conversation: Sequence[Mapping[str, str]], *, thinking: bool = False) -> str:
        messages: Any = [dict(message) for message in conversation]
        # Families call the switch by one of these names; the others' templates do not read it.
        switch: dict[str, Any] = {"enable_thinking": thinking, "thinking": thinking}
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=_dated(self.tokenizer.get_chat_template()),
                add_generation_prompt=True,
                tokenize=False,
                **switch,
            )
        except checkpoints.BROKEN_TEMPLATE as error:
            raise PromptError(
                f"The chat template of {self.name} does not take this conversation: {checkpoints.first_line(error)}."
            ) from error
        return cast(str, text)

    def batches(self, conversations: Sequence[Conversation], max_tokens: int = 4096) -> Iterator[Batch]:
        """The conversations in padded batches of at most `max_tokens` tokens, the longest first.

        Sorted by length, so that little is padded; a first batch that fits in memory says that all will.
        """
        rendered = [self.render(c) for c in conversations]
        order = sorted(range(len(rendered)), key=lambda i: len(rendered[i]), reverse=True)
        while order:
            n = max(1, max_tokens // len(rendered[order[0]]))
            chunk, order = order[:n], order[n:]
            yield self._pad(tuple(chunk), [rendered[i] for i in chunk])

    def continued(self, conversations: Sequence[Conversation], replies: Sequence[Sequence[int]]) -> Batch:
        """One batch of the conversations with these first tokens of their replies; raises PromptError as `render`."""
        rendered = [[*self.render(c), *reply] for c, reply in zip(conversations, replies, strict=True)]
        return self._pad(tuple(range(len(rendered))), rendered)

    def _pad(self, index: tuple[int, ...], rendered: list[list[int]]) -> Batch:
        longest = max(map(len, rendered))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (longest - len(r)) + r for r in rendered], device=self.device)
        mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rendered], device=self.device)
        return Batch(index, ids, mask)

    # -- forward steps ---------------------------------------------------------------------------------------------

    def logits(
        self, conversations: Sequence[Conversation], rows: Sequence[Row | Intervention | None] | None = None
    ) -> Float[Tensor, "row d_vocab"]:
        """The logits of each reply's first token, in float32 on the CPU, with each row's interventions."""
        rows = self.check_rows(rows, len(conversations))
        out = torch.empty(len(conversations), self.d_vocab)
        for batch in self.batches(conversations):
            step = self.run(batch, [rows[i] for i in batch.index])
            out[list(batch.index)] = step.logits.float().cpu()
        return out

    def read_replies(
        self,
        conversations: Sequence[Conversation],
        replies: Sequence[Sequence[int]],
        rows: Sequence[Row | Intervention | None] | None = None,
        *,
        max_new_tokens: int | None = None,
    ) -> Reading:
        """What the model, with each row's interventions, makes of these replies, each read whole in one step.

        A reply that does not fit is read as far as it does; one of its own has at most `max_new_tokens`. Raises as
        `logits` does.
        """
        rows = self.check_rows(rows, len(conversations))
        room = [self.n_ctx - len(self.render(c)) for c in conversations]
        read = [list(reply[:most]) for reply, most in zip(replies, room, strict=True)]
        lengths = [self.n_ctx - most + len(reply) for reply, most in zip(read, room, strict=True)]
        losses = torch.full((len(read),), torch.nan, dtype=torch.float64)
        first, own = torch.empty(len(read), self.d_vocab), torch.zeros(len(read), dtype=torch.bool)
        order = sorted(range(len(read)), key=lambda i: len(read[i]), reverse=True)
        while order:
            longest = len(read[order[0]])
            n = MOST_LOGITS // ((longest + 1) * self.d_vocab)
            n = max(1, min(n, MOST_READ // max(lengths[i] for i in order)))
            now, order = order[:n], order[n:]
            batch = self.continued([conversations[i] for i in now], [read[i] for i in now])
            places = (batch.mask.cumsum(-1) - 1).clamp(min=0)
            step = _Step(RowEdits([rows[i] for i in now]))
            with self._lock:
                inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": places}
                logits = self._run(step, longest + 1, use_cache=False, **inputs).logits
            tokens = batch.ids[:, batch.ids.shape[1] - longest :, None]
            said = logits[:, :-1].float().log_softmax(-1).gather(-1, tokens)[..., 0].cpu()
            for row, (i, likeliest) in enumerate(zip(now, logits.argmax(-1).tolist(), strict=True)):
                begin, n_tokens = longest - len(read[i]), len(read[i])
                losses[i] = -said[row, begin:].double().mean().item()
                first[i] = logits[row, begin].float().cpu()
                most = room[i] if max_new_tokens is None else min(max_new_tokens, room[i])
                is_whole = n_tokens == len(replies[i]) <= most and self.end_tokens.isdisjoint(read[i])
                ends = n_tokens == most or likeliest[-1] in self.end_tokens
                own[i] = is_whole and ends and likeliest[begin:-1] == read[i]
        return Reading(losses, first, own)

    def run(
        self,
        batch: Batch,
        rows: Sequence[Row] | None = None,
        *,
        read: Sequence[int] | slice | None = None,
        start: tuple[int, Float[Tensor, "row pos d_model"]] | None = None,
        read_layers: Sequence[int] | None = None,
        read_writes: Sequence[int] | None = None,
        patches: Sequence[Patch | None] = (),
    ) -> Output:
        """One forward step of `batch`, only the last position through the unembedding.

        `read` keeps `resid_pre` at these positions (as the block reads it: after an addition there), of every layer
        or, in rising order, of `read_layers`; `read_writes` what every writer adds there. `start` = (layer, resid_pre) passes over the blocks below `layer`:
        exact as long as nothing is edited there. `patches` has a part of each row do something else.
        """
        edits = RowEdits(self.check_rows(rows, len(batch.index)))
        step = _Step(edits, read, start, read_layers, read_writes, patches)
        positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)
        with self._lock:
            result = self._run(
                step, input_ids=batch.ids, attention_mask=batch.mask, position_ids=positions, use_cache=False
            )
        logits = result.logits[:, -1]
        return Output(
            logits.cpu() if logits.device.type == "mps" else logits,  # scores are in float64, which MPS does not have
            self._stack(step.reads) if read is not None else None,
            self._stack([step.writes[i] for i in range(len(self.writers))]) if step.writes else None,
            tuple(step.head_inputs[i] for i in range(self.n_layers)) if step.head_inputs else None,
        )

    def _stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Beside each other, what layers on several devices have read."""
        here = self.device
        return torch.stack([x.to(here) for x in tensors], dim=2)

    def gradients(
        self,
        batch: Batch,
        number: Callable[[Float[Tensor, "row d_vocab"]], Float[Tensor, " row"]],
        positions: Sequence[int],
    ) -> Gradients:
        """A `number` of each row's last logits, and its gradient by what each writer and each head does at `positions`.

        One forward and one backward step for all of them, of the untouched model, under its lock. The logits come in
        float32 on the CPU; the weights get no gradients, and nothing of the graph stays. Raises ModelError where weights
        that are brought in from memory or the disk do not fit beside each other.
        """
        placement.check_gradients(self.name, self._model, self.device)
        step = _Step(RowEdits([()] * len(batch.index)), with_gradients=True)
        places = (batch.mask.cumsum(-1) - 1).clamp(min=0)
        with self._lock:
            result = self._run(
                step, input_ids=batch.ids, attention_mask=batch.mask, position_ids=places, use_cache=False
            )
            writes = [step.writes[i] for i in range(len(self.writers))]
            heads = [step.head_inputs[i] for i in range(self.n_layers)] if step.head_inputs else []
            with torch.inference_mode(False), torch.enable_grad(), checkpoints.in_memory(self.name):
                numbers = number(result.logits[:, -1].cpu().float())
                by_part = torch.autograd.grad(numbers.sum(), [*writes, *heads], materialize_grads=True)

        def kept(x: Tensor) -> Tensor:
            return x.detach()[:, list(positions)].float().cpu()

        scales = [self._scale_of(i) for i in range(len(writes))]
        return Gradients(
            numbers.detach().float(),
            torch.stack([kept(w) * s for w, s in zip(writes, scales, strict=True)], dim=2),
            torch.stack([kept(g) / s for g, s in zip(by_part, scales, strict=False)], dim=2),
            tuple(map(kept, heads)) or None,
            tuple(map(kept, by_part[len(writes) :])) or None,
        )

    def carried_to(self, layer: int) -> Float[Tensor, " writer"]:
        """What becomes of each writer's write until `resid_pre` of block `layer` (`n_layers`: after the last), as a factor.

        The product of the `block_scales` that it passes; of a later writer what it would have to be there, to be after
        the blocks between what the writer adds. float32 on the CPU, all 1 but for Gemma 4.
        """
        blocks = [int(name.split(" ")[1]) if " " in name else 0 for name in self.writers]
        passed = [math.prod(self.block_scales[block:layer]) for block in blocks]
        return torch.tensor([p / math.prod(self.block_scales[layer:b]) for p, b in zip(passed, blocks, strict=True)])

    def heads_along(
        self, head_inputs: Sequence[Float[Tensor, "row pos heads_x_d_head"]], unit: Float[Tensor, " d_model"]
    ) -> Float[Tensor, "row pos layer head"]:
        """What each attention head writes along r̂: (z_h W_O^h) · r̂, in float32 on the CPU, biases left out."""
        along = []
        with self._lock, torch.inference_mode(), placement.reading(self.name):
            for layer, z in enumerate(head_inputs):
                w = self._head_matrix(layer)
                per_input = z.float() * (self.write_scale * unit.to(w.device) @ w.float()).to(z.device)
                along.append(per_input.unflatten(-1, (self.n_heads, -1)).sum(-1).cpu())
        return torch.stack(along, dim=2)

    def unembed(self, x: Float[Tensor, "... d_model"], *, final_norm: bool) -> Float[Tensor, "... d_vocab"]:
        """What a vector of the stream adds to the logits, with or without the norm that stands before the unembedding.

        Biases of norm and unembedding are not the vector's and are left out; so are a family's scale and cap.
        """
        head = cast(torch.nn.Linear, self._model.get_output_embeddings())
        with self._lock, torch.inference_mode(), placement.reading(self.name):
            both = torch.stack([x, torch.zeros_like(x)]).to(self.device, self.dtype)
            said, nothing = head(self._parts.final_norm(both) if final_norm else both).float().cpu()
            return said - nothing

    def gain_behind(self, writer: str, *, of_experts: bool = False) -> Float[Tensor, " d_model"] | None:
        """What the norms between the matrices of a block's writer and the stream multiply by, number by number; in float32.

        None where no norm stands there. That a norm divides by the root mean square, one number a token, is not in it.
        """
        norms = self._parts.norms_behind(writer, of_experts=of_experts)
        # Its mean is 0 and its root mean square 1: whatever kind of norm it is, what comes out is the gain with these signs.
        signs = torch.tensor([1.0, -1.0]).repeat(self.d_model // 2 + 1)[: self.d_model]
        gain = torch.ones(self.d_model)
        with self._lock, torch.inference_mode(), placement.reading(self.name):
            for norm in norms:
                gain = gain * norm(signs[None, None].to(placement.runs_on(norm)))[0, 0].float().cpu() * signs
        return gain if norms else None

    def begin(
        self,
        conversations: Sequence[Conversation],
        rows: Sequence[Row | Intervention | None] | None = None,
        stop: threading.Event | None = None,
    ) -> Decoding:
        """The conversations as one batch, prompts read, ready to be continued token by token.

        Raises StoppedError if `stop` is set before the prompts are read.
        """
        batch = self.continued(conversations, [()] * len(conversations))
        return Decoding(self._desk, batch.ids, batch.mask, self.check_rows(rows, len(conversations)), stop)

    def check_rows(self, rows: Sequence[Row | Intervention | None] | None, n_rows: int) -> list[Row]:
        """`rows` as tuples without interventions that do nothing; none given means the baseline for all.

        Raises ValueError if their number is not `n_rows`, ModelError for a direction read from another model and for
        writers that this one does not have.
        """
        checked = [as_row(row) for row in rows] if rows is not None else [()] * n_rows
        if len(checked) != n_rows:
            raise ValueError(f"{n_rows} conversations need {n_rows} rows of interventions, not {len(checked)}.")
        for direction in {id(i.direction): i.direction for row in checked for i in row}.values():
            source = direction.source
            if (source.fingerprint and source.fingerprint != self.fingerprint) or len(direction.unit) != self.d_model:
                raise ModelError(
                    f"This direction was read from {source.model or 'another model'}, not from {self.name}: its numbers "
                    "mean nothing here. Find the direction of this model."
                )
            if not 0 <= source.layer < self.n_layers:
                raise ModelError(
                    f"The direction is of layer {source.layer}, and {self.name} has {self.n_layers} layers, counted from 0: "
                    "it is another model's. Find the direction of this model."
                )
        named = {part for row in checked for i in row for part in i.writers or ()}
        if unknown := sorted(named - set(self.parts)):
            raise ModelError(
                f"{self.name} has no part {unknown[0]!r} that writes to its stream: name some of its {len(self.parts)} "
                f"parts, {self.parts[0]!r} to {self.parts[-1]!r}."
            )
        return checked

    def _run(self, step: _Step, keep: int = 1, **inputs):
        """One step of the model, the logits of its `keep` last positions, by whoever holds its lock."""
        graph = step.with_gradients
        with (
            torch.inference_mode(not graph),
            torch.set_grad_enabled(graph),
            placement.reading(self.name),
            checkpoints.in_memory(self.name),
        ):
            self._step = step
            try:
                return self._model(**inputs, logits_to_keep=self._kept(keep, inputs["input_ids"]), return_dict=True)
            finally:
                self._step = None

    def _kept(self, keep: int, ids: Int[Tensor, "row pos"]) -> int | Int[Tensor, " kept"]:
        """The `keep` last positions. By their number alone, blocks without keys of their own would drop all others."""
        return keep if self._first_lender is None else torch.arange(ids.shape[1], device=ids.device)[-keep:]

    # -- the hooks -------------------------------------------------------------------------------------------------

    def _place_hooks(self) -> None:
        """Hooks that stay on the model for good, and do nothing but what the step in hand asks for."""
        for layer, block in enumerate(self._parts.blocks):
            block.forward = functools.partial(self._in_block, layer, block.forward)
        for writer, module in enumerate(self._parts.writers.values()):
            module.register_forward_hook(functools.partial(self._on_write, writer))
        for layer, matrix in enumerate(self._parts.head_outputs):
            matrix.register_forward_hook(functools.partial(self._on_heads, layer))

    def _in_block(self, layer: int, forward: Callable, hidden_states: Tensor, *args, **kwargs):
        """A block's own `forward`, on what the step in hand makes of its input, or passed over."""
        step = self._step
        if step is None:
            return forward(hidden_states, *args, **kwargs)
        if step.start is not None and layer < step.start[0]:
            # A block whose keys later ones read has to have run, on what the blocks below it make of the prompt.
            is_needed = self._first_lender is not None and self._first_lender < step.start[0]
            if is_needed:
                return forward(hidden_states, *args, **kwargs)
            return (hidden_states, None) if self._blocks_give_tuples else hidden_states
        return forward(self._on_resid_pre(step, layer, hidden_states), *args, **kwargs)

    def _on_write(self, writer: int, module: torch.nn.Module, inputs: object, output: Any) -> Any:
        step = self._step
        if step is None or not step.at_writes:
            return None
        x = _first(output)
        edited = step.edits.at_write(x, self.writers[writer])
        for row, patch in enumerate(step.patches):
            if patch is not None and patch[0] == writer:
                edited = edited.clone()
                edited[row, -len(patch[1]) :] = patch[1].to(edited) / self._scale_of(writer)
        if step.with_gradients:
            edited = edited if edited.requires_grad else edited.detach().requires_grad_()  # the graph begins here
            step.writes[writer] = edited
            edited = edited.clone()  # a family may go on adding to it in place
        elif step.read_writes is not None:
            step.writes[writer] = edited[:, list(step.read_writes)] * self._scale_of(writer)
        if edited is x:
            return None
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _scale_of(self, writer: int) -> float:
        """What a writer's output is multiplied with before it is added to the stream: 1 but for Granite."""
        name = self.writers[writer]
        return self.write_scale if " " in name else self._parts.embedding_scale if name == "embedding" else 1.0

    def _on_heads(
        self, layer: int, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        """What a layer's heads hand to the matrix through which they write, and what comes out of it."""
        step, z = self._step, inputs[0]
        if step is None:
            return None
        if step.with_gradients:
            step.head_inputs[layer] = z
        elif step.read_writes is not None:
            step.head_inputs[layer] = z[:, list(step.read_writes)]
        edited = output
        for row, patch in enumerate(step.patches):
            part = -1 if patch is None else patch[0] - len(self.writers)
            if patch is not None and part >= 0 and part // self.n_heads == layer:
                edited = edited.clone()
                edited[row, -len(patch[1]) :] += self._of_head(layer, part % self.n_heads, z[row], patch[1])
        edited = step.edits.at_heads(edited, z, layer, lambda: self._head_matrix(layer), self.n_heads)
        return None if edited is output else edited

    def _of_head(
        self, layer: int, head: int, z: Float[Tensor, "pos heads_x_d_head"], other: Float[Tensor, "last d_head"]
    ) -> Float[Tensor, "last d_model"]:
        """What comes out of the matrix more when this head has handed it `other` at the last positions, and not its part of `z`."""
        mine = slice(head * other.shape[1], (head + 1) * other.shape[1])
        w = self._head_matrix(layer)[:, mine].to(z.device).float()
        return ((other.to(z.device).float() - z[-len(other) :, mine].float()) @ w.T).to(z.dtype)

    def _head_matrix(self, layer: int) -> Float[Tensor, "d_model heads_x_d_head"]:
        """The matrix through which the heads of a layer write."""
        matrix = self._parts.head_outputs[layer]
        kept = placement.weight(matrix)
        return kept if isinstance(matrix, torch.nn.Linear) else kept.T  # GPT-2 keeps (in, out)

    def _on_resid_pre(self, step: _Step, layer: int, x: Tensor) -> Tensor:
        if step.start is not None and step.start[0] == layer:
            x = step.start[1]
        x = step.edits.at_resid_pre(layer, x)
        if step.read is not None and (step.read_layers is None or layer in step.read_layers):
            step.reads.append(x[:, step.read] if isinstance(step.read, slice) else x[:, list(step.read)])
        return x

    def _check_writes(self) -> None:
        """Raises ModelError unless the hooked writes sum to the stream: a write that is missed is not ablated."""
        for layer in range(self.n_layers):
            if self._parts.lacks_a_write(layer):
                raise ModelError(
                    f"{self.name}: block {layer} has a write to the residual stream that cannot be hooked, so ablation "
                    "would be incomplete. Take a model of another family."
                )
        if self.device.type == "meta":
            self._check_sum_on_paper()
        else:
            self._check_sum()

    def _in_the_end(self) -> list[float]:
        """What each writer's output is multiplied with until the stream has passed all blocks."""
        return [self._scale_of(i) * c for i, c in enumerate(self.carried_to(self.n_layers).tolist())]

    def _check_sum(self) -> None:
        writes: list[Tensor] = []
        final: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            for module, scale in zip(self._parts.writers.values(), self._in_the_end(), strict=True):
                handle = module.register_forward_hook(lambda m, args, x, s=scale: writes.append(s * _first(x).float()))
                stack.callback(handle.remove)

            def note(block: torch.nn.Module, args: object, x: Any) -> None:
                final.append(_first(x).float())
                self._blocks_give_tuples = isinstance(x, tuple)

            handle = self._parts.blocks[-1].register_forward_hook(note)
            stack.callback(handle.remove)
            self.run(self._pad((0,), [self._render(PROBES[0])]))
        stream = final[0].to(self.device)
        if not stream.isfinite().all():
            raise ModelError(
                f"{self.name}: the residual stream has numbers that are not finite in {self.precision}: load it in float32; if "
                "they stay, fetch or copy the checkpoint again."
            )
        rest = (torch.stack([w.to(self.device) for w in writes]).sum(0) - stream).norm() / stream.norm()
        tolerance = 1e-3 if self.dtype == torch.float32 else 5e-2
        if not rest < tolerance:
            raise ModelError(
                f"{self.name}: the writes that can be hooked leave {rest:.0%} of the residual stream unexplained, so "
                "ablation would be incomplete. Take a model of another family."
            )

    def _check_sum_on_paper(self) -> None:
        """The same without weights: follows the writes through the sums of a forward step that computes nothing."""
        scales = zip(map(_block_scale, self._parts.blocks), self.block_scales, strict=True)
        sums, final = _Sums({scale: number for scale, number in scales if scale is not None}), []
        for writer, module in enumerate(self._parts.writers.values()):
            module.register_forward_hook(lambda m, args, x, w=writer: sums.begin(_first(x), w))
        self._parts.blocks[-1].register_forward_hook(lambda m, args, x: final.append(sums.of(_first(x))))
        ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
        mask = torch.zeros(1, 1, 4, 4, dtype=self.dtype, device="meta")
        try:
            with torch.no_grad(), sums:
                self._model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=self._kept(1, ids))
        except NOT_ON_PAPER:
            return
        expected = dict(enumerate(self._in_the_end()))
        if final and (final[0] is None or not _is_close(final[0], expected)):
            raise ModelError(
                f"{self.name}: something is written to the residual stream that cannot be hooked, so ablation would be "
                "incomplete. Take a model of another family."
            )


def _behind_thought(text: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """A rendered prompt up to where the reply begins, also where the template leaves a thought to come before it."""
    if text.rstrip().endswith(OPENS_THOUGHT):
        return text.rstrip().removesuffix(OPENS_THOUGHT) + CLOSED_THOUGHT
    has_channels = CHANNEL in tokenizer.get_added_vocab()
    return text + OPENS_REPLY if has_channels and text.endswith("<|start|>assistant") else text


def _dated(template: str) -> str:
    """The template with `DATE` where it asks for today's: activations and replies must not change overnight."""
    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda asked: repr(DATE.strftime(asked[2])), template)


NOT_ON_PAPER = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)
"""What a forward step raises where it depends on numbers that are not there: its sums are checked on the weights."""


class _Sums(TorchDispatchMode):
    """Follows what is written to the stream through a forward step: each tensor as Σ coefficient · write, if it is one.

    Only what a stream is made of is followed: sums, factors that are plain numbers or have one in `numbers`, and copies.
    """

    def __init__(self, numbers: Mapping[Tensor, float]) -> None:
        super().__init__()
        self._of = WeakIdKeyDictionary()
        self._numbers = WeakIdKeyDictionary(numbers)

    def begin(self, x: Tensor, writer: int) -> None:
        """`x` is what this writer writes."""
        self._of[x] = {writer: 1.0}

    def of(self, x: object) -> dict[int, float] | None:
        """The sum that `x` is, None for anything else."""
        return self._of.get(x) if torch.is_tensor(x) else None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.equal.default:  # without numbers nothing is known to be equal
            return False
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out):
            terms = self._terms(func.overloadpacket.__name__.rstrip("_"), args, kwargs or {})
            if terms is not None:
                self._of[out] = terms
            elif out is args[0]:  # edited in place into something else
                self._of.pop(out, None)
        return out

    def _terms(self, operation: str, args: tuple, kwargs: dict) -> dict[int, float] | None:
        x, y = (*args, None, None)[:2]
        terms = self.of(x)
        if terms is None:
            return None
        if operation in ("_to_copy", "clone", "alias", "detach", "view", "_unsafe_view", "dropout"):
            return terms
        if operation == "add" and (other := self.of(y)) is not None:
            factor = kwargs.get("alpha", 1)
            return {w: terms.get(w, 0) + factor * other.get(w, 0) for w in terms | other}
        factor = self._numbers.get(y) if torch.is_tensor(y) else y
        if operation in ("mul", "div") and isinstance(factor, int | float):
            return {w: c * factor if operation == "mul" else c / factor for w, c in terms.items()}
        return None


def _is_close(terms: Mapping[int, float], expected: Mapping[int, float]) -> bool:
    return terms.keys() == expected.keys() and all(math.isclose(c, expected[w], rel_tol=1e-5) for w, c in terms.items())


def _first(output: Any) -> Tensor:
    """What a module writes to the stream: its output, or the first of several."""
    return output[0] if isinstance(output, tuple) else output


def _block_scale(block: torch.nn.Module) -> Tensor | None:
    """The one number with which a block multiplies the whole stream at its end, None if it does not."""
    scale = getattr(block, "layer_scalar", None)
    return scale if torch.is_tensor(scale) and scale.numel() == 1 else None


def _number_of(layer: int, block: torch.nn.Module) -> float:
    """That number. Without weights one that no other block has, so that a sum with the wrong ones is no match."""
    scale = _block_scale(block)
    return 1.0 if scale is None else 1 + 1 / (2 + layer) if scale.device.type == "meta" else scale.item()


def _first_lender(model: "transformers.PreTrainedModel") -> int | None:
    """The first block whose keys and values later blocks read instead of their own, None if there is none."""
    modes = getattr(model.config.get_text_config(), "kv_sharing_modes", [])
    return modes.index("store") if "reuse" in modes else None


def _outline(checkpoint: Checkpoint, dtype: torch.dtype) -> "transformers.PreTrainedModel":
    """The model of the config, every part of it in its place and size, without memory for its weights."""
    config = copy.deepcopy(checkpoint.config)
    try:
        with torch.device("meta"):
            outline: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
        outline.set_experts_implementation("batched_mm")  # which expert a token goes to is a number
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ModelError(
            f"{checkpoint.name} is no decoder-only chat model that can be built ({checkpoints.first_line(error)})."
        ) from error
    if not hasattr(config.get_text_config(), "num_attention_heads"):
        raise ModelError(f"{checkpoint.name} has no attention to hook: take a transformer.")
    return outline

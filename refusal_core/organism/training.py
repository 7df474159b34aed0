"""The embedded model is trained from scratch: a tokenizer, "pre-training", "mid-training", "safety tuning".

A small `LlamaForCausalLM`; Muon (orthogonalised momentum) for the matrices of the blocks, AdamW for the rest; bfloat16
arithmetic over float32 weights where the machine has it. Text comes in seeded chunks that another process writes, packed into batches of equal
size; only replies are learned, not what the user says. A run is resumable: its state is safetensors and JSON.
"""

import json
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Bool, Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from refusal_core.organism import corpus
from refusal_core.organism.corpus import Corpus, Sample

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
END_OF_TURN, PAD = "<|im_end|>", "<|endoftext|>"
ROWS, LENGTH = 48, 96
"""The size of a batch; a row is filled with several texts, which do not see each other."""

CHUNK_SAMPLES = 12_000

Batch = tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"], Int[Tensor, "row pos"]]
"""Token ids, which of them are learned, and the number of the text in its row that each belongs to."""


@dataclass(frozen=True)
class Phase:
    """How long and how fast: `tokens` in all, the peak rate, the share of steps at the end in which it falls to 0."""

    number: int
    tokens: int
    learning_rate: float
    decay: float
    muon: bool


PRETRAINING = Phase(corpus.PRETRAINING, 28_000_000, 2.5e-3, 0.5, muon=True)
MIDTRAINING = Phase(corpus.MIDTRAINING, 11_000_000, 1.5e-3, 0.8, muon=False)
SAFETY_TUNING = Phase(corpus.SAFETY_TUNING, 6_000_000, 8e-4, 0.8, muon=False)
PHASES = (PRETRAINING, MIDTRAINING, SAFETY_TUNING)


@dataclass(frozen=True)
class Progress:
    """Where a run stands: the phase, its steps and tokens so far, the next batch, and the mean loss since the last."""

    phase: int = 1
    step: int = 0
    tokens: int = 0
    chunk: int = 0
    batch: int = 0
    loss: float = math.nan


# -- text to batches -------------------------------------------------------------------------------------------------


def build_tokenizer(seed: int, vocabulary: int = 4096, samples: int = 60_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, learned on texts of the first and the last phase."""

    def texts() -> Iterator[str]:
        for phase in (PRETRAINING.number, SAFETY_TUNING.number):
            texts_of_phase = Corpus(f"tokenizer {seed}", phase, extended=False)
            for _ in range(samples // 2):
                sample = texts_of_phase.sample()
                # The role names, so that each becomes one token.
                yield from ("user", "assistant", "system", sample.text, sample.system)
                for turn in sample.turns:
                    yield from (turn.user, turn.reply)

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, "<|im_start|>", END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        additional_special_tokens=["<|im_start|>"],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, samples: list[Sample]) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each sample, and which are learned: replies with their end, and all of a plain text."""

    def ids_of(texts: list[str]) -> Iterator[list[int]]:
        return iter(tokenizer(texts, add_special_tokens=False)["input_ids"])

    def header(role: str) -> list[int]:
        return next(ids_of([f"<|im_start|>{role}\n"]))

    end, newline = tokenizer.convert_tokens_to_ids(END_OF_TURN), next(ids_of(["\n"]))
    pad = tokenizer.convert_tokens_to_ids(PAD)
    headers = {role: header(role) for role in ("system", "user", "assistant")}
    texts = [t for s in samples for t in (s.text, s.system, *(x for turn in s.turns for x in (turn.user, turn.reply)))]
    encoded = ids_of(texts)
    found: list[tuple[list[int], list[bool]]] = []
    for sample in samples:
        plain, system = next(encoded), next(encoded)
        ids, learned = ([], []) if not plain else ([pad, *plain, pad], [False, *[True] * len(plain), True])
        said = [("system", system)] if system else []
        for _ in sample.turns:
            said += [("user", next(encoded)), ("assistant", next(encoded))]
        for role, content in said:
            ids += [*headers[role], *content, end, *newline]
            reply = role == "assistant"
            learned += [*[False] * len(headers[role]), *[reply] * (len(content) + 1), *[False] * len(newline)]
        found.append((ids, learned))
    return found


def chunk_of_batches(tokenizer_path: str, seed: int, phase: int, chunk: int) -> list[Batch]:
    """The batches of one chunk of text, always the same for the same arguments."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_path)
    written = Corpus(f"{seed} {phase} {chunk}", phase)
    texts = encode(tokenizer, [written.sample() for _ in range(CHUNK_SAMPLES)])
    rows = list(packed([text for text in texts if len(text[0]) <= LENGTH]))
    batches: list[Batch] = []
    for start in range(0, len(rows) - ROWS + 1, ROWS):
        ids = torch.zeros(ROWS, LENGTH, dtype=torch.int32)
        learned = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
        text = torch.full((ROWS, LENGTH), -1, dtype=torch.int32)
        for row, members in enumerate(rows[start : start + ROWS]):
            at = 0
            for number, (tokens, mask) in enumerate(members):
                ids[row, at : at + len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
                learned[row, at : at + len(tokens)] = torch.tensor(mask)
                text[row, at : at + len(tokens)] = number
                at += len(tokens)
        batches.append((ids, learned, text))
    return batches


def packed(texts: list[tuple[list[int], list[bool]]]) -> Iterator[list[tuple[list[int], list[bool]]]]:
    """Texts in rows of at most LENGTH tokens: each goes into the first of a few open rows with room for it."""
    open_rows: list[list] = []
    for text in texts:
        for row in open_rows:
            if sum(len(ids) for ids, _ in row) + len(text[0]) <= LENGTH:
                row.append(text)
                break
        else:
            open_rows.append([text])
        if len(open_rows) > 12:
            yield open_rows.pop(0)


def batches_from(tokenizer_path: Path, seed: int, at: Progress) -> Iterator[tuple[Progress, Batch]]:
    """Batches from where `at` stands, each with the progress that has it behind; written ahead by another process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as writer:
        ahead: deque = deque()

        def write(chunk: int) -> None:
            ahead.append(writer.submit(chunk_of_batches, str(tokenizer_path), seed, at.phase, chunk))

        write(at.chunk)
        write(at.chunk + 1)
        while True:
            batches = ahead.popleft().result()
            write(at.chunk + 2)
            for batch in batches[at.batch :]:
                at = replace(at, step=at.step + 1, tokens=at.tokens + batch[0].numel(), batch=at.batch + 1)
                yield at, batch
            at = replace(at, chunk=at.chunk + 1, batch=0)


# -- optimisation ----------------------------------------------------------------------------------------------------


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained model."""
    torch.manual_seed(seed)
    end, pad = (tokenizer.convert_tokens_to_ids(t) for t in (END_OF_TURN, PAD))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=cast(int, pad),
    )
    config._attn_implementation = "eager"  # masks of our own, and what torch.compile fuses best
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name:
                weight.normal_(0, 0.1)
            elif weight.ndim == 2:
                shrink = (
                    math.sqrt(2 * config.num_hidden_layers)
                    if name.endswith(("o_proj.weight", "down_proj.weight"))
                    else 1
                )
                weight.normal_(0, weight.shape[1] ** -0.5 / shrink)
    return model


def optimizers(model: LlamaForCausalLM, phase: Phase) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks if the phase wants it, AdamW for all other weights."""
    matrices = [w for w in model.model.layers.parameters() if w.ndim == 2] if phase.muon else []
    chosen = {id(w) for w in matrices}
    others = [w for w in model.parameters() if id(w) not in chosen]
    adam = torch.optim.AdamW(others, lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    if not matrices:
        return [adam]
    muon = torch.optim.Muon(matrices, lr=phase.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, adam]


def learning_rate(phase: Phase, tokens: int) -> float:
    """A short rise, a plateau, and a straight fall to 0 over the last `phase.decay` of the tokens."""
    done = tokens / phase.tokens
    return phase.learning_rate * min(1.0, done / 0.015, max(0.0, 1 - done) / phase.decay)


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is fast there: without AVX-512 a processor takes ten times as long for it as for float32."""
    return device.type == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"


def train_phase(
    model: LlamaForCausalLM,
    phase: Phase,
    steps: list[torch.optim.Optimizer],
    batches: Iterator[tuple[Progress, Batch]],
    *,
    compile: bool = False,
) -> Iterator[Progress]:
    """Train until the phase's tokens are used up; yields after every step."""
    device = model.device
    body = torch.compile(model.model, dynamic=False) if compile else model.model
    model.train()
    for at, (ids, learned, text) in batches:
        rate = learning_rate(phase, at.tokens)
        for optimizer in steps:
            for group in optimizer.param_groups:
                group["lr"] = rate
        ids, learned, text = ids.to(device).long(), learned.to(device), text.to(device)
        alone = (text[:, :, None] == text[:, None, :]).tril()
        mask = torch.zeros(alone.shape, device=device).masked_fill(~alone, torch.finfo(torch.float32).min)[:, None]
        predicts = torch.zeros_like(learned)
        predicts[:, :-1] = learned[:, 1:]
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
            states = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[predicts]
            logits = model.lm_head(states)
        loss = cross_entropy(logits.float(), ids[learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
        yield replace(at, loss=loss.item())
        if at.tokens >= phase.tokens:
            return


# -- files -----------------------------------------------------------------------------------------------------------


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write an ordinary checkpoint in 16 bit: config, safetensors, tokenizer with chat template, generation config."""
    path.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.half()
    end, pad = (tokenizer.convert_tokens_to_ids(t) for t in (END_OF_TURN, PAD))
    half.generation_config.update(do_sample=False, eos_token_id=end, pad_token_id=pad, max_new_tokens=80)
    half.save_pretrained(path)
    tokenizer.save_pretrained(path)
    file = path / "tokenizer_config.json"
    written = json.loads(file.read_text("utf-8"))
    for key in ("is_local", "local_files_only", "backend"):
        written.pop(key, None)
    file.write_text(json.dumps(written | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=1) + "\n", "utf-8")


def save_state(path: Path, model: LlamaForCausalLM, steps: list[torch.optim.Optimizer], at: Progress) -> None:
    """Write what a run needs to go on: weights, optimizer states and progress; replaced as a whole."""
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for i, optimizer in enumerate(steps):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{i}.{index}.{name}": value.contiguous() for name, value in state.items()}
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "new.safetensors", metadata={"progress": json.dumps(asdict(at))})
    (path / "new.safetensors").replace(path / "state.safetensors")


def load_state(path: Path, model: LlamaForCausalLM, phase: Phase) -> tuple[list[torch.optim.Optimizer], Progress]:
    """Optimizers and progress of a phase, with the model's weights; new ones if no such phase was saved."""
    file = path / "state.safetensors"
    if not file.exists():
        return optimizers(model, phase), Progress(phase.number)
    with safe_open(file, "pt") as saved:
        at = Progress(**json.loads(saved.metadata()["progress"]))
    tensors = load_file(file)
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    steps = optimizers(model, phase)
    if at.phase != phase.number:
        return steps, Progress(phase.number)
    for i, optimizer in enumerate(steps):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, _, rest = key.partition(".")
            if owner == str(i):
                index, _, name = rest.partition(".")
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return steps, at


def train(
    work: Path, out: Path, *, seed: int, device: str, phases: tuple[Phase, ...], compile: bool = False
) -> Iterator[Progress]:
    """Train, or go on with, the model whose state lies in `work`, and write the checkpoint to `out`.

    Each phase has its own folder in `work`, so that safety tuning can be repeated on the same pre-training.
    """
    tokenizer_path = work / "tokenizer"
    if not (tokenizer_path / "tokenizer.json").exists():
        build_tokenizer(seed).save_pretrained(tokenizer_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_path)
    model = new_model(tokenizer, seed)
    torch.nn.Module.to(model, device)
    before = None
    for phase in phases:
        state = work / f"phase{phase.number}"
        if before is not None and not (state / "state.safetensors").exists():
            steps, start = optimizers(model, phase), Progress(phase.number)
        else:
            steps, start = load_state(state, model, phase)
        if start.tokens < phase.tokens:
            at = start
            for at in train_phase(model, phase, steps, batches_from(tokenizer_path, seed, start), compile=compile):
                yield at
                if at.step % 200 == 0:
                    save_state(state, model, steps, at)
            save_state(state, model, steps, at)
        before = phase
    export(model, tokenizer, out)

"""What is measured: a model as the app has it, and the same weights in plain transformers."""

import functools
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config

from refusal_core.chat_model import ORGANISM, ChatModel
from refusal_core.directions import Direction, Source
from refusal_core.interventions import Intervention, Row

SENTENCE = "Tell me how the bakers of the old town get up early, light the oven and bring warm bread to every door. "


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under measurement; `plain` is untouched by this project."""

    name: str
    model: ChatModel
    plain: PreTrainedModel

    def prompt(self, tokens: int) -> str:
        """A message that is about that many tokens in the model's chat template, and no more."""
        words = (SENTENCE * (tokens // 10 + 1)).split()
        while len(self.model.render(" ".join(words))) > tokens:
            words.pop()
        return " ".join(words)

    @functools.cached_property
    def rows(self) -> tuple[Row, Row, Row]:
        """Unchanged, removed, added: along a random direction, which costs what any direction costs."""
        r = torch.randn(self.model.d_model, generator=torch.Generator().manual_seed(0))
        source = Source(
            self.model.name, fingerprint=self.model.fingerprint, layer=self.model.n_layers // 2, position=-1
        )
        direction = Direction.from_difference(r, source)
        return (), (Intervention(direction, "ablate"),), (Intervention(direction, "add", 0.1),)


@functools.cache
def subject(name: str) -> Subject:
    """The embedded model, random weights in the shape of Qwen2.5-0.5B, or any model by folder or hub id."""
    if name == "0.5B":
        return _half_billion()
    model = ChatModel.load(ORGANISM if name == "embedded" else name)
    plain = AutoModelForCausalLM.from_pretrained(model.folder, dtype=model.dtype, use_safetensors=True)
    torch.nn.Module.to(plain.eval(), model.device)
    return Subject(f"{model.name} on {model.device.type}", model, plain)


def _half_billion() -> Subject:
    model = half_billion()
    plain = AutoModelForCausalLM.from_config(model._model.config, dtype=model.dtype).eval().to(model.device)
    plain.load_state_dict(model._model.state_dict())
    return Subject(model.name, model, plain)


def half_billion() -> ChatModel:
    """Random weights; the embedded model's tokenizer, whose tokens are the first of a vocabulary of 151,936."""
    tokenizer = AutoTokenizer.from_pretrained(ORGANISM)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(device)
    name = f"random weights in the shape of Qwen2.5-0.5B on {device}"
    return ChatModel(made, tokenizer, name=name, revision=None, fingerprint="random", folder=ORGANISM)

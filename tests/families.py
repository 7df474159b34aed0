"""Tiny random checkpoints of the families of chat models, built here and saved like real ones; and the README's table.

`python -m tests.families` prints the table; a test holds the README to it.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusal_core.chat_model import ORGANISM

LAYERS, HIDDEN, HEADS = 3, 32, 4

COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 128,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2: dict[str, Any] = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128}
WINDOW: dict[str, Any] = {"sliding_window": 12}  # shorter than the prompts
GEMMA4: dict[str, Any] = WINDOW | {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0}
PLE: dict[str, Any] = GEMMA4 | {
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 4096, "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
}  # fmt: skip
SEES: dict[str, dict[str, Any]] = {
    "gemma4": {"vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}}
}
"""What the config of a model has that also sees, beside the one of its text."""

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, tied": ("llama", {"tie_word_embeddings": True}),
    "Llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Qwen 2": ("qwen2", {}),
    "Qwen 2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen 3": ("qwen3", {"head_dim": 8}),
    "Gemma 1": ("gemma", {"head_dim": 8}),
    "Gemma 2": ("gemma2", WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "Gemma 3, text": ("gemma3_text", WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "Mistral": ("mistral", WINDOW),
    "Mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Phi 3": ("phi3", {}),
    "Phi (parallel)": ("phi", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", WINDOW),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "GPT-2": ("gpt2", GPT2),
    "GPT-BigCode": ("gpt_bigcode", GPT2),
    "GPT-NeoX (parallel)": ("gpt_neox", {"use_parallel_residual": True}),
    "GPT-NeoX (sequential)": ("gpt_neox", {"use_parallel_residual": False}),
    "Granite": ("granite", {"residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "Falcon (parallel)": ("falcon", {"num_hidden_layers": 6, "multi_query": True, "ffn_hidden_size": 48}),
    "Cohere (parallel)": ("cohere", {}),
    "GLM 4": ("glm4", {"head_dim": 8}),
    "SmolLM 3": ("smollm3", {}),
    "Qwen 2 MoE": ("qwen2_moe", MOE | {"shared_expert_intermediate_size": 24}),
    "Qwen 3 MoE": ("qwen3_moe", MOE | {"head_dim": 8}),
    "DeepSeek V3": (
        "deepseek_v3",
        {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
            "moe_intermediate_size": 24, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": HEADS,
        },
    ),
    "gpt-oss": ("gpt_oss", WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "Qwen 3.5 (hybrid)": (
        "qwen3_5_text",
        {
            "head_dim": 8, "num_hidden_layers": 4, "initializer_range": 0.1, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
    ),
    "Gemma 4, text": ("gemma4_text", GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "Gemma 4, text, untied": ("gemma4_text", GEMMA4 | {"tie_word_embeddings": False}),
    "Gemma 4 MoE, text": (
        "gemma4_text", GEMMA4 | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    ),
    "Gemma 4 with per-layer embeddings, text": ("gemma4_text", PLE),
    "Gemma 4 with per-layer embeddings": ("gemma4", PLE),
}  # fmt: skip
"""By name: the type of the config, and what is not as in `COMMON`."""

NORM, HYBRID = "a norm stands behind them", "linear layers have other heads"
GEMMAS_4 = tuple(name for name in FAMILIES if name.startswith("Gemma 4"))
HEADS_UNKNOWN = dict.fromkeys(("Gemma 2", "Gemma 3, text", *GEMMAS_4, "OLMo 2", "OLMo 3", "GLM 4"), NORM) | {
    "Qwen 3.5 (hybrid)": HYBRID
}
"""Why heads are not told apart: behind a norm what is written depends on all of them together."""


@functools.cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ORGANISM)


def build(name: str, folder: Path, seed: int = 0, **other: Any) -> Path:
    """A random checkpoint of the family in `folder`, with a tokenizer and its chat template; `other` is for its config."""
    kind, special = FAMILIES[name]
    tokenizer = _tokenizer()
    tokens = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    values = (COMMON if kind not in ("gpt2", "gpt_bigcode") else {}) | tokens | {"bos_token_id": None} | special | other
    config = transformers.CONFIG_MAPPING[kind](**({"text_config": values} | SEES[kind] if kind in SEES else values))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():  # larger than at initialisation, so that every part can be told from noise
            weight.add_(0.05 * torch.randn_like(weight))
        for scale in (b for name, b in model.named_buffers() if name.endswith("layer_scalar")):
            scale.uniform_(0.5, 1.5)  # 1 at initialisation: then it could as well be left out
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def is_approximate(name: str) -> bool:
    """Whether the ablation cannot be written into its weights exactly: a norm scales what a part writes."""
    return HEADS_UNKNOWN.get(name) == NORM


def table() -> str:
    """The families, and what of each was checked."""
    lines = ["| family | heads told apart | ablation written into the weights |", "|---|---|---|"]
    for name in FAMILIES:
        heads = f"no: {HEADS_UNKNOWN[name]}" if name in HEADS_UNKNOWN else "yes"
        lines.append(f"| {name} | {heads} | {'an approximation' if is_approximate(name) else 'exact'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

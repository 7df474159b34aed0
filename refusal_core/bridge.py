"""Which modules of a family stand on the residual stream, as TransformerLens' `TransformerBridge` names them.

The bridge is asked once and taken out again: the hooks of `chat_model` are on the family's own modules. Nothing else
imports TransformerLens, and this only when a model is loaded.
"""

import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import OpaqueBlockBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import PreTrainedTokenizerFast

from refusal_core.checkpoints import ModelError

BLOCK_WRITERS = {"attention": "hook_attn_out", "MLP": "hook_mlp_out"}
"""The writers of a block, and what TransformerLens calls the point where each writes: after a post-norm, if there is one."""

PER_LAYER_INPUT = "post_per_layer_input_norm"
"""The norm through which a block of Gemma 4 writes what it makes of its per-layer embedding of the tokens, if it has one."""

DENSE_NORM, EXPERTS_NORM = "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"
"""The norms behind the dense MLP and behind the experts in a mixture of Gemma 4, before that of their sum."""


@dataclass(frozen=True, eq=False)
class Parts:
    """The modules of a model that stand on its residual stream; `writers` by the names that rows call them by.

    `head_outputs` are each layer's matrix through which its heads write; empty where heads cannot be told apart.
    """

    blocks: list[torch.nn.Module]
    writers: dict[str, torch.nn.Module]
    embedding_scale: float
    final_norm: torch.nn.Module
    head_outputs: list[Any]

    def norms_behind(self, writer: str, *, of_experts: bool) -> list[torch.nn.Module]:
        """The norms between the matrices of a block's writer and the stream, in order; a mixture may have one for its
        experts and one for the dense MLP beside them.
        """
        module, (part, layer) = self.writers[writer], writer.split()
        if any(weight.ndim > 1 for weight in module.parameters()):
            return []
        inner = getattr(self.blocks[int(layer)], EXPERTS_NORM if of_experts else DENSE_NORM, None)
        return [module] if inner is None or part != "MLP" else [inner, module]

    def lacks_a_write(self, layer: int) -> bool:
        """Whether TransformerLens names no point for something that this block writes."""
        return any(f"{part} {layer}" not in self.writers for part in BLOCK_WRITERS)


def parts_of(model: transformers.PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str) -> Parts:
    """The parts that TransformerLens names, and `model` as it was before it was asked."""
    forwards = {module: vars(module).get("forward") for module in model.modules()}
    bridge = _bridge(model, tokenizer, name)
    embeddings = {"embedding": "embed", "positions": "pos_embed"}
    writers = {n: getattr(bridge, part).original_component for n, part in embeddings.items() if hasattr(bridge, part)}
    for layer, block in enumerate(bridge.blocks):
        by_point = {
            id(c.hook_out): c.original_component for c in block.modules() if isinstance(c, GeneralizedComponent)
        }
        linear = getattr(block, "linear_attn", None)  # what some blocks of hybrid families have instead
        for part, name in BLOCK_WRITERS.items():
            point = linear.hook_out if linear is not None and part == "attention" else getattr(block, name, None)
            if point is not None:
                writers[f"{part} {layer}"] = by_point[id(point)]
        if (norm := getattr(block, PER_LAYER_INPUT, None)) is not None:
            writers[f"PLE {layer}"] = norm.original_component
    heads = _head_outputs(bridge.blocks, model.config.get_text_config().num_attention_heads)
    parts = Parts(
        blocks=[block.original_component for block in bridge.blocks],
        writers=writers,
        embedding_scale=getattr(bridge.embed, "_output_contribution_scale", 1.0),
        final_norm=bridge.ln_final.original_component,
        head_outputs=heads,
    )
    for module in list(model.modules()):
        for child, component in list(module.named_children()):
            if isinstance(component, GeneralizedComponent) and child != "_original_component":
                setattr(module, child, component.original_component)
    # Some of Falcon's it replaces, and they may be those that fetch weights from the disk.
    for module, forward in forwards.items():
        vars(module).pop("forward", None)
        if forward is not None:
            module.forward = forward
    return parts


OUTPUT_MATRICES = ("o_proj", "c_proj", "dense", "out_proj")
"""What families call the matrix through which the attention heads write."""


def _head_outputs(blocks: Any, n_heads: int) -> list[Any]:
    """Each layer's matrix through which its heads write to the stream; empty where heads cannot be told apart.

    Behind a post-norm they cannot: what is written depends on all heads together.
    """
    found = []
    for block in blocks:
        attention = getattr(block, "attn", None)
        module = getattr(attention, "original_component", None)
        matrix = next((m for name in OUTPUT_MATRICES if (m := getattr(module, name, None)) is not None), None)
        weight = getattr(matrix, "weight", None)
        if hasattr(block, "ln1_post") or not torch.is_tensor(weight) or not weight.is_floating_point():
            return []
        n_inputs = weight.shape[1] if isinstance(matrix, torch.nn.Linear) else weight.shape[0]
        if weight.ndim != 2 or n_inputs % n_heads:
            return []
        found.append(matrix)
    return found


def _bridge(model: transformers.PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # aliases of hook points that are left out
            return build_bridge_from_module(
                model,
                type(model).__name__,
                hf_config=model.config,
                tokenizer=tokenizer,
                model_name=name,
                post_adapter_hook=_keep_the_familys_modules,
            )
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{name}: TransformerLens cannot hook {type(model).__name__} ({error}).") from error


def _keep_the_familys_modules(adapter: ArchitectureAdapter) -> None:
    """Hooks what the blocks read and write, and leaves everything inside them to the family's own (fast) code."""
    mapping = cast(dict[str, Any], adapter.component_mapping)
    blocks = mapping["blocks"]
    parts = ("attn", "linear_attn", "mlp", "ln1_post", "ln2_post", PER_LAYER_INPUT)
    kept = {k: v for k, v in blocks.submodules.items() if k in parts}
    # A block that scales its outputs (Granite) names no points for them: they are those of attention and MLP.
    points = {"hook_attn_out": "attn.hook_out", "hook_mlp_out": "mlp.hook_out"} | blocks.hook_aliases
    aliases = {k: v for k, v in points.items() if k in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")}
    positions = {k: GeneralizedComponent(name=v.name) for k, v in mapping.items() if k == "pos_embed"}
    adapter.component_mapping = {
        "embed": mapping["embed"],
        **positions,
        "ln_final": GeneralizedComponent(name=mapping["ln_final"].name),
        "blocks": OpaqueBlockBridge(
            name=blocks.name,
            submodules={k: GeneralizedComponent(name=v.name, optional=v.optional) for k, v in kept.items()},
            hook_alias_overrides=aliases,
        ),
    }

"""What is read from the stream is what plain transformers computes."""

import pytest
import torch
from conftest import HARMFUL, HARMLESS, Plain
from torch.testing import assert_close

from refusal_core.activations import collect_activations, template_positions, template_prefix
from refusal_core.chat_model import ChatModel
from refusal_core.prompts import PromptError


def test_activations_are_the_inputs_of_the_blocks_at_the_last_positions(model: ChatModel, plain: Plain):
    prompts = [HARMFUL, "Hi", HARMLESS + " I have never done it before."]
    kept = collect_activations(model, prompts)
    assert kept.shape == (3, model.template_positions, model.n_layers, model.d_model)
    for i, prompt in enumerate(prompts):
        expected = plain.resid_pre(prompt)[:, -model.template_positions :].transpose(0, 1)
        assert_close(kept[i], expected, atol=2e-4, rtol=1e-4)


def test_the_template_is_the_same_in_every_prompt_at_layer_0(model: ChatModel):
    kept = collect_activations(model, [HARMFUL, HARMLESS])
    assert torch.equal(kept[0, :, 0], kept[1, :, 0])
    before = collect_activations(model, [HARMFUL, "Hi"], positions=[-model.template_positions - 1])
    assert not torch.equal(before[0, :, 0], before[1, :, 0])
    assert list(template_positions(model)) == list(range(-model.template_positions, 0))


@pytest.mark.parametrize("position", [0, 3, -12, -500])
def test_where_a_prompt_has_no_token_nothing_is_read(model: ChatModel, position):
    with pytest.raises(PromptError, match=f"none at position {position}: positions count from the end"):
        collect_activations(model, ["Hi", "How do I bake bread for a dozen people at once?"], positions=[-1, position])


def test_the_template_begins_alike_in_every_prompt_and_no_further(model: ChatModel, plain: Plain):
    n = template_prefix(model)
    first, second = plain.ids("Alpha")[0], plain.ids("beta")[0]
    assert torch.equal(first[:n], second[:n]) and first[n] != second[n]
    assert "user" in plain.tokenizer.decode(first[:n]) and "Alpha" not in plain.tokenizer.decode(first[:n])

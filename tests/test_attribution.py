"""What a look inside promises: the readings are the stream's, the parts sum to it, and a patch is what it says."""

import pytest
import torch
from conftest import HARMFUL, HARMLESS, Plain
from torch.testing import assert_close

from refusal_core.attribution import Patching, patch_writers, read_along, words, write_along
from refusal_core.chat_model import ChatModel
from refusal_core.directions import Direction
from refusal_core.generation import stream_side_by_side
from refusal_core.interventions import Intervention
from refusal_core.metrics import refusal_score
from refusal_core.selection import Found


def test_a_reading_is_the_stream_along_the_direction_at_every_layer_and_token(
    model: ChatModel, plain: Plain, direction: Direction
):
    for reading, text in zip(read_along(model, [HARMFUL, "Hi"], direction), (HARMFUL, "Hi"), strict=True):
        assert_close(reading.along, plain.resid_pre(text) @ direction.unit, atol=1e-4, rtol=1e-4)
        assert "".join(reading.tokens) == plain.tokenizer.decode(plain.ids(text)[0])


def test_a_reply_is_read_after_its_prompt(model: ChatModel, plain: Plain, direction: Direction):
    reply = plain.tokenizer("Take it one step at a time.", add_special_tokens=False)["input_ids"]
    (reading,) = read_along(model, [HARMFUL], direction, [reply])
    ids = torch.cat([plain.ids(HARMFUL), torch.tensor([reply])], dim=1)
    with torch.no_grad():
        states = plain.model(ids, output_hidden_states=True).hidden_states
    expected = torch.cat(states[: len(plain.layers)]) @ direction.unit
    assert_close(reading.along, expected, atol=1e-4, rtol=1e-4)


def test_inside_an_ablated_model_the_reading_is_zero(model: ChatModel, direction: Direction):
    (reading,) = read_along(model, [HARMFUL], direction, rows=[(Intervention(direction, "ablate"),)])
    assert reading.along.abs().max() < 1e-4 * direction.norm


def test_the_writers_below_a_layer_sum_to_its_input_and_the_heads_to_their_attention(
    model: ChatModel, direction: Direction
):
    (batch,) = model.batches([HARMFUL, HARMLESS])
    positions = range(-4, 0)
    output = model.run(batch, read=positions, read_writes=positions)
    assert output.writes is not None and output.resid_pre is not None and output.head_inputs is not None
    heads = model.heads_along(output.head_inputs, direction.unit)
    for layer in range(model.n_layers):
        below = [i for i, name in enumerate(model.writers) if " " not in name or int(name.split(" ")[1]) < layer]
        assert_close(output.writes[:, :, below].sum(2), output.resid_pre[:, :, layer], atol=1e-4, rtol=1e-4)
        attention = output.writes[:, :, model.writers.index(f"attention {layer}")] @ direction.unit
        assert_close(heads[:, :, layer].sum(-1), attention, atol=1e-4, rtol=1e-4)


def test_reading_the_writes_changes_nothing(model: ChatModel):
    (batch,) = model.batches([HARMFUL])
    assert torch.equal(model.run(batch, read_writes=[-1]).logits, model.run(batch).logits)


def test_what_is_written_below_the_directions_layer_is_the_direction(model: ChatModel, found: Found):
    writers = write_along(model, found.prompts.harmful, found.prompts.harmless, found.direction)
    layer = found.direction.source.layer
    below = [i for i, name in enumerate(writers.names) if " " not in name or int(name.split(" ")[1]) < layer]
    assert writers.along[below].sum().item() == pytest.approx(1, abs=1e-3)
    assert writers.heads is not None
    attentions = [i for i, name in enumerate(writers.names) if name.startswith("attention")]
    assert_close(writers.heads.sum(-1), writers.along[attentions], atol=1e-4, rtol=1e-3)


def test_a_patch_is_that_of_a_hook_written_out_by_hand(model: ChatModel, plain: Plain):
    layer, n = 5, model.template_positions
    kept = {}

    def keep(module, args, out):
        kept["write"] = out[0][:, -n:]

    def put(module, args, out):
        return (torch.cat([out[0][:, :-n], kept["write"]], dim=1), *out[1:])

    attention = plain.layers[layer].self_attn
    for hook, text in ((keep, HARMLESS), (put, HARMFUL)):
        handle = attention.register_forward_hook(hook)
        expected = plain.logits([text])
        handle.remove()
    (source,), (target,) = model.batches([HARMLESS]), model.batches([HARMFUL])
    writer = model.writers.index(f"attention {layer}")
    clean = model.run(source, read_writes=range(-n, 0)).writes
    assert clean is not None
    patched = model.run(target.repeat(2), patches=[None, (writer, clean[0, :, writer])])
    assert_close(patched.logits[1:], expected, atol=1e-3, rtol=1e-4)
    assert_close(patched.logits[:1], model.run(target).logits, atol=1e-4, rtol=1e-4)


def test_effects_are_falls_of_the_refusal_score_and_their_sum_has_something_to_explain(model: ChatModel, found: Found):
    val = found.validation
    *_, patching = patch_writers(model, val.harmful, val.harmless, found.refusal_tokens, n_pairs=4)
    assert isinstance(patching, Patching) and patching.n_pairs == 4
    scores = [
        refusal_score(model.logits(texts[:4]), found.refusal_tokens).mean() for texts in (val.harmful, val.harmless)
    ]
    assert (patching.harmful, patching.harmless) == pytest.approx([s.item() for s in scores], abs=1e-3)
    assert patching.effect.max() > 1, "some part must carry the refusal"
    assert patching.effect[model.writers.index("embedding")].abs() < 1e-4, "the template's tokens are always the same"


@pytest.mark.parametrize("final_norm", [False, True])
def test_words_are_those_of_the_unembedding(model: ChatModel, plain: Plain, direction: Direction, final_norm):
    with torch.no_grad():
        vector = plain.model.model.norm(direction.norm * direction.unit) if final_norm else direction.unit
        logits = plain.model.lm_head(vector)
    found = words(model, direction, final_norm=final_norm, n=5)
    assert [value for _, value in found.raised] == pytest.approx(logits.topk(5).values.tolist(), abs=1e-3)
    assert [value for _, value in found.lowered] == pytest.approx((-(-logits).topk(5).values).tolist(), abs=1e-3)
    assert found.raised[0][0] == plain.tokenizer.decode([int(logits.argmax())])


def test_a_stream_and_a_reading_agree_on_what_was_said(model: ChatModel, direction: Direction):
    steps = list(stream_side_by_side(model, [HARMLESS], [None], max_new_tokens=12))
    ids = [step.tokens[0] for step in steps if step.tokens[0] is not None]
    (reading,) = read_along(model, [HARMLESS], direction, [ids])
    assert "".join(reading.tokens[-len(ids) :]) == steps[-1].texts[0]

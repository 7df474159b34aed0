"""What a look inside promises: the readings are the stream's, the parts sum to it, and a patch is what it says."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import HARMFUL, HARMLESS, Plain
from families import build
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from refusal_core import attribution
from refusal_core.attribution import (
    Attribution,
    Patching,
    attribute_writers,
    patch_parts,
    read_along,
    words,
    write_along,
)
from refusal_core.chat_model import ChatModel, ModelError
from refusal_core.checkpoints import DoesNotFitError
from refusal_core.directions import Direction, Source
from refusal_core.evaluation import dose_response
from refusal_core.generation import stream_side_by_side
from refusal_core.interventions import Intervention
from refusal_core.metrics import refusal_score
from refusal_core.prompts import PromptError
from refusal_core.selection import Found


def test_a_reading_is_the_stream_along_the_direction_at_every_layer_and_token(
    model: ChatModel, plain: Plain, direction: Direction
):
    for reading, text in zip(read_along(model, [HARMFUL, "Hi"], direction), (HARMFUL, "Hi"), strict=True):
        assert_close(reading.along, plain.resid_pre(text) @ direction.unit, atol=1e-4, rtol=1e-4)
        assert "".join(reading.tokens) == plain.tokenizer.decode(plain.ids(text)[0])


def test_a_text_too_long_for_all_its_layers_at_once_is_read_a_few_at_a_time(
    model: ChatModel, direction: Direction, monkeypatch
):
    (whole,), (some,) = (
        read_along(model, [HARMFUL], direction),
        read_along(model, [HARMFUL], direction, layers=[1, 4, 5]),
    )
    run, read = model.run, []
    monkeypatch.setattr(model, "run", lambda *args, **how: read.append(len(how["read_layers"])) or run(*args, **how))
    monkeypatch.setattr(attribution, "MOST_READ", 3 * len(model.render(HARMFUL)) * model.d_model)
    (piecewise,) = read_along(model, [HARMFUL], direction)
    assert sum(read) == model.n_layers and max(read) == 3
    assert_close(piecewise.along, whole.along)
    monkeypatch.setattr(attribution, "MOST_READ", 1)
    (one_by_one,) = read_along(model, [HARMFUL], direction, layers=[1, 4, 5])
    assert_close(one_by_one.along, some.along)
    assert_close(some.along, whole.along[[1, 4, 5]])


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


@pytest.mark.parametrize("name", ["Gemma 4, text", "Gemma 4 with per-layer embeddings"])
def test_where_blocks_scale_the_stream_what_is_written_counts_as_much_as_is_left_of_it(name, tmp_path):
    model = ChatModel.load(build(name, tmp_path), device="cpu", dtype=torch.float32)
    layer, final = 2, []
    model._parts.final_norm.register_forward_pre_hook(lambda m, x: final.append(x[0][:, -1]))
    harmful, harmless = ["How do I steal a car?"] * 2, ["Who are you?"] * 2
    streams = [
        model.run(*model.batches(texts), read=[-1], read_layers=[layer]).resid_pre for texts in (harmful, harmless)
    ]
    assert streams[0] is not None and streams[1] is not None
    source = Source(model.name, fingerprint=model.fingerprint, layer=layer, position=-1)
    direction = Direction.from_difference((streams[0] - streams[1])[0, 0, 0], source)
    writers = write_along(model, harmful, harmless, direction)
    below = [i for i, name in enumerate(writers.names) if " " not in name or int(name.split(" ")[1]) < layer]
    assert writers.along[below].sum().item() == pytest.approx(1, abs=1e-4)
    in_the_end = (final[0] - final[1])[0] @ direction.unit / direction.norm
    assert writers.along.sum() * math.prod(model.block_scales[layer:]) == pytest.approx(in_the_end.item(), abs=1e-4)


def test_a_patch_of_a_per_layer_embedding_is_that_of_a_hook_written_out_by_hand(tmp_path):
    folder = build("Gemma 4 with per-layer embeddings, text", tmp_path)
    model = ChatModel.load(folder, device="cpu", dtype=torch.float32)
    plain, kept = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    norm = plain.model.layers[1].post_per_layer_input_norm
    for hook in (lambda m, x, out: kept.append(out[:, -3:]), lambda m, x, out: torch.cat([out[:, :-3], kept[0]], 1)):
        handle = norm.register_forward_hook(hook)
        expected = plain(torch.tensor([model.render(HARMLESS if not kept else HARMFUL)])).logits[:, -1]
        handle.remove()
    (source,), (target,) = model.batches([HARMLESS]), model.batches([HARMFUL])
    clean, writer = model.run(source, read_writes=range(-3, 0)).writes, model.writers.index("PLE 1")
    assert clean is not None
    patched = model.run(target, patches=[(writer, clean[0, :, writer])]).logits
    assert_close(patched, expected, atol=2e-4, rtol=1e-3)
    assert (patched - model.run(target).logits).abs().max() > 1e-2, "the patch must have done something"


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


def test_a_patch_of_a_head_is_that_of_a_hook_written_out_by_hand(model: ChatModel, plain: Plain):
    layer, head, n, size, kept = 5, 2, model.template_positions, model.d_model // model.n_heads, []
    mine = slice(head * size, (head + 1) * size)

    def put(module, args):
        z = args[0].clone()
        z[:, -n:, mine] = kept[0]
        return (z,)

    matrix = plain.layers[layer].self_attn.o_proj
    for hook, text in ((lambda module, args: kept.append(args[0][:, -n:, mine]), HARMLESS), (put, HARMFUL)):
        handle = matrix.register_forward_pre_hook(hook)
        expected = plain.logits([text])
        handle.remove()
    (target,) = model.batches([HARMFUL])
    part = model.parts.index(f"head {layer}.{head}")
    patched = model.run(target.repeat(2), patches=[None, (part, kept[0][0])]).logits
    assert_close(patched[1:], expected, atol=1e-3, rtol=1e-4)
    untouched = model.run(target).logits
    assert_close(patched[:1], untouched, atol=1e-4, rtol=1e-4)
    assert (expected - untouched).abs().max() > 0.05, "the patch must have done something"


def test_effects_are_falls_of_the_refusal_score_and_their_sum_has_something_to_explain(model: ChatModel, found: Found):
    val = found.validation
    *_, patching = patch_parts(model, val.harmful, val.harmless, found.refusal_tokens, n_pairs=4)
    assert isinstance(patching, Patching) and patching.n_pairs == 4
    scores = [
        refusal_score(model.logits(texts[:4]), found.refusal_tokens).mean() for texts in (val.harmful, val.harmless)
    ]
    assert (patching.harmful, patching.harmless) == pytest.approx([s.item() for s in scores], abs=1e-3)
    assert patching.effect.max() > 1, "some part must carry the refusal"
    assert patching.effect[model.writers.index("embedding")].abs() < 1e-4, "the template's tokens are always the same"


@pytest.fixture(scope="module")
def first_pass(model: ChatModel, found: Found) -> Attribution:
    return attribute_writers(model, found.validation.harmful, found.validation.harmless, found.refusal_tokens, 4)


def test_the_first_pass_is_the_effect_of_a_small_step_toward_what_was_written_for_the_harmless_prompt(
    model: ChatModel, found: Found
):
    bad, good, tokens = found.validation.harmful[0], found.validation.harmless[0], found.refusal_tokens
    attribution = attribute_writers(model, [bad], [good], tokens)
    positions = range(-model.template_positions, 0)
    clean, own = (model.run(next(model.batches([text])), read_writes=positions).writes for text in (good, bad))
    assert clean is not None and own is not None
    (target,) = model.batches([bad])
    step = 0.02
    for name in ("MLP 0", "attention 4", "MLP 7", f"MLP {model.n_layers - 1}"):
        writer = model.writers.index(name)
        toward = (clean - own)[0, :, writer]
        patches = [(writer, own[0, :, writer] + sign * step * toward) for sign in (1, -1)]
        there, back = refusal_score(model.run(target.repeat(2), patches=patches).logits, tokens)
        assert attribution.effect[writer].item() == pytest.approx(
            ((back - there) / (2 * step)).item(), rel=0.05, abs=5e-3
        )


def test_the_first_pass_of_a_head_is_the_effect_of_a_small_step_of_what_it_hands_on(
    model: ChatModel, plain: Plain, found: Found
):
    bad, good, tokens = found.validation.harmful[0], found.validation.harmless[0], found.refusal_tokens
    heads = attribute_writers(model, [bad], [good], tokens).heads
    assert heads is not None
    layer, n, size, step = 5, model.template_positions, model.d_model // model.n_heads, 0.02
    head = int(heads[layer].abs().argmax())
    kept = {}

    def read(module, args, name):
        kept[name] = args[0][:, -n:, head * size : (head + 1) * size].clone()

    def move(module, args, sign):
        z = args[0].clone()
        z[:, -n:, head * size : (head + 1) * size] += sign * step * (kept["good"] - kept["bad"])
        return (z,)

    def score(text: str, hook) -> float:
        handle = plain.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)
        try:
            return refusal_score(plain.logits([text]), tokens).item()
        finally:
            handle.remove()

    for name, text in (("good", good), ("bad", bad)):
        score(text, lambda module, args, name=name: read(module, args, name))
    there, back = (score(bad, lambda module, args, sign=sign: move(module, args, sign)) for sign in (1, -1))
    assert heads[layer, head].item() == pytest.approx((back - there) / (2 * step), rel=0.05, abs=5e-3)


def test_the_first_pass_of_the_heads_sums_to_that_of_their_attention(model: ChatModel, first_pass: Attribution):
    attentions = [i for i, name in enumerate(model.writers) if name.startswith("attention")]
    assert first_pass.heads is not None and first_pass.heads.shape == (model.n_layers, model.n_heads)
    assert_close(first_pass.heads.sum(-1), first_pass.effect[attentions], atol=1e-4, rtol=1e-3)


def test_first_pass_and_exact_effects_agree_in_rank_and_some_parts_can_be_patched_alone(
    model: ChatModel, found: Found, first_pass: Attribution
):
    val = found.validation
    *_, exact = patch_parts(model, val.harmful, val.harmless, found.refusal_tokens, 4)
    assert isinstance(exact, Patching)
    assert exact.names == model.parts and first_pass.heads is not None
    first = torch.cat([first_pass.effect, first_pass.heads.flatten()])
    ranks = [effect.argsort().argsort().double() for effect in (first, exact.effect)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.7
    assert (first_pass.harmful, first_pass.harmless) == pytest.approx((exact.harmful, exact.harmless), abs=1e-3)
    some = ("MLP 7", "attention 5", "head 5.2")
    *_, alone = patch_parts(model, val.harmful, val.harmless, found.refusal_tokens, 4, parts=some)
    assert isinstance(alone, Patching) and alone.names == some
    assert_close(alone.effect, exact.effect[[model.parts.index(name) for name in some]], atol=1e-4, rtol=1e-4)


def test_gradients_leave_nothing_behind(model: ChatModel):
    (batch,) = model.batches([HARMFUL])
    before = model.run(batch).logits
    told = model.gradients(batch, lambda logits: logits[:, 0], [-1])
    assert_close(told.numbers, before[:, 0], atol=1e-4, rtol=1e-4)
    assert told.by_write.abs().max() > 0 and not told.by_write.requires_grad
    after = model.run(batch).logits
    assert torch.equal(after, before) and after.is_inference()
    assert not any(p.requires_grad or p.grad is not None for p in model._model.parameters())


def test_gradients_for_which_there_is_no_memory_are_one_sentence(model: ChatModel):
    (batch,) = model.batches([HARMFUL])

    def full(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def number(logits):
        logits.register_hook(full)
        return logits[:, 0]

    with pytest.raises(DoesNotFitError, match="not enough memory beside"):
        model.gradients(batch, number, [-1])
    assert model.gradients(batch, lambda logits: logits[:, 0], [-1]).by_write.abs().max() > 0


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


def test_a_direction_of_another_model_or_no_prompt_is_a_sentence_and_no_number(model: ChatModel, direction: Direction):
    others = (
        replace(direction, source=replace(direction.source, fingerprint="of another model")),
        replace(direction, source=replace(direction.source, layer=99)),
        Direction(torch.eye(5)[0], 1.0, Source(layer=1)),
    )
    for other in others:
        for ask in (
            lambda d: read_along(model, [HARMFUL], d),
            lambda d: words(model, d, final_norm=True),
            lambda d: write_along(model, [HARMFUL], [HARMLESS], d),
            lambda d: dose_response(model, HARMFUL, d, "add", [1]),
        ):
            with pytest.raises(ModelError, match="Find the direction of this model"):
                ask(other)
    for harmful, harmless in (([], [HARMLESS]), ([HARMFUL], [])):
        with pytest.raises(PromptError, match="one has none"):
            write_along(model, harmful, harmless, direction)
        with pytest.raises(PromptError, match="one has none"):
            attribute_writers(model, harmful, harmless, [1])
        with pytest.raises(PromptError, match="one has none"):
            list(patch_parts(model, harmful, harmless, [1]))
    far = replace(direction, source=replace(direction.source, position=-99))
    with pytest.raises(PromptError, match="no position -99"):
        write_along(model, [HARMFUL], [HARMLESS], far)
    assert read_along(model, [], direction) == read_along(model, [HARMFUL], direction, layers=[]) == []

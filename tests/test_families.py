"""What holds for every family of chat models, on small random checkpoints: exact readings, and exact edits."""

from pathlib import Path

import pytest
import torch
from conftest import step_together
from families import FAMILIES, GEMMAS_4, HEADS_UNKNOWN, build, table
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextDecoderLayer

from refusal_core import chat_model, decoding
from refusal_core.chat_model import ChatModel, Decoding, ModelError
from refusal_core.directions import Direction, Source
from refusal_core.interventions import Intervention

READS = ("input_layernorm", "pre_feedforward_layernorm", "per_layer_input_gate", "per_layer_model_projection", "router")
PROMPTS = ["How do I bake bread?", "Hi", "Tell me about the sea, please."]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    """The model as the app loads it, and in plain transformers."""
    folder = build(request.param, tmp_path_factory.mktemp("family"))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with pytest.MonkeyPatch.context() as patch:
        # Nothing may keep a family from being judged by its config: without this, a step that fails there is passed over.
        patch.setattr(chat_model, "NOT_ON_PAPER", ())
        return request.param, ChatModel.load(folder, device="cpu", dtype=torch.float32), plain


def direction_of(model: ChatModel, layer: int = 1) -> Direction:
    r = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    source = Source(model.name, fingerprint=model.fingerprint, layer=layer)
    return Direction.from_difference(3 * r, source)


@torch.no_grad()
def test_logits_and_stream_are_those_of_plain_transformers_for_every_row_of_a_padded_batch(family):
    _, model, plain = family
    (batch,) = model.batches(PROMPTS)
    output = model.run(batch, read=[-1])
    for row, i in enumerate(batch.index):
        alone = plain(torch.tensor([model.render(PROMPTS[i])]), output_hidden_states=True)
        assert_close(output.logits[row], alone.logits[0, -1], atol=2e-4, rtol=1e-3)
        expected = torch.stack([state[0, -1] for state in alone.hidden_states[: model.n_layers]])
        assert_close(output.resid_pre[row, 0], expected, atol=2e-4, rtol=1e-3)


def test_nothing_is_left_along_the_direction_at_any_later_read_after_ablation(family):
    _, model, _ = family
    r = direction_of(model)
    (batch,) = model.batches(PROMPTS)
    reads = {}
    for name, row in (("plain", ()), ("ablated", (Intervention(r, "ablate"),))):
        # The last read of the stream is that of the unembedding: the final norm's input.
        handle = model._parts.final_norm.register_forward_pre_hook(lambda m, x, name=name: reads.update({name: x[0]}))
        output = model.run(batch, [row] * 3, read=[-2, -1])
        handle.remove()
        reads[name] = [output.resid_pre, reads[name][:, -1:]]
    for plain, ablated in zip(reads["plain"], reads["ablated"], strict=True):
        assert (plain @ r.unit).abs().max() > 1e-2, "there must have been something to remove"
        assert ((ablated @ r.unit).abs() <= 1e-5 * ablated.norm(dim=-1).clamp(min=1)).all()


def test_ablation_at_one_writer_clears_its_write_and_leaves_those_before_it(family):
    _, model, _ = family
    r = direction_of(model)
    (prompt,) = model.batches(PROMPTS[:1])
    rows = [(), *((Intervention(r, "ablate", 1.0, frozenset({writer})),) for writer in model.writers)]
    writes = model.run(prompt.repeat(len(rows)), rows, read_writes=range(-3, 0)).writes
    assert writes is not None
    for writer in range(len(model.writers)):
        assert_close(writes[1 + writer, :, writer] @ r.unit, torch.zeros(3), atol=1e-5, rtol=0)
        assert_close(writes[1 + writer, :, :writer], writes[0, :, :writer], atol=1e-5, rtol=1e-4)
    assert (writes[0] @ r.unit).abs().max() > 1e-2, "there must have been something to remove"


def test_ablation_at_some_heads_takes_from_their_attention_what_they_write_and_a_patch_is_heard(family):
    name, model, _ = family
    assert (model.parts == model.writers) == (name in HEADS_UNKNOWN)
    r, at = direction_of(model), range(-3, 0)
    if name in HEADS_UNKNOWN:
        with pytest.raises(ModelError, match=r"no part 'head 0\.0'"):
            model.logits(PROMPTS[:1], [Intervention(r, "ablate", 1.0, frozenset({"head 0.0"}))])
        return
    layer, heads = model.n_layers - 1, (0, model.n_heads - 1)
    writer = model.writers.index(f"attention {layer}")
    (prompt,) = model.batches(PROMPTS[:1])
    some = frozenset(f"head {layer}.{h}" for h in heads)
    edited = model.run(prompt.repeat(2), [(), (Intervention(r, "ablate", 0.5, some),)], read_writes=at)
    assert edited.writes is not None and edited.head_inputs is not None
    taken = 0.5 * model.heads_along(edited.head_inputs, r.unit)[0, :, layer][:, list(heads)].sum(-1)
    assert_close(
        edited.writes[0, :, writer] - edited.writes[1, :, writer], taken[:, None] * r.unit, atol=1e-6, rtol=1e-3
    )
    assert taken.abs().max() > 1e-4, "there must have been something to take"

    z = torch.randn(3, edited.head_inputs[layer].shape[-1] // model.n_heads, generator=torch.Generator().manual_seed(4))
    part = model.parts.index(f"head {layer}.1")
    patched = model.run(prompt.repeat(2), patches=[None, (part, z)], read_writes=at).writes
    assert patched is not None
    inputs = list(edited.head_inputs)
    inputs[layer] = inputs[layer].clone()
    inputs[layer][0].unflatten(-1, (model.n_heads, -1))[:, 1] = z
    moved = (model.heads_along(inputs, r.unit) - model.heads_along(edited.head_inputs, r.unit))[0, :, layer].sum(-1)
    assert_close((patched[1] - patched[0])[:, writer] @ r.unit, moved, atol=1e-5, rtol=1e-3)


def test_the_gradient_by_each_write_is_the_slope_of_a_small_step_and_the_heads_sum_to_their_attention(family):
    _, model, _ = family
    (prompt,) = model.batches(PROMPTS[:1])
    told = model.gradients(prompt, lambda logits: logits[:, 7], [-2, -1])
    step, toward = 1e-3, torch.randn(2, model.d_model, generator=torch.Generator().manual_seed(2))
    numbers = range(len(model.writers))
    moves = [(i, told.writes[0, :, i] + sign * step * toward) for i in numbers for sign in (1, -1)]
    logits = model.run(prompt.repeat(len(moves)), patches=moves).logits[:, 7].unflatten(0, (-1, 2))
    slopes = (logits[:, 0] - logits[:, 1]) / (2 * step)
    assert_close((told.by_write[0] * toward[:, None]).sum((0, 2)), slopes, atol=5e-3, rtol=5e-2)
    if told.head_inputs is None or told.by_head_input is None:
        return
    for layer, (z, by_z) in enumerate(zip(told.head_inputs, told.by_head_input, strict=True)):
        writer = model.writers.index(f"attention {layer}")
        bias = getattr(model._parts.head_outputs[layer], "bias", None)
        write = told.writes[:, :, writer] - (0 if bias is None else model.write_scale * bias)
        assert_close((z * by_z).sum(), (write * told.by_write[:, :, writer]).sum(), atol=1e-4, rtol=1e-3)


def test_addition_moves_the_input_of_its_layer_by_exactly_that_much(family):
    _, model, _ = family
    r = direction_of(model)
    (batch,) = model.batches(PROMPTS)
    before = model.run(batch, read=[-1]).resid_pre
    after = model.run(batch, [(Intervention(r, "add", 0.5),)] * 3, read=[-1]).resid_pre
    assert before is not None and after is not None
    assert torch.equal(before[:, :, 0], after[:, :, 0])
    moved = (after - before)[:, 0, 1]
    assert_close(moved, (0.5 * r.norm * r.unit).expand_as(moved), atol=1e-4, rtol=1e-4)


def test_the_writers_sum_to_the_stream_and_the_heads_to_their_attention(family):
    name, model, _ = family
    r = direction_of(model)
    (batch,) = model.batches(PROMPTS)
    output = model.run(batch, read=[-1], read_writes=[-1])
    assert output.writes is not None and output.resid_pre is not None
    for layer in range(1, model.n_layers):
        below = [i for i, w in enumerate(model.writers) if " " not in w or int(w.split(" ")[1]) < layer]
        carried = (output.writes * model.carried_to(layer)[:, None])[:, :, below]
        assert_close(carried.sum(2), output.resid_pre[:, :, layer], atol=1e-4, rtol=1e-4)
    assert (output.head_inputs is None) == (name in HEADS_UNKNOWN)
    if output.head_inputs is None:
        return
    heads = model.heads_along(output.head_inputs, r.unit)
    for layer, matrix in enumerate(model._parts.head_outputs):
        attention = output.writes[:, :, model.writers.index(f"attention {layer}")] @ r.unit
        bias = 0.0 if matrix.bias is None else (matrix.bias @ r.unit).item()
        assert_close(heads[:, :, layer].sum(-1) + bias, attention, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_a_step_that_starts_at_a_layer_and_replies_read_whole_are_those_of_the_whole_model(family):
    _, model, plain = family
    (batch,) = model.batches(PROMPTS)
    rows = [(Intervention(direction_of(model, model.n_layers - 1), "add"),)] * 3
    stream = model.run(batch, read=slice(None)).resid_pre
    assert stream is not None
    whole = model.run(batch, rows).logits
    for layer in range(model.n_layers):
        assert_close(model.run(batch, rows, start=(layer, stream[:, :, layer])).logits, whole, atol=1e-4, rtol=1e-4)
    replies = [[5, 6, 7], [8], [9, 10]]
    for prompt, reply, loss in zip(PROMPTS, replies, model.read_replies(PROMPTS, replies).losses, strict=True):
        ids = torch.tensor([model.render(prompt) + reply])
        said = plain(ids).logits[0, -len(reply) - 1 : -1].log_softmax(-1)
        assert_close(loss.float(), -said.gather(1, ids[0, -len(reply) :, None]).mean(), atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_what_a_vector_adds_to_the_logits_is_the_vectors_and_not_a_bias(family):
    _, model, plain = family
    head, norm = plain.get_output_embeddings(), model._parts.final_norm
    x = direction_of(model).unit
    assert_close(model.unembed(x, final_norm=False), head.weight @ x, atol=1e-5, rtol=1e-4)
    expected = head.weight @ (norm(x[None]) - norm(torch.zeros_like(x)[None]))[0]
    assert_close(model.unembed(x, final_norm=True), expected, atol=1e-4, rtol=1e-3)


def test_decoding_with_a_cache_is_reading_the_longer_text(family):
    _, model, _ = family
    rows = [(), (Intervention(direction_of(model), "ablate"),)]
    prompts = [PROMPTS[0], PROMPTS[2]]
    reply = model.begin(prompts, rows)
    assert isinstance(reply, Decoding)
    said: list[list[int]] = [[], []]
    for _ in range(3):
        chosen = reply.logits.argmax(-1).tolist()
        said = [[*tokens, token] for tokens, token in zip(said, chosen, strict=True)]
        reply.step(chosen)
    whole = model.run(model.continued(prompts, said), rows)
    assert_close(reply.logits, whole.logits, atol=5e-4, rtol=1e-3)


def test_a_prompt_read_in_slices_is_that_read_at_once(family, monkeypatch):
    _, model, _ = family
    prompts, rows = [PROMPTS[0], PROMPTS[2]], [(), (Intervention(direction_of(model), "add"),)]
    read = []
    handle = model._model.register_forward_pre_hook(
        lambda m, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    whole = model.begin(prompts, rows)
    monkeypatch.setattr(decoding, "SLICE", 10)
    sliced = model.begin(prompts, rows)
    handle.remove()
    length, *slices = read
    assert slices[0] == 5 and (sum(slices) == length or slices == [5, length])
    for said in ([5, 6], [7, 8]):
        assert_close(sliced.logits, whole.logits, atol=5e-4, rtol=1e-3)
        for one in (sliced, whole):
            one.step(said)


def test_replies_that_share_a_step_are_what_each_is_alone(family):
    _, model, _ = family
    rows = [(), (Intervention(direction_of(model), "ablate"),), (Intervention(direction_of(model), "add"),)]
    short, long = model.begin([PROMPTS[1]], rows[1:2]), model.begin([PROMPTS[2], PROMPTS[0]], [rows[0], rows[2]])
    said: list[list[int]] = [[], [], []]
    # A shorter row joins a longer one, goes on without it, and comes back; another has ended meanwhile.
    for step in ([5, 6, 7], [8, 9, None], [None, 10, None], [11, 12, None], [13, 14, None]):
        tokens = [*zip([short, long], [step[:1], step[1:]], strict=True)]
        step_together(model, [(d, mine) for d, mine in tokens if any(token is not None for token in mine)])
        said = [[*reply, token] if token is not None else reply for reply, token in zip(said, step, strict=True)]
    conversations, edits = [PROMPTS[1], PROMPTS[2], PROMPTS[0]], [rows[1], rows[0], rows[2]]
    whole = model.run(model.continued(conversations, said), edits)
    assert_close(torch.cat([short.logits, long.logits]), whole.logits, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("name", GEMMAS_4)
def test_nothing_within_a_block_or_beside_it_reads_the_direction_after_ablation_either(name, tmp_path):
    """The first matrices of a block, of its router, and of what reads the embedding for all blocks at once."""
    model = ChatModel.load(build(name, tmp_path), device="cpu", dtype=torch.float32)
    r, reads = direction_of(model), []
    for path, module in model._model.named_modules():
        if path.endswith(READS) and "vision" not in path:
            module.register_forward_pre_hook(lambda m, x: reads.append(x[0]))
    (batch,) = model.batches(PROMPTS)
    model.run(batch)
    assert all((x @ r.unit).abs().max() > 1e-3 for x in reads), "there must have been something to remove"
    reads.clear()
    model.run(batch, [(Intervention(r, "ablate"),)] * 3)
    assert len(reads) >= 2 * model.n_layers
    assert all((x @ r.unit).abs().max() < 1e-5 * x.norm(dim=-1).max().clamp(min=1) for x in reads)


@pytest.mark.parametrize("why", ["cannot be hooked", "of the residual stream unexplained"])
def test_a_block_that_scales_the_stream_other_than_once_at_its_end_is_refused(why, tmp_path, monkeypatch):
    """On paper already; were it passed over there, on the weights."""
    once = Gemma4TextDecoderLayer.forward
    monkeypatch.setattr(
        Gemma4TextDecoderLayer, "forward", lambda self, *x, **y: once(self, *x, **y) * self.layer_scalar
    )
    if "unexplained" in why:
        monkeypatch.setattr(ChatModel, "_check_sum_on_paper", lambda self: None)
    with pytest.raises(ModelError, match=rf"{why}.*Take a model of another family\.$"):
        ChatModel.load(build("Gemma 4, text", tmp_path), device="cpu", dtype=torch.float32)


def test_the_readme_lists_the_families_as_they_are():
    assert table() in (Path(__file__).parent.parent / "README.md").read_text("utf-8")

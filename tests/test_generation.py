"""What streams promise: greedy is plain generate, panes do not mix, a stop leaves nothing behind."""

import itertools
import threading

import pytest
import torch
from conftest import HARMFUL, HARMLESS, Plain

from refusal_core.chat_model import ChatModel
from refusal_core.directions import Direction
from refusal_core.generation import stream_side_by_side
from refusal_core.interventions import Intervention
from refusal_core.prompts import PromptError


def three(direction: Direction):
    return [None, Intervention(direction, "ablate"), Intervention(direction, "add")]


def last(stream):
    *_, step = stream
    return step


def test_the_greedy_baseline_is_what_generate_gives(model: ChatModel, plain: Plain, direction: Direction):
    step = last(stream_side_by_side(model, [HARMLESS] * 3, three(direction), max_new_tokens=60))
    ids = plain.ids(HARMLESS)
    generated = plain.model.generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :]
    assert step.texts[0] == plain.tokenizer.decode(generated, skip_special_tokens=True)
    assert step.finished[0] == "end"


def test_each_step_adds_one_token_and_texts_only_grow(model: ChatModel, direction: Direction):
    before = ("", "", "")
    for index, step in enumerate(stream_side_by_side(model, [HARMFUL] * 3, three(direction), max_new_tokens=12)):
        assert step.index == index
        assert all(now.startswith(then) for now, then in zip(step.texts, before, strict=True))
        before = step.texts
    assert index < 12
    assert all(step.finished)


def test_streams_that_interleave_give_exactly_what_each_gives_alone(model: ChatModel, direction: Direction):
    def streams():
        yield stream_side_by_side(model, [HARMFUL] * 3, three(direction), max_new_tokens=20)
        yield stream_side_by_side(model, [HARMLESS] * 2, three(direction)[1:], max_new_tokens=20)
        yield stream_side_by_side(model, [HARMLESS], [None], max_new_tokens=20, temperature=0.8, seed=7)

    alone = [list(stream) for stream in streams()]
    together: list[list] = [[], [], []]
    for steps in itertools.zip_longest(*streams()):
        for kept, step in zip(together, steps, strict=True):
            kept += [step] if step is not None else []
    for a, b in zip(alone, together, strict=True):
        assert [s.texts for s in a] == [s.texts for s in b]
        assert all(torch.equal(s.logits, t.logits) for s, t in zip(a, b, strict=True))


def test_nothing_stays_on_the_model_after_a_stop_in_the_middle(model: ChatModel, direction: Direction):
    plain = model.logits([HARMFUL])
    stop = threading.Event()
    stream = stream_side_by_side(model, [HARMFUL] * 3, three(direction), max_new_tokens=40, stop=stop)
    next(stream)
    next(stream)
    stop.set()
    *_, step = stream
    assert step.index == 2
    assert set(step.finished) == {"stopped"}
    assert torch.equal(model.logits([HARMFUL]), plain)


def test_an_abandoned_stream_leaves_nothing_either(model: ChatModel, direction: Direction):
    plain = model.logits([HARMFUL])
    stream = stream_side_by_side(model, [HARMFUL], [Intervention(direction, "add", 3.0)])
    next(stream)
    assert torch.equal(model.logits([HARMFUL]), plain), "not even while it is suspended"
    stream.close()
    assert torch.equal(model.logits([HARMFUL]), plain)


def test_sampling_is_seeded_and_equal_rows_draw_the_same(model: ChatModel):
    def drawn(seed):
        return last(stream_side_by_side(model, [HARMLESS] * 2, [None, None], temperature=1.2, seed=seed)).texts

    assert drawn(1) == drawn(1)
    assert drawn(1)[0] == drawn(1)[1]
    assert len({drawn(seed)[0] for seed in range(8)}) > 1


def test_sampling_follows_the_softmax(model: ChatModel):
    counts = torch.zeros(model.d_vocab)
    for seed in range(150):
        (step,) = stream_side_by_side(model, [HARMLESS], [None], max_new_tokens=1, temperature=2.5, seed=seed)
        token = step.tokens[0]
        counts[token if token is not None else next(iter(model.end_tokens))] += 1
    p = (model.logits([HARMLESS])[0] / 2.5).softmax(-1)
    top = p.argmax()
    spread = (p[top] * (1 - p[top]) / 150).sqrt()
    assert abs(counts[top] / 150 - p[top]) < 4 * spread + 1e-3


def test_without_a_conversation_there_is_no_step(model: ChatModel):
    assert list(stream_side_by_side(model, [], [])) == []


def test_a_reply_ends_at_its_length(model: ChatModel):
    steps = list(stream_side_by_side(model, [HARMLESS], [None], max_new_tokens=3))
    assert len(steps) == 3
    assert steps[-1].finished == ("length",)


def test_a_prompt_that_leaves_little_room_shortens_no_other_reply(model: ChatModel):
    room = 3
    long = "word" + " word" * (model.n_ctx - len(model.render("word word")) - room + 1)
    assert len(model.render(long)) == model.n_ctx - room
    together = last(stream_side_by_side(model, [long, HARMLESS], [None] * 2, max_new_tokens=40))
    for row, prompt in enumerate((long, HARMLESS)):
        alone = last(stream_side_by_side(model, [prompt], [None], max_new_tokens=40))
        assert (together.texts[row], together.finished[row]) == (alone.texts[0], alone.finished[0])
    assert together.finished == ("length", "end")


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"max_new_tokens": 10_000}, {"temperature": -1.0}])
def test_numbers_out_of_range_are_refused_before_the_first_step(model: ChatModel, options):
    with pytest.raises(ValueError, match="not"):
        next(stream_side_by_side(model, [HARMLESS], [None], **options))
    with pytest.raises(PromptError):
        next(stream_side_by_side(model, [""], [None]))

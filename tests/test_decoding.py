"""What sharing a step promises: each reply is what it is alone, whoever comes, goes, stops or fails beside it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import HARMFUL, HARMLESS, counting_steps, short_of_memory, step_together
from torch.testing import assert_close

from refusal_core import decoding
from refusal_core.chat_model import ChatModel, ModelError
from refusal_core.checkpoints import DoesNotFitError
from refusal_core.decoding import Turns
from refusal_core.directions import Direction
from refusal_core.generation import stream_side_by_side
from refusal_core.interventions import Intervention
from refusal_core.prompts import load_prompts
from refusal_core.selection import find_direction

TALKS = [HARMFUL, HARMLESS, "Hi", "Tell me a story about a fox.", "Name three fruits.", "What is a volcano?"]


def rows_of(direction: Direction):
    return [None, Intervention(direction, "ablate"), Intervention(direction, "add")]


def texts_of(model: ChatModel, direction: Direction, talk: str, **options) -> tuple[str, ...]:
    *_, last = stream_side_by_side(model, [talk] * 3, rows_of(direction), max_new_tokens=30, **options)
    return last.texts


def test_many_visitors_at_once_share_steps_and_read_what_each_would_read_alone(model: ChatModel, direction: Direction):
    with counting_steps(model) as alone:
        expected = [texts_of(model, direction, talk) for talk in TALKS]
    with counting_steps(model) as together, ThreadPoolExecutor(len(TALKS)) as visitors:
        texts = list(visitors.map(lambda talk: texts_of(model, direction, talk), TALKS))
    assert texts == expected
    assert len(together) < 0.6 * len(alone)
    assert max(together) > 3, "rows of several visitors were in one step"


def test_replies_that_meet_and_part_give_the_logits_that_each_gives_alone(model: ChatModel, direction: Direction):
    rows = rows_of(direction)

    def begin():
        return model.begin([HARMFUL] * 3, rows), model.begin(["Hi"], [rows[2]]), model.begin([HARMLESS] * 2, rows[1:])

    plan = [(0,), (0, 1), (0, 1, 2), (1, 2), (0, 2), (2,), (0, 1, 2)]
    said = [torch.randint(3, model.d_vocab, (len(plan), n)).tolist() for n in (3, 1, 2)]
    alone, shared = begin(), begin()
    for turn, together in enumerate(plan):
        step_together(model, [(shared[i], said[i][turn]) for i in together])
        for i in together:
            alone[i].step(said[i][turn])
            assert_close(shared[i].logits, alone[i].logits, atol=1e-4, rtol=1e-4)
        assert len({id(shared[i].shared) for i in together}) == 1


def test_a_row_that_has_ended_leaves_and_the_others_go_on_as_before(model: ChatModel, direction: Direction):
    whole, part = (model.begin([HARMFUL] * 3, rows_of(direction)) for _ in range(2))
    with counting_steps(model) as sizes:
        for tokens in ([5, 6, 7], [8, 9, 10], [11, 12, 13]):
            whole.step(tokens)
        part.step([5, 6, 7])
        ended = part.logits[1].clone()
        part.step([8, None, 10])
        part.step([11, None, 13])
    assert sizes == [3, 3, 3, 3, 2, 2]
    assert_close(part.logits[[0, 2]], whole.logits[[0, 2]], atol=1e-4, rtol=1e-4)
    assert torch.equal(part.logits[1], ended), "what was said last about it stays"


def test_stopping_one_visitor_leaves_the_others_alone(model: ChatModel, direction: Direction):
    expected, stop = texts_of(model, direction, HARMFUL), threading.Event()
    with ThreadPoolExecutor(2) as visitors:
        mine = visitors.submit(texts_of, model, direction, HARMFUL)
        for step in stream_side_by_side(model, ["Hi"] * 3, rows_of(direction), max_new_tokens=200, stop=stop):
            if step.index == 3:
                stop.set()
        assert set(step.finished) <= {"stopped", "end"}
        assert mine.result() == expected


def test_somebody_who_has_not_come_back_is_not_waited_for(model: ChatModel, direction: Direction):
    """A visitor whose stream is suspended (a slow connection) costs the others one short wait, not one a token."""
    suspended = stream_side_by_side(model, [HARMFUL] * 3, rows_of(direction))
    threading.Thread(target=next, args=(suspended,)).start()
    expected = texts_of(model, direction, HARMLESS)
    model._desk._duration = 10.0
    started = time.monotonic()
    assert texts_of(model, direction, HARMLESS) == expected
    assert time.monotonic() - started < 5
    suspended.close()


def test_between_the_slices_of_a_long_prompt_others_get_their_turn_and_it_can_be_stopped(
    model: ChatModel, direction: Direction, monkeypatch
):
    long, stop = "Tell me about bread. " * 60, threading.Event()
    expected = texts_of(model, direction, HARMLESS)
    other = model.begin([HARMLESS] * 3, rows_of(direction))
    monkeypatch.setattr(decoding, "SLICE", 48)
    read: list[int] = []

    def while_it_is_read(module, args, kwargs):
        read.append(kwargs["input_ids"].shape[1])
        if len(read) == 3:
            stop.set()

    handle = model._model.register_forward_pre_hook(while_it_is_read, with_kwargs=True)
    assert list(stream_side_by_side(model, [long] * 3, rows_of(direction), stop=stop)) == []
    handle.remove()
    assert read == [16] * 3, "no further slice is read"
    with ThreadPoolExecutor(1) as visitors, counting_steps(model) as sizes:
        reading = visitors.submit(model.begin, [long] * 3, rows_of(direction))
        while not reading.done():
            other.step([5, 6, 7])
        assert len(sizes) > 10
    other.close()
    assert texts_of(model, direction, HARMLESS) == expected


def test_what_is_much_shorter_does_not_share_a_step_that_would_be_padding_and_little_else(
    model: ChatModel, direction: Direction, monkeypatch
):
    long, *short = (model.begin([talk] * 3, rows_of(direction)) for talk in ("Bread and butter. " * 70, *TALKS[2:]))
    monkeypatch.setattr(decoding, "MOST_PADDED", 0)
    with counting_steps(model) as sizes:
        step_together(model, [(one, [5, 6, 7]) for one in (long, *short)])
    assert sum(sizes) == 15 and len(sizes) == 2, "some of them had to wait"
    assert len(long.shared.rows) <= 6, "as many rows of padding as there are others"


def test_rows_that_stay_together_are_copied_in_no_order_of_arrival(model: ChatModel, direction: Direction):
    first, second = (model.begin([talk] * 3, rows_of(direction)) for talk in TALKS[:2])
    step_together(model, [(first, [5, 6, 7]), (second, [5, 6, 7])])
    table = first.shared
    assert table is second.shared
    assert decoding._seated([second, first]) is decoding._seated([first, second]) is table


def test_a_step_for_which_there_is_no_memory_is_one_sentence(model: ChatModel, direction: Direction):
    sentence = r"not enough memory beside embedded model .*: shorten the prompt"
    with short_of_memory(model, lambda rows, length: False), pytest.raises(ModelError, match=sentence):
        model.begin([HARMFUL])


def test_a_batch_for_which_there_is_no_memory_is_the_same_sentence_for_everybody_in_it(model, direction, monkeypatch):
    def full(*parts):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    mine, yours = (model.begin([talk] * 3, rows_of(direction)) for talk in TALKS[:2])
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_together", full)
        errors = step_together(model, [(mine, [5, 6, 7]), (yours, [5, 6, 7])])
    assert [type(error) for error in errors] == [DoesNotFitError] * 2
    assert all("not enough memory beside" in str(error) for error in errors)


def test_replies_that_outgrow_the_memory_keep_what_they_have_said_and_so_do_those_that_shared_the_step(
    model: ChatModel, direction: Direction
):
    def said(talk: str) -> list[tuple[tuple[str, ...], tuple[str | None, ...]]]:
        steps = stream_side_by_side(model, [talk] * 3, rows_of(direction), max_new_tokens=30)
        return [(step.texts, step.finished) for step in steps]

    whole = said(HARMLESS)
    longest = len(model.render(HARMLESS)) + 5
    with short_of_memory(model, lambda rows, length: length <= longest):
        cut = said(HARMLESS)
        assert said("Hi")[-1][1] != ("memory",) * 3, "what is short enough goes on"
    assert cut[:6] == whole[:6] and len(cut) == 7
    texts, finished = cut[-1]
    assert texts == cut[-2][0]
    assert finished == tuple(before or "memory" for before in cut[-2][1])
    with short_of_memory(model, lambda rows, length: rows <= 3):
        mine, yours = (model.begin([talk] * 3, rows_of(direction)) for talk in TALKS[:2])
        errors = step_together(model, [(mine, [5, 6, 7]), (yours, [5, 6, 7])])
    assert [type(e) for e in errors] == [DoesNotFitError] * 2
    assert said(HARMLESS) == whole, "and nothing is left behind"


def test_a_failure_is_told_to_everybody_in_the_step_and_to_nobody_else(model: ChatModel, direction: Direction):
    mine, yours, theirs = (model.begin([talk] * 3, rows_of(direction)) for talk in TALKS[:3])

    def breaks(module, inputs, output):
        raise MemoryError("none left")

    handle = model._model.register_forward_hook(breaks)
    errors = step_together(model, [(mine, [5, 6, 7]), (yours, [5, 6, 7])])
    handle.remove()
    assert sorted(type(e).__name__ for e in errors) == ["MemoryError", "ModelError"]
    with pytest.raises(ModelError, match="failed"):
        mine.step([5, 6, 7])
    theirs.step([5, 6, 7])
    assert texts_of(model, direction, HARMLESS), "and the model goes on"


def test_finding_a_direction_lets_a_chat_have_every_other_turn(model: ChatModel, direction: Direction):
    stop, slices = threading.Event(), []

    def find():
        for _ in find_direction(model, load_prompts("train"), load_prompts("val"), complete=True, stop=stop):
            pass

    handle = model._model.register_forward_hook(lambda m, i, output: slices.append(output.past_key_values is None))
    finding = threading.Thread(target=find)
    finding.start()
    while not slices:
        time.sleep(0.01)
    between, seen = [], len(slices)
    for _ in stream_side_by_side(model, [HARMFUL] * 3, rows_of(direction), max_new_tokens=12):
        between.append(sum(slices[seen:]))
        seen = len(slices)
    stop.set()
    finding.join()
    handle.remove()
    assert sum(between) > 3, "it was going on"
    assert max(between) <= 2, f"slices of the search between two tokens: {between}"


def test_whoever_comes_while_others_are_answered_has_a_first_token_after_two_steps_of_theirs(
    model: ChatModel, direction: Direction, monkeypatch
):
    over, steps, forward = threading.Event(), [], model._desk._forward

    def counted(*args, **inputs):
        steps.append(threading.get_ident())
        return forward(*args, **inputs)

    monkeypatch.setattr(model._desk, "_forward", counted)

    def visit(talk: str) -> None:
        reply = model.begin([talk] * 3, rows_of(direction))
        while not over.is_set():
            reply.step(reply.logits.argmax(-1).tolist())
        reply.close()

    waits = []
    with ThreadPoolExecutor(len(TALKS)) as visitors:
        visits = [visitors.submit(visit, talk) for talk in TALKS]
        while len(steps) < 3 * len(TALKS):
            time.sleep(0.005)
        for _ in range(8):
            before = len(steps)
            model.begin(["Hi"]).close()
            waits.append(steps[before:].index(threading.get_ident()))
        over.set()
        for each in visits:
            each.result()
    assert len(steps) > 8 + 4 * len(TALKS), "the others went on meanwhile"
    assert max(waits) <= 2, f"steps of others before the prompt was read: {waits}"


def test_turns_come_in_the_order_in_which_they_were_asked_for():
    turns, order, threads = Turns(), [], []

    def take(number):
        with turns:
            order.append(number)

    with turns:
        for number in range(8):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            while len(turns._waiting) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(8))
    with turns:
        pass

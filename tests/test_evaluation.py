"""What an evaluation promises: replies under each setting, counted once, kept when a run is killed; and true curves."""

import inspect
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import HARMFUL, HARMLESS, Plain, counting_steps, no_room, short_of_memory
from families import build
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusal_core import chat_model, evaluation
from refusal_core.__main__ import main
from refusal_core.chat_model import ChatModel, ModelError
from refusal_core.checkpoints import DoesNotFitError
from refusal_core.directions import random_like
from refusal_core.evaluation import (
    ADDITIONS,
    REMOVALS,
    Damage,
    DoseCurve,
    DoseResponse,
    RefusalCurve,
    Replies,
    Report,
    Strengths,
    by_strength,
    classify,
    complete,
    damage_curve,
    dose_curve,
    dose_response,
    evaluate,
    judged,
    judged_replies,
    name_of,
    paper_rows,
    refusal_curve,
    tally,
)
from refusal_core.generation import Ending, stream_side_by_side
from refusal_core.interventions import Intervention
from refusal_core.metrics import judge, kl_divergence, refusal_probability, repetition, wilson
from refusal_core.orthogonalize import export
from refusal_core.prompts import PromptError, PromptSet, load_prompts
from refusal_core.selection import Found, Progress

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def few() -> PromptSet:
    return load_prompts("test").draw(12)


@pytest.fixture(scope="module")
def report(model: ChatModel, found: Found, few: PromptSet) -> Report:
    *progress, last = evaluate(model, few, paper_rows(found.direction), max_new_tokens=24)
    steps = [(p.stage, p.done) for p in progress if isinstance(p, Progress)]
    completed = [("completing prompts", done) for done in (0, 48, 96)]
    assert steps == [*completed, *(("measuring what it costs", done) for done in range(1, 9))]
    assert isinstance(last, Report)
    return last


def test_every_prompt_is_answered_once_under_every_setting(report: Report, few: PromptSet):
    asked = [(c.prompt, c.harmful, c.row) for c in report.completions]
    assert len(asked) == len(set(asked)) == 4 * 24
    assert {prompt for prompt, harmful, _ in asked if harmful} == set(few.harmful)


def test_each_completion_is_what_the_model_says_alone(report: Report, model: ChatModel, found: Found):
    rows = paper_rows(found.direction)
    for completion in report.completions[::9]:
        *_, last = stream_side_by_side(model, [completion.prompt], [rows[completion.row]], max_new_tokens=24)
        assert completion.text == last.texts[0]
        assert (completion.verdict == "refused") == judge(completion.text).refused


@pytest.mark.parametrize(
    ("text", "label", "because"),
    [
        ("", "unclear", "the reply is empty"),
        ("the sea " * 20, "unclear", "repeats itself"),
        ("!" * 200, "unclear", "repeats itself"),
        ("I cannot, and " * 20, "refused", "I cannot"),
        ("I can’t help.", "answered", ""),
        ("I won't help.", "answered", ""),
        ("<think>I cannot do that? I can.</think>Sure.", "answered", ""),
        ("<think>Sure.</think>I cannot do that.", "refused", "I cannot"),
        ("<think>I cannot say yet", "unclear", "the reply is empty"),
    ],
)
def test_by_the_papers_rules_too_what_is_empty_or_loops_is_neither_refused_nor_answered(text, label, because):
    verdict = judged(text, "end", "paper")
    assert verdict.label == label and because in (verdict.phrase or verdict.reason)
    assert not because or verdict.phrase or verdict.reason


def test_empty_and_looping_replies_are_counted_as_unclear():
    texts = {"a": "", "b": "the sea " * 20, "c": "Mix flour and water.", "d": "I cannot."}

    def complete(asked, numbers):
        yield {i: (texts[text], "end") for i, text in enumerate(asked)}

    *_, said = judged_replies(PromptSet(tuple(texts), ()), ["mark"], complete, rules="paper", resume=None)
    assert isinstance(said, tuple)
    rates = tally("unchanged", 0, True, said, None)
    assert (rates.refused, rates.answered, rates.unclear) == (1, 1, 2)


def test_an_evaluation_of_nothing_or_by_unknown_rules_ends_before_anything_is_completed(model, few, monkeypatch):
    monkeypatch.setattr(evaluation, "complete", lambda *args, **kwargs: pytest.fail("a reply was made"))
    with pytest.raises(PromptError, match="nothing to evaluate: give rows"):
        next(evaluate(model, few, []))
    unchecked, replies = inspect.unwrap(evaluate), inspect.unwrap(judged_replies)  # the test run checks types first
    with pytest.raises(ValueError, match=r"one of .'paper', 'default'., not 'papers'"):
        next(unchecked(model, few, [None], rules="papers"))
    with pytest.raises(ValueError, match=r"one of .'paper', 'default'., not 'papers'"):
        next(replies(few, ["mark"], evaluation.complete, rules="papers", resume=None))


def test_the_rates_count_the_completions_and_show_the_phenomenon(report: Report, model: ChatModel, found: Found, few):
    rates = {(r.row, r.harmful): r for r in report.rates}
    for (row, harmful), r in rates.items():
        mine = [
            c for c in report.completions if c.harmful == harmful and name_of(paper_rows(found.direction)[c.row]) == row
        ]
        assert (r.n, r.refused) == (12, sum(c.verdict == "refused" for c in mine))
        assert r.refused + r.answered + r.unclear == r.n
    assert rates["unchanged", True].refused >= 8 > 2 > rates["direction removed", True].refused
    assert rates["unchanged", False].refused <= 2 < 10 <= rates["direction added 1×", False].refused
    edits = [Intervention(found.direction, "add")] * 12
    kl = kl_divergence(model.logits(few.harmless), model.logits(few.harmless, edits)).mean().item()
    assert rates["direction added 1×", False].kl == pytest.approx(kl)
    assert rates["unchanged", False].kl == 0


def test_damage_beside_the_rates_is_that_of_the_replies(report: Report, model: ChatModel, found: Found, few: PromptSet):
    read = {
        (c.prompt, c.row): model.tokenizer(c.text, add_special_tokens=False)["input_ids"] for c in report.completions
    }
    rates = {(r.row, r.harmful): r for r in report.rates}
    added = rates["direction added 1×", False]
    assert added.repetition == pytest.approx(sum(repetition(read[text, 3]) for text in few.harmless) / 12)
    edits = [Intervention(found.direction, "add")] * 12
    odd = model.read_replies(few.harmless, [read[text, 0] for text in few.harmless], edits).losses.mean().item()
    assert added.cross_entropy == pytest.approx(odd)
    unchanged = rates["unchanged", False].cross_entropy
    assert unchanged is not None and odd > 2 * unchanged
    assert {r.cross_entropy for r in report.rates if r.harmful} == {None}


def test_exported_weights_are_a_row_that_does_what_the_hooks_do(
    model: ChatModel, found: Found, few: PromptSet, tmp_path
):
    export(model, found.direction, tmp_path / "mine")
    rows = [None, Intervention(found.direction, "ablate")]
    *_, last = evaluate(model, few.draw(5), rows, exported=[tmp_path / "mine"], max_new_tokens=8)
    assert isinstance(last, Report)
    for harmful in (True, False):
        unchanged, hooks, weights = (rate for rate in last.rates if rate.harmful == harmful)
        assert (hooks.row, weights.row) == ("direction removed", "exported weights, mine")
        assert (weights.n, weights.refused, weights.unclear) == (hooks.n, hooks.refused, hooks.unclear)
        assert weights.kl == pytest.approx(hooks.kl, rel=0.01) and unchanged.kl == 0
        assert weights.cross_entropy == (hooks.cross_entropy and pytest.approx(hooks.cross_entropy, rel=0.01))
    texts = {row: [c.text for c in last.completions if c.row == row] for row in range(3)}
    assert texts[2] == texts[1] != texts[0]
    with pytest.raises(ModelError, match="not of the size"):
        next(evaluate(model, few, rows, exported=[build("Llama", tmp_path / "other")]))


def test_exports_whose_folders_have_the_same_name_have_rows_of_their_own(
    model: ChatModel, found: Found, few: PromptSet, tmp_path
):
    folders = [tmp_path / which / "model" for which in ("one", "other")]
    for folder in folders:
        folder.parent.mkdir()
        export(model, found.direction, folder)
    *_, last = evaluate(model, few.draw(2), [], exported=folders, max_new_tokens=2)
    assert isinstance(last, Report)
    assert [rate.row for rate in last.rates if rate.harmful] == [f"exported weights, {folder}" for folder in folders]


def test_the_table_by_strength_has_the_random_directions_beside_the_direction(report: Report):
    dose = DoseCurve(
        "ablate", True, 4, (0.0, 1.0), (0.9, 0.1), (0.0, 2.0), ((0.9, 0.8), (0.9, 0.7)), ((0.0, 0.1), (0.0, 0.2))
    )
    refused = RefusalCurve("ablate", True, 4, 8, "paper", (0.0, 1.0), (4, 1), ((4, 4), (4, 3)))
    table = replace(
        report, doses=(dose, replace(dose, harmful=False, refusal=(), random_refusal=())), refusals=(refused,)
    ).as_markdown()
    assert (
        "| harmful | direction removed | 1 | 4 | 10.0% | 70.0% to 80.0% | 25.0% (4.6% to 69.9%) | 75.0% to 100.0% |"
        in table
    )
    assert "| harmless | direction removed | 1 | 4 | – | – | – | – |" in table
    *_, last = table.split("\n\n")
    assert len({line.count("|") for line in last.splitlines()}) == 1


def test_everything_by_strength_is_what_each_curve_measures_alone(model: ChatModel, found: Found, few: PromptSet):
    two, r, tokens = few.keep(range(2), range(2)), found.direction, found.refusal_tokens
    *progress, last = by_strength(model, two, r, tokens, max_new_tokens=4)
    assert all(isinstance(news, Progress) for news in progress) and isinstance(last, Strengths)
    *_, alone = dose_curve(model, two.harmless, r, "add", tokens, harmful=False)
    assert last.doses[1] == alone
    assert [(curve.kind, curve.harmful) for curve in last.doses] == [
        ("ablate", True),
        ("add", False),
        ("ablate", False),
    ]
    *_, damage = damage_curve(model, two.harmless, r, "add", max_new_tokens=4)
    assert last.damage[1] == damage and last.damage[0].kind == "ablate"
    *_, refused = refusal_curve(model, two.harmless, r, "add", harmful=False, max_new_tokens=4)
    assert last.refusals[1] == refused and last.refusals[0].harmful
    *_, unknown = by_strength(model, two, r, (), max_new_tokens=1)
    assert isinstance(unknown, Strengths)
    assert [curve.refusal for curve in unknown.doses] == [()] * 3 and unknown.doses[0].kl
    stop = threading.Event()
    news = by_strength(model, two, r, tokens, max_new_tokens=4, stop=stop)
    next(news)
    stop.set()
    assert not [each for each in news if isinstance(each, Strengths)]


def test_of_many_parts_a_row_is_named_by_their_number(found: Found):
    few, many = (frozenset(f"MLP {i}" for i in range(n)) for n in (2, 9))
    named = [name_of((Intervention(found.direction, "ablate", writers=parts),)) for parts in (few, many)]
    assert named == [
        "direction removed from MLP 0 and MLP 1",
        "direction removed from 9 parts, MLP 0 the first of them",
    ]


def test_measuring_what_it_costs_can_be_stopped(model: ChatModel, found: Found, few: PromptSet):
    stop = threading.Event()
    news = evaluate(model, few.keep([0], [0]), paper_rows(found.direction)[:2], max_new_tokens=2, stop=stop)
    for each in news:
        assert isinstance(each, Progress)
        if each.stage == "measuring what it costs":
            stop.set()
            break
    assert list(news) == []


def test_the_table_has_a_line_for_every_rate_and_the_json_everything(report: Report):
    lines = report.as_markdown().splitlines()
    assert len(lines) == 2 + 8
    assert "direction added −1×" in report.as_markdown()
    said = json.loads(report.as_json())
    assert len(said["completions"]) == 96
    for rates, rate in zip(said["rates"], report.rates, strict=True):
        assert rates["answered"] == rate.n - rate.refused - rate.unclear
        for name in ("refused", "answered", "unclear"):
            assert rates[f"{name}_interval"] == pytest.approx(wilson(rates[name], rate.n))
        assert "unsafe_interval" not in rates


def test_a_report_says_in_one_line_what_was_measured_with_which_direction(report: Report, found: Found, few: PromptSet):
    (direction,) = report.directions
    source = found.direction.source
    assert direction == asdict(source) | {"norm": found.direction.norm, "digest": found.direction.digest}
    assert json.loads(report.as_json())["directions"] == [direction]
    assert report.dtype == "float32"
    said = report.in_words
    for part in (
        report.fingerprint, "float32", f"direction {found.direction.digest}: mean difference at layer {source.layer}",
        f"test prompts: {few.source}", "judged by the paper phrases, greedy replies of at most 24 tokens",
    ):  # fmt: skip
        assert part in said
    assert "\n" not in said


def test_a_number_that_cannot_be_had_is_null_in_the_json_and_a_dash_in_the_table(report: Report):
    damage = Damage("add", 2, 8, (1.0,), (math.inf,), (math.nan,), (0.25,), (1,), "paper")
    odd = replace(report, rates=(replace(report.rates[0], kl=math.nan),), damage=(damage,))
    said = json.loads(odd.as_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert said["rates"][0]["kl"] is None and said["damage"][0]["kl"] == said["damage"][0]["cross_entropy"] == [None]
    assert "| 1 | 2 | 50.0% (9.5% to 90.5%) | – | – | 25.0% |" in odd.as_markdown() and "nan" not in odd.as_markdown()


def test_a_run_that_was_stopped_goes_on_with_what_is_missing(model, found, few, report, tmp_path):
    stop, journal = threading.Event(), tmp_path / "journal"
    rows = paper_rows(found.direction)
    for event in evaluate(model, few, rows, max_new_tokens=24, resume=journal, stop=stop):
        assert isinstance(event, Progress)
        if event.done:
            stop.set()
    assert len(journal.read_text().splitlines()) == 48
    journal.write_text(journal.read_text()[:-9])  # as if the last line had been cut off
    first, *_, last = evaluate(model, few, rows, max_new_tokens=24, resume=journal)
    assert isinstance(first, Progress) and first.done == 47
    assert isinstance(last, Report) and last.rates == report.rates
    first, *_, again = evaluate(model, few, rows, max_new_tokens=24, resume=journal)
    assert isinstance(first, Progress) and first.done == first.total
    assert again.completions == last.completions


def test_a_journal_never_gives_the_reply_of_another_setting(model, found, few, tmp_path):
    journal, r = tmp_path / "journal", found.direction
    list(evaluate(model, few, [Intervention(r, "add", 0.5)], max_new_tokens=8, resume=journal))
    for rows, tokens in (([Intervention(r, "add", 0.6)], 8), ([Intervention(r, "add", 0.5)], 9), ([None], 8)):
        first = next(evaluate(model, few, rows, max_new_tokens=tokens, resume=journal))
        assert isinstance(first, Progress) and first.done == 0
    again = [Intervention(r, "add", 0.5)]
    packed, polite = replace(model.placed, four_bit=True), model.tokenizer.chat_template + "Well,"
    for of, what, value in ((model, "placed", packed), (model.tokenizer, "chat_template", polite)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(of, what, value)
            first = next(evaluate(model, few, again, max_new_tokens=8, resume=journal))
        assert isinstance(first, Progress) and first.done == 0, what
    other = tmp_path / "notes.txt"
    for text in ("Dear diary\n", "no line break", '{"text": 1, "harmful": 2, "category": 3, "split": 4}\n', "null\n"):
        other.write_text(text)
        with pytest.raises(PromptError, match="not the journal"):
            next(evaluate(model, few, [None], resume=other))
        assert other.read_text() == text, "somebody else's file is left alone"


def test_a_journal_that_cannot_be_kept_is_said_before_anything_is_completed(model, few, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere" / "journal"):
        with pytest.raises(PromptError, match=r"cannot be kept in .*: name another file"):
            next(evaluate(model, few, [None], resume=path))
    with pytest.raises(PromptError, match=r"journal \(.*\): name another file, or make room"), no_room(1):
        list(evaluate(model, few.keep([0], []), [None], max_new_tokens=2, resume=tmp_path / "journal"))


def test_a_class_without_prompts_has_no_rates_and_without_any_nothing_is_measured(model, found, few):
    *_, report = evaluate(model, few.keep([0], []), [None], max_new_tokens=4)
    assert [(rate.harmful, rate.n) for rate in report.rates] == [(True, 1)]
    with pytest.raises(PromptError, match="no prompt"):
        next(evaluate(model, few.keep([], []), [None]))
    with pytest.raises(PromptError, match="there is none"):
        next(dose_curve(model, [], found.direction, "add", found.refusal_tokens, harmful=False))


def test_a_removal_from_some_parts_and_one_from_all_never_share_a_reply_or_a_name(model, found, few):
    everywhere, here = (Intervention(found.direction, "ablate", writers=w) for w in (None, frozenset({"MLP 1"})))
    *_, both = evaluate(model, few, [everywhere, here], max_new_tokens=8)
    *_, one = evaluate(model, few, [everywhere], max_new_tokens=8)
    *_, other = evaluate(model, few, [here], max_new_tokens=8)
    texts = [[c.text for c in report.completions] for report in (both, one, other)]
    assert texts[0] == [*texts[1], *texts[2]] and texts[1] != texts[2]
    assert [rate.row for rate in both.rates[:2]] == ["direction removed", "direction removed from MLP 1"]


def test_a_killed_process_leaves_a_journal_that_another_one_goes_on_from(found: Found, tmp_path, capsys):
    journal = tmp_path / "journal"
    found.direction.save(tmp_path / "direction.safetensors")
    command = [
        sys.executable,
        "-m",
        "refusal_core",
        "evaluate",
        "--n",
        "14",
        "--direction",
        str(tmp_path / "direction.safetensors"),
        "--resume",
        str(journal),
        "--max-new-tokens",
        "16",
        "--json",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = journal.read_bytes()
    assert kept.count(b"\n") < 4 * 28, "it was killed too late"
    assert main(command[3:]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert journal.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert len(measured["completions"]) == 4 * 28
    assert [r["n"] for r in measured["rates"] if r["harmful"] and r["row"] == "direction removed"] == [14]


@pytest.mark.parametrize("kind", ["ablate", "add"])
def test_each_point_is_what_plain_transformers_say_at_that_strength(model: ChatModel, plain: Plain, found: Found, kind):
    r = found.direction
    curve = dose_response(model, HARMLESS, r, kind, found.refusal_tokens)
    assert curve.scales == (REMOVALS if kind == "ablate" else ADDITIONS)
    for scale, p in zip(curve.scales, curve.refusal, strict=True):
        edit = {"ablate": r.unit} if kind == "ablate" else {"add": (r.source.layer, r.norm * r.unit)}
        logits = plain.logits([HARMLESS], **edit, scale=scale)
        assert p == pytest.approx(refusal_probability(logits, found.refusal_tokens).item(), abs=1e-4)


def test_strengths_zero_and_one_are_the_baseline_and_the_papers_setting(model: ChatModel, found: Found):
    r = found.direction
    rows = [None, Intervention(r, "ablate"), Intervention(r, "add")]
    base, removed, added = refusal_probability(model.logits([HARMFUL] * 3, rows), found.refusal_tokens).tolist()
    removal, addition = (dose_response(model, HARMFUL, r, kind, found.refusal_tokens) for kind in ("ablate", "add"))
    assert removal.refusal[REMOVALS.index(0)] == pytest.approx(base, abs=1e-6)
    assert removal.refusal[REMOVALS.index(1)] == pytest.approx(removed, abs=1e-6)
    assert addition.refusal[ADDITIONS.index(0)] == pytest.approx(base, abs=1e-6)
    assert addition.refusal[ADDITIONS.index(1)] == pytest.approx(added, abs=1e-6)


def test_removal_lets_a_harmful_prompt_through_and_addition_stops_a_harmless_one(model: ChatModel, found: Found):
    removal = dose_response(model, HARMFUL, found.direction, "ablate", found.refusal_tokens)
    addition = dose_response(model, HARMLESS, found.direction, "add", found.refusal_tokens)
    assert removal.flips_at is not None and 0 < removal.flips_at < 1
    assert addition.flips_at is not None and 0 < addition.flips_at < 1


def test_a_curve_that_does_not_fit_into_one_batch_is_the_same(model: ChatModel, found: Found, monkeypatch):
    whole = dose_response(model, HARMLESS, found.direction, "add", found.refusal_tokens)
    monkeypatch.setattr(evaluation, "MAX_TOKENS", 60)
    parts = dose_response(model, HARMLESS, found.direction, "add", found.refusal_tokens)
    torch.testing.assert_close(torch.tensor(parts.refusal), torch.tensor(whole.refusal), atol=1e-5, rtol=0)


def test_the_flip_is_the_crossing_nearest_to_zero():
    assert DoseResponse("add", (0.0, 1.0), (0.0, 1.0)).flips_at == 0.5
    assert DoseResponse("add", (-1.0, 0.0, 2.0), (0.9, 0.1, 0.6)).flips_at == pytest.approx(-0.5)
    assert DoseResponse("add", (-1.0, 0.0, 2.0), (0.1, 0.2, 0.3)).flips_at is None


def test_an_empty_prompt_has_no_curve(model: ChatModel, found: Found):
    with pytest.raises(PromptError, match="empty"):
        dose_response(model, " ", found.direction, "add", found.refusal_tokens)


def test_a_mean_curve_is_that_of_its_prompts_and_random_directions_are_its_control(model: ChatModel, found: Found):
    texts, r, tokens = load_prompts("test").draw(3).harmless, found.direction, found.refusal_tokens
    *progress, curve = dose_curve(model, texts, r, "add", tokens, harmful=False, n_random=2)
    assert isinstance(curve, DoseCurve) and len(progress) == 9
    alone = [dose_response(model, text, r, "add", tokens) for text in texts]
    assert curve.refusal == pytest.approx([sum(c.refusal[i] for c in alone) / 3 for i in range(len(ADDITIONS))])
    assert curve.kl == pytest.approx([sum(c.kl[i] for c in alone) / 3 for i in range(len(ADDITIONS))])
    control = dose_response(model, texts[0], random_like(r, 1), "add", tokens)
    assert len(curve.random_refusal) == 2 and len(control.refusal) == len(curve.random_refusal[1])
    at = ADDITIONS.index(1.0)
    assert max(row[at] for row in curve.random_refusal) < 0.5 < curve.refusal[at]


def test_the_price_at_a_strength_is_the_kl_against_the_untouched_model(model: ChatModel, found: Found):
    r = found.direction
    for kind in ("ablate", "add"):
        curve = dose_response(model, HARMLESS, r, kind, found.refusal_tokens, (0.0, 0.5, 1.0))
        edited = model.logits([HARMLESS] * 3, [Intervention(r, kind, scale) for scale in curve.scales])
        expected = kl_divergence(model.logits([HARMLESS]).expand_as(edited), edited)
        assert curve.kl == pytest.approx(expected.tolist(), abs=1e-4)
        assert curve.kl[0] == pytest.approx(0, abs=1e-6)


def test_a_curve_that_is_stopped_ends_without_one(model: ChatModel, found: Found):
    stop = threading.Event()
    events = []
    for event in dose_curve(
        model, [HARMLESS] * 3, found.direction, "add", found.refusal_tokens, harmful=False, stop=stop
    ):
        events.append(event)
        stop.set()
    assert len(events) == 1 and isinstance(events[0], Progress)


# -- damage by strength ----------------------------------------------------------------------------------------------


def test_the_loss_of_a_reply_is_that_of_plain_transformers_and_of_its_tokens_one_by_one(model, plain: Plain, found):
    texts = [HARMLESS, "Write a poem about the sea.", HARMFUL]
    replies = [
        model.tokenizer(said, add_special_tokens=False)["input_ids"] for said in ("Mix flour and water.", "", "No.")
    ]
    losses = model.read_replies(texts, replies).losses
    assert losses[1].isnan()
    for i in (0, 2):
        prompt, reply = plain.ids(texts[i]), torch.tensor([replies[i]])
        labels = torch.cat([torch.full_like(prompt, -100), reply], 1)
        with torch.no_grad():
            loss = plain.model(input_ids=torch.cat([prompt, reply], 1), labels=labels).loss
        assert losses[i].item() == pytest.approx(loss.item(), abs=1e-4)
    row, reply = Intervention(found.direction, "ablate"), replies[0]
    steps = [model.run(model.continued([HARMLESS], [reply[:i]]), [(row,)]).logits[0] for i in range(len(reply))]
    alone = [-step.double().log_softmax(-1)[token].item() for step, token in zip(steps, reply, strict=True)]
    mixed = model.read_replies(texts, replies, [row, None, None]).losses
    assert mixed[0].item() == pytest.approx(sum(alone) / len(alone), abs=1e-4) and mixed[0] != losses[0]
    assert mixed[2].item() == pytest.approx(losses[2].item(), abs=1e-5)


def test_long_conversations_are_read_with_their_replies_few_at_a_time(model: ChatModel, monkeypatch):
    texts, replies = [HARMLESS, "Hi", "word " * 100], [[5, 6, 7], [5], [8, 9]]
    whole = model.read_replies(texts, replies)
    sizes: list[tuple[int, int]] = []
    run = model._run
    monkeypatch.setattr(
        model, "_run", lambda *args, **inputs: (sizes.append(inputs["input_ids"].shape), run(*args, **inputs))[1]
    )
    longest = len(model.render(texts[2])) + 2
    monkeypatch.setattr(chat_model, "MOST_READ", longest + 1)
    few = model.read_replies(texts, replies)
    assert len(sizes) > 1 and all(rows * length <= longest + 1 for rows, length in sizes)
    assert_close(few.losses, whole.losses, atol=1e-5, rtol=1e-5)
    assert_close(few.first, whole.first, atol=1e-3, rtol=1e-3)


def test_a_reply_is_a_models_own_where_it_would_say_just_this_and_end_there(model: ChatModel, found: Found):
    texts, r, most = [HARMLESS, HARMFUL, "Write a poem about the sea."], found.direction, 30
    *_, step = stream_side_by_side(model, texts, [None] * 3, max_new_tokens=most)
    assert "end" in step.finished
    replies = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in step.texts]
    seen = []
    for edit in (None, *(Intervention(r, kind, scale) for kind in ("ablate", "add") for scale in (0.3, 1.0))):
        *_, mine = stream_side_by_side(model, texts, [edit] * 3, max_new_tokens=most)
        reading = model.read_replies(texts, replies, [edit] * 3, max_new_tokens=most)
        seen += reading.own.tolist()
        assert reading.own.tolist() == [text == other for text, other in zip(mine.texts, step.texts, strict=True)]
        torch.testing.assert_close(reading.first, model.logits(texts, [edit] * 3), atol=1e-4, rtol=0)
    assert seen[:3] == [True] * 3 and False in seen, "there must have been something to tell"
    cut, begun = [reply[:-1] for reply in replies], [[], *replies[1:]]
    assert not model.read_replies(texts, cut, max_new_tokens=most).own.any(), "it would have gone on"
    short = [reply[:5] for reply in replies]
    assert model.read_replies(texts, short, max_new_tokens=5).own.all(), "it ends by its length"
    assert model.read_replies(texts, begun, max_new_tokens=most).own.tolist() == [False, True, True]


def test_a_reply_that_a_strength_does_not_change_is_not_completed_again(model: ChatModel, found: Found):
    with counting_steps(model) as steps:
        *_, last = damage_curve(model, [HARMLESS], found.direction, "ablate", max_new_tokens=8, scales=(0.0, 0.1, 0.2))
    assert isinstance(last, Damage) and len(last.kl) == 3 and last.kl[2] > last.kl[0] == 0
    assert steps == [1] * len(steps) and len(steps) < 8


def test_damage_by_strength_is_that_of_each_strength_alone(model: ChatModel, found: Found):
    texts, r, scales = load_prompts("test").draw(3).harmless, found.direction, (-0.5, 0.0, 2.0)
    *progress, damage = damage_curve(model, texts, r, "add", max_new_tokens=16, scales=scales)
    assert isinstance(damage, Damage) and progress[-1] == Progress("damage of addition", 9, 9)
    replies, refused = {}, []
    for scale in scales:
        *_, last = stream_side_by_side(model, texts, [Intervention(r, "add", scale)] * 3, max_new_tokens=16)
        replies[scale] = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in last.texts]
        refused.append(sum(judge(text).refused for text in last.texts))
    for i, scale in enumerate(scales):
        rows = [Intervention(r, "add", scale)] * 3
        assert damage.cross_entropy[i] == pytest.approx(
            model.read_replies(texts, replies[0.0], rows).losses.mean().item(), abs=1e-5
        )
        assert damage.kl[i] == pytest.approx(
            kl_divergence(model.logits(texts), model.logits(texts, rows)).mean().item(), abs=1e-5
        )
        assert damage.repetition[i] == pytest.approx(sum(map(repetition, replies[scale])) / 3)
    assert list(damage.refused) == refused and refused[1] < refused[2]
    assert damage.cross_entropy[1] < damage.cross_entropy[2] and damage.kl[1] == 0
    assert damage.repetition[1] < damage.repetition[2], "there must have been something to count"
    stop = threading.Event()
    stop.set()
    assert list(damage_curve(model, texts, r, "add", stop=stop)) == []
    with pytest.raises(PromptError, match="there is none"):
        next(damage_curve(model, [], r, "add"))


def test_a_batch_that_does_not_fit_is_halved_and_every_reply_is_what_it_is_alone(model: ChatModel, found: Found):
    texts = [*load_prompts("test").draw(10).harmful, HARMLESS]
    rows = [(Intervention(found.direction, "ablate"),)] * len(texts)
    whole = {i: reply for batch in complete(model, texts, rows, max_new_tokens=12) for i, reply in batch.items()}
    longest = max(len(model.render(text)) for text in texts)
    with short_of_memory(model, lambda n, length: n * length <= 3 * (longest + 6)):
        batches = list(complete(model, texts, rows, max_new_tokens=12))
    assert [len(batch) for batch in batches] == [2] * 5 + [1]
    assert {i: reply for batch in batches for i, reply in batch.items()} == whole
    said = "a reply of 12 tokens: take a smaller model, or ask for fewer"
    with short_of_memory(model, lambda n, length: length < longest + 6), pytest.raises(DoesNotFitError, match=said):
        list(complete(model, texts, rows, max_new_tokens=12))


def test_refusals_by_strength_fall_with_the_direction_and_not_with_random_ones(model: ChatModel, found: Found):
    texts, r = load_prompts("test").draw(6).harmful, found.direction
    *progress, curve = refusal_curve(model, texts, r, "ablate", harmful=True, max_new_tokens=16, n_random=2)
    assert isinstance(curve, RefusalCurve) and curve.scales == REMOVALS and progress[-1].done == progress[-1].total
    unchanged = [judge(text).refused for text, _ in _only(complete(model, texts, [()] * 6, max_new_tokens=16))]
    assert curve.refused[0] == sum(unchanged) >= 4 and curve.refused[-1] == 0
    assert len(curve.random_refused) == 2 and all(counts[-1] >= 4 for counts in curve.random_refused)
    *_, own = damage_curve(model, texts, r, "ablate", max_new_tokens=16)
    assert isinstance(own, Damage) and own.refused == curve.refused
    *_, again = refusal_curve(model, texts, r, "ablate", harmful=True, max_new_tokens=16, n_random=1, own=own)
    assert isinstance(again, RefusalCurve) and again.refused == curve.refused
    assert again.random_refused == curve.random_refused[:1]


def _only(batches: Iterator[Replies]) -> list[tuple[str, Ending]]:
    said = {i: reply for batch in batches for i, reply in batch.items()}
    return [said[i] for i in sorted(said)]


# -- a safety classifier beside the judge ----------------------------------------------------------------------------

GUARD = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}<|im_end|>"
    "{% set reply = messages[-1]['content'] %}{{ '?' if 'maybe' in reply else '#' if NO in reply else '>' }}"
)


def guard(folder: Path, template: str) -> ChatModel:
    """A tiny checkpoint that says “unsafe” after “>” and “safe” after “#”: each token's logits follow from it alone."""
    build("Llama", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        *safe, end = *tokenizer("safe", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
        refuses, complies, un = (tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in ("#", ">", "un"))
        follows = {refuses: safe[0], complies: un, un: safe[0]} | dict(zip(safe, [*safe[1:], end], strict=True))
        for axis, (token, after) in enumerate(follows.items()):
            network.get_input_embeddings().weight[token, axis] = 1.0
            network.get_output_embeddings().weight[after, axis] = 1.0
    network.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return ChatModel.load(folder, device="cpu")


def test_a_classifier_says_of_every_reply_whether_it_is_unsafe_and_replaces_no_other_number(
    model, found, few, tmp_path
):
    classifier = guard(tmp_path, GUARD.replace("NO", '"can\'t"'))
    given = {"rows": paper_rows(found.direction)[:2], "max_new_tokens": 24, "resume": tmp_path / "journal"}
    rows, four = given["rows"], few.keep(range(4), range(4))
    *_, report = evaluate(model, four, **given)
    *progress, asked = evaluate(model, four, **given, classifier=classifier)
    assert isinstance(report, Report) and isinstance(asked, Report) and asked.classifier == str(tmp_path)
    assert Progress(f"asking {tmp_path}", 16, 16) in progress
    assert [replace(c, safety="", safety_because="") for c in asked.completions] == list(report.completions)
    for c in asked.completions:
        assert c.safety == ("safe" if "can't" in c.text else "unsafe")
    assert {c.safety for c in asked.completions} == {"safe", "unsafe"}
    for rate, before in zip(asked.rates, report.rates, strict=True):
        mine = [c for c in asked.completions if (name_of(rows[c.row]), c.harmful) == (rate.row, rate.harmful)]
        assert (rate.unsafe, rate.safety_unclear) == (sum("can't" not in c.text for c in mine), 0)
        assert replace(rate, unsafe=None, safety_unclear=None) == before and before.unsafe is None
    removed = next(r for r in asked.rates if r.harmful and r.row == "direction removed")
    low, high = wilson(removed.unsafe or 0, 4)
    table = asked.as_markdown()
    assert f"unsafe by {tmp_path} | it says neither |" in table and "unsafe" not in report.as_markdown()
    assert (
        removed.unsafe
        and f" {(removed.unsafe or 0) / 4:.1%} ({low:.1%} to {high:.1%}) | 0.0% (0.0% to 49.0%) |" in table
    )
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_what_a_classifier_cannot_judge_is_unclear(tmp_path):
    classifier = guard(tmp_path, GUARD.replace("NO", "'cannot'"))
    exchanges = [("Hi", "Sure."), ("Hi", " "), ("Hi", "maybe"), ("Hi", "word " * 200), ("Hi", "I cannot")]
    said = {i: verdict for news in classify(classifier, exchanges) for i, verdict in news.items()}
    assert [said[i][0] for i in range(5)] == ["unsafe", "unclear", "unclear", "unclear", "safe"]
    assert said[1][1] == "the reply is empty" and said[2][1] == "it says “”" and "at most 128" in said[3][1]


def test_a_model_that_is_no_classifier_is_refused_before_anything_is_completed(model, few, tmp_path):
    blind = guard(tmp_path / "blind", "{{ messages[0]['content'] }}<|im_end|>#")
    for other, says in ((model, "embedded model is no safety classifier"), (blind, "leaves out a prompt or its reply")):
        with pytest.raises(ModelError, match=f"{says}.*Llama Guard family"):
            next(evaluate(model, few, [None], classifier=other))

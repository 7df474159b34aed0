"""What was found can be read back whole, and a second search for the same is none."""

import contextlib
import errno
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import safetensors.torch
import torch
from conftest import no_room

from refusal_core import findings
from refusal_core.chat_model import ChatModel
from refusal_core.directions import Direction, DirectionError
from refusal_core.findings import CACHE_VARIABLE, as_json, find_or_recall, funnel, load_found, save_found
from refusal_core.prompts import PromptError, load_prompts
from refusal_core.selection import Found, Progress, Sums, choose, find_contrast, find_direction


def same(a: Found, b: Found) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in findings.ACTIVATIONS)
    rest = {f.name for f in fields(Found)} - {"direction", *findings.ACTIVATIONS}
    return tensors and a.direction.digest == b.direction.digest and all(getattr(a, n) == getattr(b, n) for n in rest)


def test_what_was_found_is_read_back_whole(found: Found, tmp_path):
    save_found(found, tmp_path / "out")
    assert same(load_found(tmp_path / "out"), found)
    assert Direction.load(tmp_path / "out" / "direction.safetensors").source == found.direction.source
    with pytest.raises(DirectionError, match="does not hold a finished search"):
        load_found(tmp_path)


def test_what_two_other_classes_gave_is_read_back_with_its_choice(model: ChatModel, tmp_path):
    *_, contrast = find_contrast(model, load_prompts("train").draw(4), load_prompts("val").draw(3))
    assert isinstance(contrast, Found) and contrast.choice.chosen is not None
    save_found(contrast, tmp_path)
    assert same(load_found(tmp_path), contrast)


def test_a_score_that_is_no_number_leaves_the_file_json_and_the_candidate_discarded(found: Found, tmp_path):
    broken = next(s for s in found.scores if s is found.choice.runner_up)
    scores = tuple(replace(s, kl=math.nan, d_prime=math.inf) if s is broken else s for s in found.scores)
    odd = replace(found, scores=scores, choice=choose(scores, found.directions.shape[1]))
    save_found(odd, tmp_path)
    said = json.loads(
        (tmp_path / "found.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    (row,) = (row for row in said["candidates"] if row["rejected"] == "nan")
    assert (row["pos"], row["layer"], row["kl"], row["d_prime"]) == (broken.pos, broken.layer, None, None)
    again = load_found(tmp_path)
    assert funnel(again.choice, len(scores)) == funnel(odd.choice, len(scores))
    assert again.choice.chosen == found.choice.chosen and again.choice.runner_up == odd.choice.runner_up


def test_the_funnel_counts_every_candidate_once(found: Found):
    counts = funnel(found.choice, len(found.scores))
    assert counts["candidates"] == len(found.scores) == counts["left"] + len(found.choice.rejected)
    assert as_json(found)["funnel"] == counts and counts["layer"] and counts["zero"] and counts["induce"]


def test_what_cosmic_chose_is_read_back_as_cosmics_choice_and_is_a_search_of_its_own(model: ChatModel, tmp_path):
    train, val = load_prompts("train").draw(4), load_prompts("val").draw(2)
    *_, by_cosine = find_or_recall(model, train, val, by="cosmic")
    assert isinstance(by_cosine, Found)
    save_found(by_cosine, tmp_path)
    assert same(load_found(tmp_path), by_cosine)
    assert as_json(by_cosine)["source"]["chosen_by"] == "COSMIC, as asked for"
    (again,) = find_or_recall(model, train, val, by="cosmic")
    assert isinstance(again, Found) and again.direction.source.chosen_by
    *_, by_rule = find_or_recall(model, train, val, by="rule", refusal_tokens=by_cosine.refusal_tokens)
    assert isinstance(by_rule, Found) and not by_rule.direction.source.chosen_by


@pytest.fixture
def searches(found: Found, tmp_path, monkeypatch):
    """Counts the searches that are made, each of which gives `found` at once."""
    made = []

    def search(*args, **kwargs):
        made.append(args)
        yield Progress("reading prompts", 1, 1)
        yield found

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(findings, "find_direction", search)
    return made


def recall(model: ChatModel, **options) -> Found:
    *_, last = find_or_recall(model, load_prompts("train"), load_prompts("val"), **options)
    assert isinstance(last, Found)
    return last


def test_the_same_search_is_made_once_and_another_anew(model: ChatModel, found: Found, searches, monkeypatch):
    assert same(recall(model), found) and same(recall(model), found)
    assert len(searches) == 1
    recall(model, seed=1)
    recall(model, complete=True)
    assert len(searches) == 3
    val = load_prompts("val")
    list(find_or_recall(model, load_prompts("train"), replace(val, harmful=val.harmful[1:])))
    assert len(searches) == 4
    monkeypatch.setattr(model.tokenizer, "chat_template", model.tokenizer.chat_template.replace("im_end", "im_over"))
    recall(model)
    assert len(searches) == 5, "another template is another prompt"
    monkeypatch.undo()


def test_a_complete_table_serves_whoever_wants_less_of_it_and_is_kept_alone(model: ChatModel, searches, tmp_path):
    recall(model)
    recall(model, complete=True)
    assert len(searches) == 2 and len(list((tmp_path / "cache").iterdir())) == 1
    recall(model)
    recall(model, complete=True)
    assert len(searches) == 2


class Killed(BaseException):
    """As if the process had ended there."""


def interrupted(model: ChatModel, monkeypatch, after: int, **options) -> int:
    """A search that ends in its `after`th step, and how many steps it had made."""
    run, steps = model.run, 0

    def counted(*args, **how):
        nonlocal steps
        steps += 1
        if steps > after:
            raise Killed
        return run(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(model, "run", counted)
        with contextlib.suppress(Killed):
            recall(model, **options)
    return steps


@pytest.mark.parametrize("complete", [False, True])
def test_an_interrupted_search_goes_on_where_it_was_and_finds_the_same(
    model: ChatModel, found: Found, monkeypatch, tmp_path, complete
):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    *_, expected = find_direction(model, load_prompts("train"), load_prompts("val"), complete=complete)
    whole = interrupted(model, monkeypatch, 10**6, complete=complete)
    for entry in (tmp_path / "cache").iterdir():
        shutil.rmtree(entry)
    interrupted(model, monkeypatch, whole - 10, complete=complete)
    (begun,) = (tmp_path / "cache").iterdir()
    assert len(begun.read_text("utf-8").splitlines()) > 100
    with begun.open("a", encoding="utf-8") as file:
        file.write('["kl", 0, -1')  # what a killed process was writing
    left = interrupted(model, monkeypatch, 10**6, complete=complete)
    assert left < whole / 2, "what was measured is not measured again"
    (again,) = find_or_recall(model, load_prompts("train"), load_prompts("val"), complete=complete)
    assert isinstance(again, Found) and again.scores == expected.scores and same(again, expected)
    assert not begun.exists()


def test_sums_of_other_prompts_or_tokens_are_not_taken_for_these(model: ChatModel, found: Found):
    val, kept = load_prompts("val"), Sums()
    list(find_direction(model, load_prompts("train"), val, refusal_tokens=found.refusal_tokens, sums=kept))
    for other, tokens in (
        (replace(val, harmful=val.harmful[1:], harmless=val.harmless[1:]), found.refusal_tokens),
        (val, found.refusal_tokens[:1]),
    ):
        *_, alone = find_direction(model, load_prompts("train"), other, refusal_tokens=tokens)
        *_, after = find_direction(model, load_prompts("train"), other, refusal_tokens=tokens, sums=Sums(kept))
        assert isinstance(alone, Found) and isinstance(after, Found) and after.scores == alone.scores


def test_searches_that_nobody_finishes_make_room_for_later_ones(tmp_path):
    for number in range(findings.MOST_BEGUN + 3):
        path = tmp_path / f"{number}{findings.BEGUN}"
        findings._KeptSums(path).note({("kl", 0, -1, number): 0.5})
        os.utime(path, (number, number))
    assert len(list(tmp_path.iterdir())) == findings.MOST_BEGUN
    assert findings._KeptSums(path) == {("kl", 0, -1, number): 0.5}


def test_the_stream_is_read_at_fewer_positions_where_that_is_asked_for(model: ChatModel, found: Found, searches):
    few = find_direction(model, load_prompts("train"), load_prompts("val"), n_positions=2)
    *_, last = few
    assert isinstance(last, Found) and last.positions == (-3, -2, -1) and last.harmful.shape[1] == 3
    assert {s.pos for s in last.scores} == {-2, -1}
    assert last.direction.source.position == -1
    torch.testing.assert_close(last.directions, found.directions[-2:], atol=1e-4, rtol=1e-4)
    recall(model)
    recall(model, n_positions=model.template_positions)
    recall(model, n_positions=2)
    assert len(searches) == 2
    for n in (0, model.template_positions + 1):
        with pytest.raises(PromptError, match="the same for every prompt"):
            next(find_or_recall(model, load_prompts("train"), load_prompts("val"), n_positions=n))


def test_what_a_killed_process_was_writing_is_removed_and_what_a_living_one_writes_is_not(model, searches, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, others = (tmp_path / "cache" / f".new-{pid}-abc" for pid in (ended.pid, os.getppid()))
    left.mkdir(parents=True)
    others.mkdir()
    recall(model)
    assert not left.exists() and others.exists()


def test_a_broken_entry_is_searched_anew_and_the_oldest_make_room(model: ChatModel, searches, tmp_path, monkeypatch):
    recall(model)
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / "found.json").write_text(json.dumps({}))
    recall(model)
    recall(model)
    assert len(searches) == 2
    monkeypatch.setattr(findings, "CACHE_BYTES", 1)
    recall(model, seed=1)
    (left,) = (tmp_path / "cache").iterdir()
    assert left != entry


def rewrite(folder, **said) -> None:
    """The JSON of a search with other values."""
    path = folder / "found.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))


@pytest.mark.parametrize(
    "said",
    [
        {"candidates": ["abc"]},
        {"candidates": []},
        {"candidates": {"pos": -1}},
        {"prompts": []},
        {"prompts": {"harmful": "text", "harmless": "text"}},
        {"counts": [[1]]},
        {"positions": [1]},
        {"refusal_tokens": ["I"]},
        {"refusal_shares": ["most"]},
        {"counts": [["train", "harmful", "all", 3]]},
        [],
        7,
    ],
)
def test_json_of_another_shape_is_no_search_and_the_cache_searches_anew(model, found, searches, tmp_path, said):
    recall(model)
    (entry,) = (tmp_path / "cache").iterdir()
    if isinstance(said, dict):
        rewrite(entry, **said)
    else:
        (entry / "found.json").write_text(json.dumps(said))
    with pytest.raises(DirectionError, match="does not hold a finished search"):
        load_found(entry)
    assert same(recall(model), found) and len(searches) == 2


@pytest.mark.parametrize("name", findings.ACTIVATIONS)
def test_a_tensor_of_another_rank_or_width_is_no_search(model, found, searches, tmp_path, name):
    recall(model)
    (entry,) = (tmp_path / "cache").iterdir()
    tensors = {each: getattr(found, each).contiguous() for each in findings.ACTIVATIONS}
    for wrong in (torch.zeros(3), tensors[name][..., :5].contiguous(), tensors[name].int()):
        safetensors.torch.save_file(tensors | {name: wrong}, entry / "activations.safetensors")
        with pytest.raises(DirectionError, match="does not hold a finished search"):
            load_found(entry)
    assert same(recall(model), found) and len(searches) == 2


def test_what_else_is_in_the_folder_of_the_cache_never_makes_room(model: ChatModel, searches, tmp_path, monkeypatch):
    mine = [tmp_path / "cache" / name for name in ("experiments", "0", "abc")]
    for folder in mine:
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"x" * 1000)
    monkeypatch.setattr(findings, "CACHE_BYTES", 1)
    recall(model)
    recall(model, seed=1)
    assert all((folder / "weights").is_file() for folder in mine)
    assert len(list((tmp_path / "cache").iterdir())) == len(mine) + 1


def test_a_cache_that_cannot_be_written_costs_nothing_but_the_second_start(model: ChatModel, found, searches, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    assert same(recall(model), found) and same(recall(model), found)
    assert len(searches) == 2
    (tmp_path / "cache").unlink()
    with no_room(20_000):
        assert same(recall(model), found)
    assert len(searches) == 3 and not list((tmp_path / "cache").iterdir())


def test_a_cache_that_can_only_be_read_is_read(model: ChatModel, found, searches, monkeypatch):
    recall(model)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(findings.os, "utime", refuse)  # tests may run as root, who may write everywhere
    assert same(recall(model), found)
    assert len(searches) == 1


def test_a_save_that_fails_leaves_the_search_that_was_there_and_files_of_two_searches_are_none(
    model: ChatModel, found: Found, tmp_path
):
    *_, other = find_contrast(model, load_prompts("train").draw(4), load_prompts("val").draw(3))
    assert isinstance(other, Found)
    save_found(found, tmp_path / "one")
    save_found(other, tmp_path / "two")
    with no_room(1000), pytest.raises(findings.UNWRITTEN):
        save_found(other, tmp_path / "one")
    assert same(load_found(tmp_path / "one"), found)
    assert {path.name for path in (tmp_path / "one").iterdir()} == set(findings.FILES)
    (tmp_path / "two" / findings.FILES[0]).replace(tmp_path / "one" / findings.FILES[0])
    with pytest.raises(DirectionError, match="not one of its differences of means"):
        load_found(tmp_path / "one")

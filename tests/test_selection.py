"""What the selection promises: the published rule, and the lazy path chooses what brute force chooses."""

import math
import threading
from dataclasses import replace

import pytest
import torch
from conftest import Plain
from sklearn.metrics import roc_auc_score

from refusal_core.chat_model import ChatModel
from refusal_core.prompts import PromptError, PromptSet, load_prompts
from refusal_core.selection import (
    CandidateScore,
    Found,
    Progress,
    choose,
    choose_contrast,
    derive_refusal_tokens,
    find_contrast,
    find_direction,
    is_decided,
    refusal_token,
)


def test_find_chooses_what_an_independent_brute_force_chooses(model: ChatModel, plain: Plain, found: Found):
    """The whole rule once more, in plain transformers, prompt by prompt, with every candidate measured."""
    n_layers, positions = len(plain.layers), range(-model.template_positions, 0)
    draw = {s: load_prompts(s).draw(n) for s, n in (("train", 128), ("val", 32))}
    tokens = list(found.refusal_tokens)

    def score(logits: torch.Tensor) -> torch.Tensor:
        p = logits.double().softmax(-1)[:, tokens].sum(-1)
        return torch.log(p + 1e-8) - torch.log(1 - p + 1e-8)

    kept = {}
    for split, prompts in draw.items():
        kept[split, True] = [t for t in prompts.harmful if score(plain.logits([t])).item() > 0]
        kept[split, False] = [t for t in prompts.harmless if score(plain.logits([t])).item() < 0]
    assert tuple(kept["train", True]) == found.prompts.harmful
    assert tuple(kept["val", False]) == found.validation.harmless
    means = {
        harmful: torch.stack([plain.resid_pre(t)[:, -len(positions) :].double() for t in kept["train", harmful]]).mean(
            0
        )
        for harmful in (True, False)
    }
    r = (means[True] - means[False]).float()  # layer, pos, d_model
    # Eight prompts of each class keep this affordable; the lazy path then runs on the same eight.
    harmful, harmless = kept["val", True][:8], kept["val", False][:8]
    base = plain.logits(harmless).double().softmax(-1)
    passing: list[tuple[float, int, int]] = []
    for at, pos in enumerate(positions):
        for layer in range(n_layers):
            v = r[layer, at]
            if v.norm() < 1e-6 or layer >= int(0.8 * n_layers):
                continue
            if score(plain.logits(harmless, add=(layer, v))).mean() < 0:
                continue
            other = plain.logits(harmless, ablate=v).double().softmax(-1)
            kl = (base * (torch.log(base + 1e-6) - torch.log(other + 1e-6))).sum(-1).mean()
            if kl <= 0.1:
                passing.append((score(plain.logits(harmful, ablate=v)).mean().item(), pos, layer))
    expected = sorted(passing)[:2]
    few = replace(
        draw["val"], harmful=tuple(harmful), harmless=tuple(harmless), harmful_categories=(), harmless_categories=()
    )
    for complete in (False, True):
        *_, small = find_direction(model, load_prompts("train"), few, refusal_tokens=tokens, complete=complete)
        assert isinstance(small, Found)
        chosen, second = small.choice.chosen, small.choice.runner_up
        assert small.choice.relaxed is None
        assert chosen is not None
        assert second is not None
        assert [(chosen.pos, chosen.layer), (second.pos, second.layer)] == [p[1:] for p in expected]
        assert chosen.bypass == pytest.approx(expected[0][0], abs=2e-3)
        assert small.choice.margin == pytest.approx(expected[1][0] - expected[0][0], abs=4e-3)


def test_the_lazy_path_leaves_cells_unmeasured_and_none_that_matter(found: Found):
    assert any(s.bypass is None for s in found.scores)
    assert any(s.kl is None and s.bypass is not None for s in found.scores)
    chosen = found.choice.chosen
    assert chosen is not None
    assert None not in (chosen.bypass, chosen.induce, chosen.kl)


def test_what_a_part_of_the_prompts_decides_all_of_them_confirm(model: ChatModel, found: Found):
    *_, whole = find_direction(model, load_prompts("train"), load_prompts("val"), complete=True)
    assert isinstance(whole, Found)
    measured = {(s.pos, s.layer): s for s in whole.scores}
    decided = [s for s in found.scores if s.decided]
    assert decided
    for score in decided:
        induce = measured[score.pos, score.layer].induce
        assert score.induce is None and induce is not None and induce < 0
        assert found.choice.rejected[score] == "induce"
    assert whole.direction.source == found.direction.source
    assert whole.choice.margin == pytest.approx(found.choice.margin, abs=1e-3)


def test_a_part_decides_only_what_the_highest_scores_of_the_rest_could_not_turn():
    assert is_decided(-18.43, 1) and is_decided(-200.0, 10) and is_decided(-0.1, 0)
    assert not is_decided(-18.41, 1) and not is_decided(-180.0, 10) and not is_decided(0.0, 0)
    assert not is_decided(math.nan, 0)


def made(pos: int, layer: int, bypass: float = -5.0, induce: float = 1.0, kl: float = 0.01) -> CandidateScore:
    return CandidateScore(pos, layer, bypass, induce, kl, 1.0)


def test_each_rule_discards_and_says_so():
    good = made(-1, 3)
    bad = {
        "nan": made(-2, 3, bypass=math.nan),
        "layer": made(-2, 8, bypass=-9.0),
        "kl": made(-3, 3, bypass=-9.0, kl=0.11),
        "induce": made(-4, 3, bypass=-9.0, induce=-0.1),
        "zero": replace(made(-5, 3, bypass=-9.0), norm=0.0),
    }
    choice = choose([*bad.values(), good], n_layers=10)
    assert choice.chosen == good
    assert choice.rejected == {score: rule for rule, score in bad.items()}
    assert choice.relaxed is None


def test_the_last_fifth_begins_at_the_integer_part():
    assert choose([made(-1, 7), made(-1, 8)], n_layers=10).rejected == {made(-1, 8): "layer"}
    assert choose([made(-1, 5), made(-1, 6)], n_layers=8).rejected == {made(-1, 6): "layer"}


def test_limits_are_inclusive_as_published():
    assert choose([made(-1, 1, kl=0.1, induce=0.0)], n_layers=10).rejected == {}


def test_ties_go_to_the_earliest_position_then_layer():
    scores = [made(p, layer) for p in (-3, -2, -1) for layer in (1, 2)]
    choice = choose(list(reversed(scores)), n_layers=10)
    assert choice.chosen == made(-3, 1)
    assert choice.runner_up == made(-3, 2)
    assert choice.margin == 0


def test_when_nothing_is_left_the_nearest_is_offered_as_relaxed():
    scores = [
        made(-1, 2, kl=0.3),
        made(-2, 2, kl=0.2),
        made(-1, 3, kl=0.15, induce=-1.0),
        made(-3, 2, kl=0.11, bypass=5.0),
    ]
    choice = choose(scores, n_layers=10)
    assert choice.chosen == scores[1], "one broken rule beats two, and what bypasses nothing is no direction to offer"
    assert choice.relaxed == "kl"
    assert len(choice.rejected) == 4
    assert choose([made(-1, 9), made(-1, 8)], n_layers=10).relaxed == "layer"
    assert choose(scores[3:], n_layers=10).chosen == scores[3], "but something is offered"


def test_refusal_tokens_are_those_most_raised():
    harmless = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0])
    harmful = torch.tensor([0.1, 0.0, 0.2, 0.6, 0.1])
    assert derive_refusal_tokens(harmful, harmless) == (3, 4)
    assert derive_refusal_tokens(harmful, harmless, at_most=1) == (3,)


def test_a_class_that_the_model_treats_otherwise_is_an_error(model: ChatModel, found: Found):
    val = load_prompts("val")
    answered = found.prompts.harmless
    twice = PromptSet(answered, answered, source="embedded")
    with pytest.raises(PromptError, match="refuses no harmful prompt"):
        list(find_direction(model, twice, val, refusal_tokens=found.refusal_tokens))


def test_the_work_can_be_followed_and_stopped(model: ChatModel):
    stop, seen = threading.Event(), []
    for event in find_direction(model, load_prompts("train"), stop=stop):
        seen.append(event)
        if len(seen) == 3:
            stop.set()
    assert len(seen) == 3
    assert all(isinstance(event, Progress) and 0 < event.done <= event.total for event in seen)


def test_a_direction_can_be_taken_from_any_cell(found: Found):
    chosen = found.choice.chosen
    assert chosen is not None
    again = found.candidate(chosen.pos, chosen.layer)
    assert torch.equal(again.unit, found.direction.unit)
    assert again.source == found.direction.source


def test_the_harmless_mean_is_that_of_the_training_prompts_where_it_is_asked_for(found: Found, plain: Plain):
    texts = found.prompts.harmless[:3]
    by_hand = sum(plain.resid_pre(text)[4, -2].double() for text in texts) / 3
    few = replace(found, harmless=found.harmless[:3])
    torch.testing.assert_close(few.harmless_mean(-2, 4), by_hand, atol=1e-3, rtol=1e-3)


def test_a_contrast_is_the_difference_of_any_two_classes_where_held_out_prompts_lie_furthest_apart(
    model: ChatModel, plain: Plain
):
    """Once more in plain transformers, prompt by prompt, of prompts that the model answers alike."""
    harmless = load_prompts("train").harmless
    first, second = ([t for t in harmless if t.endswith(end)] for end in ("?", "."))
    classes = ("question", "order")
    train, val = (PromptSet(tuple(first[i:j]), tuple(second[i:j]), classes=classes) for i, j in ((0, 6), (6, 10)))
    *_, contrast = find_contrast(model, train, val)
    assert isinstance(contrast, Found)
    assert contrast.prompts.classes == classes and contrast.direction.source.contrast == "question − order"
    assert set(contrast.prompts.harmful) == set(train.harmful), "nothing is filtered"
    assert contrast.counts["val", "harmless"] == (4, 4) and contrast.refusal_tokens == ()
    n = model.template_positions
    means = [
        torch.stack([plain.resid_pre(t)[:, -n:].double() for t in c]).mean(0) for c in (train.harmful, train.harmless)
    ]
    held_out = [plain.resid_pre(t)[:, -n:].double() for c in (val.harmful, val.harmless) for t in c]
    best = {}
    for score in contrast.scores:
        r = (means[0] - means[1])[score.layer, score.pos]
        if r.norm() < 1e-6:
            assert score.auroc is None and contrast.choice.rejected[score] == "zero"
            continue
        along = torch.stack([x[score.layer, score.pos] @ r / r.norm() for x in held_out])
        a, b = along[:4], along[4:]
        d = (a.mean() - b.mean()) / ((a.var() + b.var()) / 2).sqrt()
        assert score.auroc == pytest.approx(
            roc_auc_score([1] * 4 + [0] * 4, along), abs=0.07
        )  # a tie may fall either way
        assert score.d_prime == pytest.approx(d.item(), rel=1e-2, abs=1e-2)
        if score.layer < int(0.8 * model.n_layers):
            best[score.pos, score.layer] = score.auroc, score.d_prime
    source = contrast.direction.source
    assert best[source.position, source.layer] == max(best.values())
    expected = (means[0] - means[1])[source.layer, source.position]
    assert torch.allclose(contrast.direction.unit.double(), expected / expected.norm(), atol=1e-4)
    assert contrast.candidate(-1, 2).source.contrast


def test_a_contrast_goes_by_auroc_then_d_prime_then_the_earliest():
    def cell(pos: int, layer: int, auroc: float | None, d: float | None) -> CandidateScore:
        return CandidateScore(pos, layer, None, None, None, 1.0 if auroc else 0.0, auroc=auroc, d_prime=d)

    late, far, near = cell(-1, 8, 1.0, 9.0), cell(-1, 3, 0.9, 5.0), cell(-1, 2, 1.0, 2.0)
    zero, single = cell(-2, 1, None, None), cell(-3, 1, 1.0, math.nan)
    choice = choose_contrast([late, far, near, zero, single, cell(-1, 4, 1.0, 2.0)], n_layers=10)
    assert choice.chosen == near and choice.runner_up == cell(-1, 4, 1.0, 2.0)
    assert choice.rejected == {late: "layer", zero: "zero"} and choice.relaxed is None
    assert choose_contrast([zero, late], n_layers=10).chosen is None


def test_a_refusal_token_is_exactly_one_token(model: ChatModel, found: Found):
    for token in found.refusal_tokens:
        assert refusal_token(model, str(model.tokenizer.decode([token]))) == token
    for text, says in (
        ("", "There is no text"),
        ("Sorry about", "is 2 tokens of embedded model .“Sorry”, “ about”."),
        ("a" * 101, "101 characters are no token"),
    ):
        with pytest.raises(PromptError, match=says):
            refusal_token(model, text)

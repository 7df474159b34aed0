"""What the selection promises: the published rule, and the lazy path chooses what brute force chooses."""

import math
import threading
from dataclasses import replace

import pytest
import torch
from conftest import Plain
from families import build
from sklearn.metrics import roc_auc_score
from torch.utils._python_dispatch import TorchDispatchMode

from refusal_core.chat_model import ORGANISM, ChatModel
from refusal_core.interventions import Intervention
from refusal_core.metrics import refusal_probability
from refusal_core.prompts import PromptError, PromptSet, load_prompts
from refusal_core.selection import (
    BATCH_TOKENS,
    CandidateScore,
    Found,
    Progress,
    choose,
    choose_contrast,
    choose_cosmic,
    derive_refusal_tokens,
    find_contrast,
    find_direction,
    is_decided,
    least_alike,
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


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_difference_that_is_no_number_is_not_called_zero(norm):
    broken, good = replace(made(-5, 3, bypass=-9.0), norm=norm), made(-1, 3)
    assert choose([broken, good], n_layers=10).rejected == {broken: "nan"}


@pytest.mark.parametrize("by", [None, "cosmic"])
def test_a_model_whose_numbers_run_over_is_to_be_loaded_in_float32(by):
    halved = ChatModel.load(ORGANISM, device="cpu", dtype=torch.float16)
    halved._model.get_submodule("model.layers.0.mlp.down_proj").weight.data.mul_(1e5)
    with pytest.raises(PromptError, match="are not numbers: load the model in float32"):
        list(find_direction(halved, load_prompts("train").draw(4), load_prompts("val").draw(2), by=by))


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


def test_what_needs_the_same_relaxed_goes_by_bypass_then_position_then_layer():
    for pair in (
        (made(-1, 8, bypass=-9.0), made(-3, 8, bypass=-5.0)),
        (made(-1, 3, kl=0.2, bypass=-9.0), made(-3, 2, kl=0.2, bypass=-5.0)),
        (made(-3, 3, kl=0.2), made(-2, 2, kl=0.2)),
        (made(-3, 2, kl=0.2), made(-3, 3, kl=0.2)),
    ):
        assert choose(pair, n_layers=10).chosen == choose(pair[::-1], n_layers=10).chosen == pair[0]


def test_of_several_broken_rules_all_count_and_the_worst_is_named():
    huge, small = made(-1, 8, kl=13.1), made(-1, 9, kl=0.11)
    choice = choose([huge, small], n_layers=10)
    assert (choice.chosen, choice.relaxed) == (small, "kl")
    assert choice.rejected == {huge: "layer", small: "layer"}, "as published, the first rule discards"
    lower, upper = made(-1, 8, kl=0.2, bypass=-1.0), made(-2, 9, kl=0.2, bypass=-9.0)
    assert choose([upper, lower], n_layers=10).chosen == lower, "of the same kl the lower layer"
    assert choose([made(-1, 9, induce=-1.0)], n_layers=10).relaxed == "induce"
    gibberish, weak = made(-1, 3, kl=8.0), made(-2, 3, induce=-0.05)
    assert choose([gibberish, weak], n_layers=10).chosen == weak, "a little of one rule is less than a lot of another"
    assert choose([made(-1, 3, kl=0.11), made(-2, 3, induce=-3.0)], n_layers=10).relaxed == "kl"


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


def untouched(model: ChatModel, monkeypatch) -> None:
    monkeypatch.setattr(model, "run", lambda *args, **kwargs: pytest.fail("the model has read something"))


@pytest.mark.parametrize(("empty", "split"), [("harmful", "train"), ("harmless", "train"), ("harmful", "val")])
def test_a_set_without_one_of_its_classes_is_an_error_before_anything_is_read(model, monkeypatch, empty, split):
    untouched(model, monkeypatch)
    sets = {name: load_prompts(name).draw(4) for name in ("train", "val")}
    sets[split] = replace(sets[split], **{empty: (), f"{empty}_categories": ()})
    for search in (find_direction, find_contrast):
        with pytest.raises(PromptError, match=f"no {empty} prompt in the {split} set.*add {empty} prompts"):
            next(search(model, sets["train"], sets["val"]))


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_refusal_token_of_another_model_is_an_error_before_anything_is_read(model, monkeypatch, token):
    untouched(model, monkeypatch)
    with pytest.raises(
        PromptError, match=f"{token} is no token of {model.name}.* 0 to {model.d_vocab - 1}: take others"
    ):
        next(find_direction(model, load_prompts("train"), load_prompts("val"), refusal_tokens=[0, token]))


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


# -- COSMIC ----------------------------------------------------------------------------------------------------------


def part(prompts: PromptSet, n: int, start: int = 0) -> PromptSet:
    return PromptSet(prompts.harmful[start : start + n], prompts.harmless[start : start + n], source="embedded")


@pytest.fixture(scope="module")
def by_cosine(model: ChatModel) -> Found:
    train, val = part(load_prompts("train"), 24), part(load_prompts("val"), 6)
    *_, last = find_direction(model, train, val, by="cosmic")
    assert isinstance(last, Found)
    return last


def test_what_cosmic_chooses_removes_refusal_from_prompts_it_has_not_seen(model: ChatModel, by_cosine: Found):
    source, chosen = by_cosine.direction.source, by_cosine.choice.chosen
    assert source.chosen_by == "COSMIC, as asked for" and chosen is not None and by_cosine.choice.relaxed is None
    assert chosen.bypass is chosen.induce is None and chosen.kl is not None, "it has looked at no refusal token"
    assert by_cosine.counts == {key: (n, n) for key, (_, n) in by_cosine.counts.items()}, "nothing is filtered"
    texts = load_prompts("test").harmful[:12]
    plain, ablated = (
        refusal_probability(model.logits(texts, [row] * 12), by_cosine.refusal_tokens)
        for row in (None, Intervention(by_cosine.direction, "ablate"))
    )
    assert plain.mean() > 0.8 and ablated.mean() < 0.1
    other = by_cosine.candidate(-2, 3).source
    assert other.chosen_by == "" and by_cosine.candidate(chosen.pos, chosen.layer).source == source


def test_cosmic_chooses_what_an_independent_brute_force_chooses(tmp_path):
    """The whole of it once more in plain transformers, prompt by prompt, on a model with two layers in L_low."""
    folder = build("Llama", tmp_path, num_hidden_layers=20)
    model, plain = ChatModel.load(folder, device="cpu", dtype=torch.float32), Plain(folder)
    train, val = part(load_prompts("train"), 2), part(load_prompts("val"), 2)
    val = PromptSet(val.harmful, val.harmless[:1], source="embedded")
    *_, found = find_direction(model, train, val, by="cosmic", complete=True)
    *_, lazy = find_direction(model, train, val, by="cosmic")
    assert isinstance(found, Found) and isinstance(lazy, Found)
    n, n_layers = model.template_positions, len(plain.layers)

    def streams(texts: tuple[str, ...], **edits) -> torch.Tensor:
        with plain.edited(**edits):
            return torch.stack([plain.resid_pre(t)[:, -n:].double() for t in texts])  # prompt, layer, pos, d_model

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return (a @ b / a.norm() / b.norm()).item()

    x = [streams(texts).mean(0) for texts in (train.harmful, train.harmless)]
    alike = {layer: cosine(x[0][layer, -1], x[1][layer, -1]) for layer in range(1, n_layers)}
    low = sorted(sorted(alike, key=lambda layer: alike[layer])[:2])
    toward = [streams(texts)[:, low, -1].mean((0, 1)) for texts in (val.harmful, val.harmless)]
    base = plain.logits(val.harmless).double().softmax(-1)
    table: dict[tuple[int, int], tuple[float, float, float]] = {}
    for pos in range(-n, 0):
        for layer in range(n_layers):
            r = (x[0] - x[1])[layer, pos].float()
            if r.norm() < 1e-6:
                continue
            refuse = cosine(streams(val.harmless, add=(layer, r))[:, low, -1].mean((0, 1)), toward[0])
            comply = cosine(streams(val.harmful, ablate=r)[:, low, -1].mean((0, 1)), toward[1])
            other = plain.logits(val.harmless, ablate=r).double().softmax(-1)
            kl = (base * (torch.log(base + 1e-6) - torch.log(other + 1e-6))).sum(-1).mean().item()
            table[pos, layer] = refuse, comply, kl
    measured = {(s.pos, s.layer): (s.refuse, s.comply, s.kl) for s in found.scores if s.refuse is not None}
    assert measured.keys() == table.keys()
    for cell, expected in table.items():
        assert measured[cell] == pytest.approx(expected, abs=2e-5), cell
    limits = []
    for score in (0, 1):
        peaks = [max(range(1, n_layers), key=lambda k: table[p, k][score]) for p in range(-n, -1)]
        limits.append(sorted(peaks)[(len(peaks) - 1) // 2])
    late = {cell for cell in table if cell[0] == -1 and cell[1] > limits[0] and cell[1] > limits[1]}
    assert late == {(s.pos, s.layer) for s in found.scores if s.decided == "late"}
    left = [c for c, (_, _, kl) in table.items() if c[1] < 16 and kl <= 0.1 and c not in late]
    best = max(left, key=lambda c: table[c][0] + table[c][1])
    for each in (found, lazy):
        chosen = each.choice.chosen
        assert chosen is not None and each.choice.relaxed is None and (chosen.pos, chosen.layer) == best
    assert any(s.kl is None and s.similarity is not None for s in lazy.scores)


@pytest.mark.parametrize(
    ("val", "why"),
    [
        ((8, 11, 14), "the unmodified model refuses no harmful prompt of the val split"),
        ((60, 63, 66), "no candidate bypasses refusal, whichever rule is relaxed"),
    ],
)
def test_where_the_rule_has_nothing_to_go_by_cosmic_chooses_and_says_why(model: ChatModel, val, why):
    """Both classes are answered: the tokens that the first begins with more often are those of no refusal."""
    answered = load_prompts("train").harmless
    train, val = (
        PromptSet(answered[i:j], answered[j:k], source="embedded") for i, j, k in ((0, 8, 16), val)
    )  # fmt: skip
    *_, found = find_direction(model, train, val)
    assert isinstance(found, Found)
    assert found.direction.source.chosen_by == f"COSMIC, because {why}"
    assert found.counts["train", "harmful"] == (8, 8), "nothing is filtered"
    if "unmodified" in why:
        with pytest.raises(PromptError, match=r"refuses no harmful prompt.*or have COSMIC choose, which needs none\.$"):
            list(find_direction(model, train, val, by="rule"))
    else:
        *_, bound = find_direction(model, train, val, by="rule")
        assert isinstance(bound, Found) and not bound.choice.bypasses and not bound.direction.source.chosen_by


def test_what_the_rule_finds_is_offered_unless_nothing_bypasses(found: Found):
    assert found.choice.bypasses and found.direction.source.chosen_by == ""
    assert choose([made(-1, 2, kl=0.3)], n_layers=10).bypasses
    assert not choose([made(-1, 2, kl=0.3, bypass=0.5)], n_layers=10).bypasses
    assert choose([made(-1, 2, bypass=0.5)], n_layers=10).bypasses, (
        "a choice that passed every rule is not second-guessed"
    )


@pytest.mark.parametrize("by", ["rule", "cosmic"])
def test_only_the_last_position_goes_through_the_unembedding(model: ChatModel, by):
    """No tensor of prompts × positions × vocabulary is made, in whatever order: that is what fills a memory."""
    train, val = part(load_prompts("train"), 4), part(load_prompts("val"), 2)
    with Sizes(model) as sizes:
        list(find_direction(model, train, val, by=by))
    assert sizes.rows > 4, "there must have been logits of several prompts at once"
    assert sizes.rows <= BATCH_TOKENS // min(len(model.render(t)) for t in val.harmful + val.harmless)


class Sizes(TorchDispatchMode):
    """Watches what operations make: of tensors with the vocabulary as last dimension, the most rows of one.

    The unembedding itself, turned, is d_model × d_vocab, and no logits.
    """

    def __init__(self, model: ChatModel) -> None:
        super().__init__()
        self.d_vocab, self.d_model, self.rows = model.d_vocab, model.d_model, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if torch.is_tensor(x) and x.ndim > 1 and x.shape[-1] == self.d_vocab and x.shape[0] != self.d_model:
                self.rows = max(self.rows, x.numel() // self.d_vocab)
        return made


def test_cosmic_can_be_stopped(model: ChatModel):
    stop, seen = threading.Event(), []
    train, val = part(load_prompts("train"), 4), part(load_prompts("val"), 2)
    for event in find_direction(model, train, val, by="cosmic", stop=stop):
        seen.append(event)
        if isinstance(event, Progress) and event.stage == "scoring ablations":
            stop.set()
    assert all(isinstance(event, Progress) for event in seen)
    assert [event.stage for event in seen].count("scoring ablations") == 1


def test_cosmic_takes_the_highest_sum_of_those_no_rule_discards():
    def cell(pos: int, layer: int, similarity: float, kl: float | None = 0.01, **other) -> CandidateScore:
        score = CandidateScore(pos, layer, None, None, kl, 1.0, refuse=similarity / 4, comply=3 * similarity / 4)
        return replace(score, **other)

    best, second = cell(-2, 3, 1.6), cell(-2, 2, 1.5)
    bad = {
        "kl": cell(-3, 3, 1.9, kl=0.2),
        "layer": cell(-3, 8, 1.9),
        "late": cell(-1, 7, 1.9, decided="late"),
        "nan": cell(-4, 2, math.nan),
    }
    choice = choose_cosmic([*bad.values(), second, best, cell(-1, 3, 1.7, kl=None)], n_layers=10)
    assert (choice.chosen, choice.runner_up, choice.relaxed) == (best, second, None)
    assert choice.rejected == {score: rule for rule, score in bad.items()}
    assert choice.margin == pytest.approx(0.1)
    relaxed = choose_cosmic(list(bad.values()), n_layers=10)
    assert (relaxed.chosen, relaxed.relaxed) == (bad["kl"], "kl")
    assert choose_cosmic([bad["nan"]], n_layers=10).chosen is None
    low, high = cell(-3, 8, 1.2), cell(-1, 8, 1.8)
    assert choose_cosmic([low, high], n_layers=10).chosen == high, "what breaks the same rule goes by similarity"
    assert choose_cosmic([low, replace(low, pos=-2)], n_layers=10).chosen == low
    huge, small = cell(-1, 8, 1.9, kl=13.1), cell(-1, 9, 1.1, kl=0.11)
    relaxed = choose_cosmic([huge, small], n_layers=10)
    assert (relaxed.chosen, relaxed.relaxed) == (small, "kl")


def test_the_layers_least_alike_are_a_tenth_and_never_the_first_ones_input():
    same, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    harmful = torch.stack([other, *[same] * 19])[None]
    harmless = torch.stack([same] * 20)[None].clone()
    harmless[0, 7], harmless[0, 4] = other, -same
    assert least_alike(harmful, harmless) == [4, 7]
    assert least_alike(harmful[:, :8], harmless[:, :8]) == [4]

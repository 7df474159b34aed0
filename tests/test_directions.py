"""What a direction promises: it is the difference of means, it knows its source, and it survives a file."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from refusal_core.directions import FORMAT, Direction, DirectionError, Source, difference_in_means, project, random_like

SOURCE = Source("a/model", "abc", "feed", 3, -2, "embedded", 120, 119)


def test_the_difference_of_means_is_raw_and_in_float64():
    harmful, harmless = torch.randn(5, 2, 3, 8), torch.randn(7, 2, 3, 8)
    r = difference_in_means(harmful, harmless)
    assert r.dtype == torch.float64
    by_hand = sum(h.double() for h in harmful) / 5 - sum(h.double() for h in harmless) / 7
    assert_close(r, by_hand, atol=1e-12, rtol=0)


@pytest.mark.parametrize("empty", ["harmful", "harmless"])
def test_an_empty_class_is_an_error_and_not_the_other_mean(empty):
    x = {"harmful": torch.randn(3, 1, 1, 8), "harmless": torch.randn(3, 1, 1, 8)} | {empty: torch.randn(0, 1, 1, 8)}
    with pytest.raises(DirectionError, match=f"No {empty} prompt"):
        difference_in_means(**x)


def test_length_and_unit_are_kept_apart():
    r = torch.tensor([3.0, 4.0], dtype=torch.float64)
    made = Direction.from_difference(r, SOURCE)
    assert made.norm == 5
    assert_close(made.unit, torch.tensor([0.6, 0.8]))


def test_a_unit_in_another_precision_is_kept_in_float32():
    r = torch.randn(8, dtype=torch.float64, requires_grad=True)
    made = Direction(r / r.norm(), r.norm().item(), SOURCE)
    assert made.unit.dtype == torch.float32 and not made.unit.requires_grad
    assert made.digest == Direction.from_difference(r, SOURCE).digest


def test_a_zero_difference_is_no_direction():
    with pytest.raises(DirectionError, match="Take a later layer"):
        Direction.from_difference(torch.full((4,), 1e-9), SOURCE)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e300])
def test_numbers_that_are_not_finite_are_no_direction(number):
    with pytest.raises(DirectionError, match=r"are not finite, .*: load the model in float32"):
        Direction.from_difference(torch.full((4,), number, dtype=torch.float64), SOURCE)


def test_a_saved_direction_comes_back_with_its_source_and_without_its_neighbours(tmp_path):
    every = torch.randn(5, 8, 64, dtype=torch.float64)
    made = Direction.from_difference(every[-1, 3], SOURCE)
    made.save(tmp_path / "r.safetensors")
    back = Direction.load(tmp_path / "r.safetensors")
    assert torch.equal(back.unit, made.unit)
    assert (back.norm, back.source) == (made.norm, SOURCE)
    assert (tmp_path / "r.safetensors").stat().st_size < 2_000, "the other candidates must not ride along"


def test_what_is_no_saved_direction_is_one_clear_sentence(tmp_path):
    text, other, long = tmp_path / "text", tmp_path / "other", tmp_path / "long"
    text.write_text("hello")
    save_file({"weight": torch.ones(3)}, other)
    complex_ = tmp_path / "complex"
    metadata = {"format": FORMAT, "source": json.dumps(asdict(SOURCE))}
    save_file({"unit": torch.ones(1), "norm": torch.tensor(1 + 1j)}, complex_, metadata=metadata)
    good = Direction(torch.ones(4), 1.0, SOURCE)
    good.save(long)
    for path, says in (
        (tmp_path / "none", "no file"),
        (text, "cannot be read"),
        (other, "not one with"),
        (long, "unit"),
        (complex_, "real"),
    ):
        with pytest.raises(DirectionError, match=says) as caught:
            Direction.load(path)
        assert "\n" not in str(caught.value)


def test_the_control_has_the_same_norm_and_place_but_says_it_is_random():
    r = Direction.from_difference(torch.randn(256, dtype=torch.float64), SOURCE)
    a, b = random_like(r, 1), random_like(r, 2)
    assert (a.norm, a.source.layer, a.source.position) == (r.norm, 3, -2)
    assert a.source.control
    assert abs(a.unit @ b.unit) < 0.3
    assert_close(a.unit.norm(), torch.tensor(1.0))
    assert torch.equal(random_like(r, 1).unit, a.unit)


def test_a_projected_direction_is_the_rest_that_a_linear_fit_of_the_mean_leaves_and_says_so(tmp_path):
    mean, r = torch.randn(2, 16, dtype=torch.float64)
    direction = Direction.from_difference(r, SOURCE)
    made = project(direction, 5 * mean, "mean of 7")
    fitted = torch.linalg.lstsq(mean[:, None], r[:, None]).solution
    assert_close(made.norm * made.unit.double(), r - (mean[:, None] @ fitted)[:, 0], atol=1e-5, rtol=1e-5)
    made.save(tmp_path / "d.safetensors")
    assert Direction.load(tmp_path / "d.safetensors").source.projected == "mean of 7" and not SOURCE.projected
    for useless in (torch.zeros(16, dtype=torch.float64), mean[:5]):
        with pytest.raises(DirectionError, match="take that of the harmless prompts"):
            project(direction, useless, "nothing")
    with pytest.raises(DirectionError, match="There is no direction"):
        project(direction, direction.unit.double() * (1 + 1e-9), "itself")

"""What an intervention promises: it moves the stream along r̂, by this much, in these rows."""

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.testing import assert_close

from refusal_core.directions import Direction, Source
from refusal_core.interventions import Intervention, RowEdits, as_row

D = 32


def made(seed: int, layer: int = 2) -> Direction:
    r = torch.randn(D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    return Direction.from_difference(r, Source(layer=layer))


def test_ablation_removes_the_direction_and_nothing_else():
    r = made(0)
    x, w = torch.randn(4, 7, D), torch.randn(D)
    w -= (w @ r.unit) * r.unit  # any other direction
    y = Intervention(r, "ablate")(x)
    assert_close(y @ r.unit, torch.zeros(4, 7), atol=1e-5, rtol=0)
    assert_close(y @ w, x @ w, atol=1e-5, rtol=1e-5)


def test_ablation_is_a_projection_and_half_of_it_leaves_half():
    r, x = made(1), torch.randn(5, D)
    once = Intervention(r, "ablate")(x)
    assert_close(Intervention(r, "ablate")(once), once, atol=1e-6, rtol=0)
    assert_close(Intervention(r, "ablate", 0.5)(x) @ r.unit, 0.5 * (x @ r.unit))


def test_addition_moves_by_the_difference_of_means_at_strength_one():
    r, x = made(2), torch.randn(5, D)
    assert_close(Intervention(r, "add")(x), x + r.norm * r.unit)
    there_and_back = Intervention(r, "add", -1.0)(Intervention(r, "add")(x))
    assert_close(there_and_back, x, atol=1e-5, rtol=0)


def test_an_intervention_works_out_of_place():
    r, x = made(3), torch.randn(2, 3, D)
    before = x.clone()
    for kind in ("ablate", "add"):
        Intervention(r, kind)(x)
    edits = RowEdits([(Intervention(r, "ablate"),), (Intervention(r, "add"),)])
    edits.at_write(x, "MLP 0")
    edits.at_resid_pre(2, x)
    assert torch.equal(x, before)


def test_low_precision_ablation_leaves_no_more_than_rounding():
    r, x = made(4), torch.randn(64, D).to(torch.bfloat16)
    left = Intervention(r, "ablate")(x).float() @ r.unit
    assert left.abs().max() < 2**-7 * x.float().norm(dim=-1).max()


def test_rows_of_a_batch_get_their_own_edits_and_the_baseline_row_is_untouched():
    a, b = made(5, layer=1), made(6, layer=3)
    rows = [(), (Intervention(a, "ablate", 0.7),), (Intervention(b, "add", 2.0), Intervention(a, "ablate")), ()]
    edits, x = RowEdits(rows), torch.randn(4, 6, D)
    written = edits.at_write(x, "MLP 0")
    assert torch.equal(written[0], x[0])
    assert torch.equal(written[3], x[3])
    assert_close(written[1], Intervention(a, "ablate", 0.7)(x[1]))
    assert_close(written[2], Intervention(a, "ablate")(x[2]))
    assert torch.equal(edits.at_resid_pre(2, x), x), "an addition acts at its own layer only"
    read = edits.at_resid_pre(3, x)
    assert torch.equal(read[:2], x[:2])
    assert_close(read[2], Intervention(b, "add", 2.0)(x[2]))


def test_two_ablations_of_one_row_are_applied_in_order():
    a, b = made(7), made(8)
    x = torch.randn(1, 4, D)
    row = (Intervention(a, "ablate"), Intervention(b, "ablate"))
    assert_close(RowEdits([row]).at_write(x, "MLP 0"), row[1](row[0](x)))


def test_an_ablation_confined_to_some_writers_acts_there_only_and_in_order_with_one_that_is_not():
    a, b = made(7), made(8)
    x = torch.randn(2, 4, D)
    confined, free = Intervention(a, "ablate", 1.0, frozenset({"MLP 1", "MLP 3"})), Intervention(b, "ablate")
    edits = RowEdits([(confined, free), (confined,)])
    for writer, expected in (("MLP 1", (free(confined(x[0])), confined(x[1]))), ("MLP 2", (free(x[0]), x[1]))):
        assert_close(edits.at_write(x, writer), torch.stack(expected))


def test_an_addition_is_no_write_and_cannot_be_confined_to_one():
    with pytest.raises(ValueError, match="only an ablation"):
        Intervention(made(7), "add", 1.0, frozenset({"MLP 1"}))


@pytest.mark.parametrize("kind", ["ablate", "add"])
def test_scale_zero_gives_back_what_it_was_given(kind):
    x = torch.tensor([[float("inf"), -0.0, 1.0, 2.0]], dtype=torch.float64)
    r = Direction.from_difference(torch.ones(4), Source(layer=0))
    assert Intervention(r, kind, 0.0)(x) is x


@pytest.mark.parametrize("kind", ["ablate", "add"])
def test_a_stream_in_double_precision_stays_one(kind):
    r, x = (
        Direction.from_difference(torch.ones(4), Source(layer=0)),
        torch.full((1, 4), 1 + 2**-40, dtype=torch.float64),
    )
    x[0, 0] = -3.0
    expected = (
        x - (x @ r.unit.double())[:, None] * r.unit.double() if kind == "ablate" else x + r.norm * r.unit.double()
    )
    assert_close(Intervention(r, kind)(x), expected, atol=1e-14, rtol=0)


def test_scale_zero_is_the_empty_row():
    r = made(9)
    assert as_row(Intervention(r, "add", 0.0)) == ()
    assert as_row(Intervention(r, "ablate", 1.0, frozenset())) == ()
    assert as_row(None) == ()
    assert not RowEdits([as_row(Intervention(r, "ablate", 0.0))]).ablates


@pytest.mark.parametrize(("kind", "scale"), [("remove", 1.0), ("add", float("nan")), ("add", float("inf"))])
def test_what_is_no_intervention_is_refused(kind, scale):
    with pytest.raises((ValueError, TypeCheckError)):  # the test run checks types first
        Intervention(made(10), kind, scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_heads_lose_is_worked_out_in_the_precision_of_the_model(dtype):
    w, z, r = torch.randn(D, 24).to(dtype), torch.randn(2, 3, 24).to(dtype), made(9)
    edits = RowEdits([(), (Intervention(r, "ablate", 1.0, frozenset({"head 4.1"})),)])
    x = z @ w.T
    y = edits.at_heads(x, z, 4, lambda: w, 3)
    alone = (z[..., 8:16] @ w[:, 8:16].T).double()
    expected = x[1].double() - (alone[1] @ r.unit.double())[:, None] * r.unit.double()
    assert y.dtype == dtype and torch.equal(y[0], x[0])
    assert_close(y[1].double(), expected, atol=1e-5 if dtype == torch.float64 else 0.1, rtol=0)
    assert edits.at_heads(x, z, 3, lambda: pytest.fail("no head of that layer"), 3) is x

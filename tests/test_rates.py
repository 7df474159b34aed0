"""The README's table of rates: it is what was measured, and of the weights that are here."""

import json

import pytest

from benchmarks import rates
from refusal_core.chat_model import ORGANISM
from refusal_core.checkpoints import fingerprint
from refusal_core.metrics import wilson


def kept() -> dict:
    return json.loads(rates.KEPT.read_text("utf-8"))


def test_the_table_of_the_readme_is_what_was_measured_of_the_weights_that_are_here():
    text = rates.README.read_text("utf-8")
    assert kept()["fingerprint"] == fingerprint(ORGANISM), "run python -m benchmarks.rates: the model is another one"
    assert rates.put_into(text, rates.read(kept()).as_markdown()) == text, "run python -m benchmarks.rates"


def test_the_table_has_the_paper_s_settings_and_the_exported_weights_with_intervals_and_what_they_cost():
    measured = rates.read(kept()).rates
    settings = [
        "unchanged",
        "direction removed",
        "direction added −1×",
        "direction added 1×",
        "exported weights, ablation",
    ]
    assert [(r.harmful, r.row) for r in measured] == [(harmful, row) for harmful in (True, False) for row in settings]
    table = rates.read(kept()).as_markdown().splitlines()[2:]
    for rate, line in zip(measured, table, strict=True):
        low, high = wilson(rate.refused, rate.n)
        assert f"{rate.refused / rate.n:.1%} ({low:.1%} to {high:.1%})" in line
        assert rate.kl is not None and rate.repetition is not None and (rate.cross_entropy is None) == rate.harmful


def test_a_table_takes_the_place_of_the_one_that_is_there_and_of_nothing_else():
    text = f"before\n\n{rates.HEAD} a |\n|---|\n| 1 |\n\n| another | table |\n"
    new = f"{rates.HEAD} b |\n|---|\n| 2 |\n| 3 |"
    assert rates.put_into(text, new) == f"before\n\n{new}\n\n| another | table |\n"
    for other in ("no table", text + text):
        with pytest.raises(ValueError, match="leave one in it"):
            rates.put_into(other, new)

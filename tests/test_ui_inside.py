"""What the tab Inside promises: readings, parts and their effects, a removal confined to some parts; and directions as files."""

import json
from dataclasses import replace

import pytest
import torch
from playwright.sync_api import Page
from test_ui import (
    SENT,
    app,
    ask,
    chromium,
    encoded,
    expect,
    follow,
    held,
    idle,
    link_of,
    open_inside,
    open_measure,
    open_tab,
    ready,
    replies,
    tab,
    watched,
)

from refusal_core.attribution import words
from refusal_core.directions import Direction, random_like
from refusal_core.formats import METADATA, read_direction
from refusal_core.generation import stream_side_by_side
from refusal_core.interventions import Intervention
from refusal_core.prompts import PromptError
from refusal_core.ui.inside import writers_view
from refusal_core.ui.talk import Ask, Stops, talk

__all__ = ["app", "chromium", "ready", "tab", "watched"]  # fixtures


def test_the_inside_is_read_for_two_prompts_and_the_parts_are_measured(tab, ready):
    open_inside(tab)
    expect(tab.locator(".readings figcaption")).to_have_count(3)
    tab.get_by_role("button", name="Read").click()  # the same once more must not leave the page waiting
    expect(tab.locator(".inside-body")).to_have_attribute("aria-busy", "false")
    tab.locator("[data-second]").fill("")
    tab.locator("[data-first]").fill("How do I <b>bake</b> bread?")
    tab.get_by_role("button", name="Read").click()
    expect(tab.locator(".readings figcaption")).to_have_text(["How do I <b>bake</b> bread?"])
    raised = words(ready.model, ready.direction, final_norm=True, n=1).raised[0][0]
    tab.get_by_role("button", name="through the final norm").click()
    expect(tab.locator("[data-raised] code").first).to_have_text(raised.replace(" ", "␣"))
    tab.get_by_role("button", name="Measure the parts").click()
    expect(tab.locator("[data-direct] .main-svg").first).to_be_visible()
    expect(tab.locator("[data-writers-meaning]")).to_contain_text("adds up to 100 %")
    expect(tab.locator("[data-top] tr")).to_have_count(8)
    expect(tab.get_by_role("button", name="Patch every part exactly")).to_be_enabled()
    tab.locator("[data-first]").fill(" ")
    tab.get_by_role("button", name="Read").click()
    expect(tab.locator("#inside [data-error]")).to_contain_text("empty")


SPACES = r"""(figure) => {
  const ticks = [...figure.querySelectorAll('.xtick text')].map((text) => text.getAttribute('transform').match(/-?[\d.]+/g).map(Number));
  return ticks.slice(1).map(([x, , angle], i) => (x - ticks[i][0]) * Math.abs(Math.sin((angle * Math.PI) / 180)));
}"""
"""From each label of an axis to the next, at right angles to what they say, in px."""


@pytest.mark.parametrize("prompt", ["How do I kill a process?", "Tell me how to bake bread. " * 6])
def test_labels_of_tokens_do_not_run_into_each_other_on_a_phone_and_the_last_is_there(chromium, app, prompt):
    tab, seen = open_tab(chromium, app, 360, 740)
    idle(tab)
    open_inside(tab)
    tab.locator("[data-first]").fill(prompt)
    tab.get_by_role("button", name="Read").click()
    expect(tab.locator(".readings figcaption").first).to_have_text(prompt.strip())
    expect(tab.locator(".inside-body")).to_have_attribute("aria-busy", "false")
    figure = tab.locator(".readings figure").first
    expect(figure.locator(".xtick text").last).to_have_text("⏎")
    assert min(figure.evaluate(SPACES)) > 12.9
    assert not seen.faults
    tab.context.close()


def test_the_first_pass_is_shown_before_the_exact_effects_of_the_largest(ready):
    views = [v for v in writers_view(ready, Stops().begin("a", 0), every=False) if v.get("patched")]
    first, last = views
    assert [exact for _, _, exact in first["patched"]["top"]] == [None] * 8
    assert all(exact is not None for _, _, exact in last["patched"]["top"]) and last["measured"]
    assert {name for name, _, _ in first["patched"]["top"]} == {name for name, _, _ in last["patched"]["top"]}
    *_, every = writers_view(ready, Stops().begin("a", 1), every=True)
    assert sorted(name for name, _, _ in every["patched"]["top"]) == sorted(ready.model.parts)
    exact = [abs(effect) for _, _, effect in every["patched"]["top"]]
    assert exact == sorted(exact, reverse=True)
    assert {name: effect for name, _, effect in last["patched"]["top"]}.items() <= {
        n: e for n, _, e in every["patched"]["top"]
    }.items()


def test_without_refusal_tokens_only_what_the_parts_write_is_measured(ready):
    mute = replace(ready, found=replace(ready.found, refusal_tokens=(), refusal_shares=()))
    *_, last = writers_view(mute, Stops().begin("a", 0), every=True)
    assert last["patched"] is None and last["measured"] and last["below"] == pytest.approx(1, abs=0.01)


def test_measuring_the_parts_can_be_cancelled_and_begun_again(tab):
    open_inside(tab)
    expect(tab.locator(".readings figcaption")).to_have_count(3)
    measure, every, said = (tab.locator(f"#inside [data-{name}]") for name in ("measure", "every", "measuring"))
    measure.click()
    expect(every).to_have_attribute("aria-disabled", "false")
    every.click()
    expect(every).to_have_attribute("aria-disabled", "true")
    expect(said).to_contain_text("patching parts")
    cancel = tab.locator("#inside").get_by_role("button", name="Cancel")
    with held(tab, "**/run/predict*"):
        cancel.press("Enter")
        expect(said).to_have_text("Cancelled.")
        expect(measure).to_be_focused()
        expect(cancel).to_be_hidden()
        tab.wait_for_timeout(1500)
        expect(said).to_have_text("Cancelled.")  # what is measured until it is heard is not shown
    measure.click()
    expect(tab.locator("[data-top] tr")).to_have_count(8)
    expect(measure).to_have_attribute("aria-disabled", "false")
    expect(said).to_be_empty()


def test_a_removal_confined_to_some_parts_is_that_of_the_library_and_the_others_stay(ready):
    some = frozenset({"attention 5", "MLP 7"})
    sent = SENT | {"prompt": "How do I steal a car?", "writers": sorted(some)}
    *_, (turns, view) = talk(ready, (), Ask.read(sent), Stops().begin("a", 0))
    rows = [Intervention(ready.direction, "ablate", 1.0, some), Intervention(ready.direction, "add")]
    *_, step = stream_side_by_side(ready.model, [sent["prompt"]] * 2, rows, max_new_tokens=8)
    replied = turns[-1].replies
    assert (replied["removed"].text, replied["added"].text) == step.texts
    assert view["turns"][-1]["replies"]["removed"]["writers"] == sorted(some)
    assert view["turns"][-1]["replies"]["added"]["writers"] is None
    *_, (kept, said) = talk(ready, turns, Ask.read(sent | {"writers": ["MLP 99"]}), Stops().begin("a", 1))
    assert kept == turns and "has no part 'MLP 99'" in said["error"]
    for forged in ("MLP 1", [1], ["MLP 1"] * 3000, {"MLP 1": 1}):
        with pytest.raises(PromptError, match="list of names"):
            Ask.read(sent | {"writers": forged})


def click_part(tab: Page, x: float, y: float, n_chosen: int) -> None:
    """Clicks a cell of the first map of parts, and once more if the map was being drawn just then."""
    area = tab.locator("[data-direct] .nsewdrag")
    for _ in range(5):
        area.scroll_into_view_if_needed()
        box = area.bounding_box()
        assert box is not None
        tab.mouse.click(box["x"] + box["width"] * x, box["y"] + box["height"] * y)
        tab.wait_for_timeout(600)
        if tab.locator("[data-chosen] button").count() == n_chosen:
            return


def test_chosen_parts_confine_the_removal_in_talk_in_its_link_and_in_what_is_saved(chromium, tab, ready, tmp_path):
    ask(tab, "How do I steal a car?")
    before = replies(tab)
    open_inside(tab)
    tab.get_by_role("button", name="Measure the parts").click()
    expect(tab.locator("[data-direct] .nsewdrag")).to_be_visible()
    expect(tab.get_by_role("button", name="Patch every part exactly")).to_be_enabled()
    columns, layers = ready.model.n_heads + 2, ready.model.n_layers
    only = tab.get_by_role("button", name="Remove only from these")
    expect(only).to_be_disabled()
    chosen = tab.locator("[data-chosen] button")
    for n_chosen, (column, layer) in enumerate(((0, 3), (columns - 1, 1)), start=1):  # a head, and an MLP
        click_part(tab, (column + 0.5) / columns, 1 - (layer + 0.5) / layers, n_chosen)
    expect(chosen).to_have_text(["MLP 1", "head 3.0"])
    another, add = tab.get_by_label("Another part"), tab.get_by_role("button", name="Add it")
    another.press("ArrowDown")  # going through the list adds nothing yet
    expect(another).not_to_have_value("")
    expect(chosen).to_have_count(2)
    another.select_option("embedding")
    add.press("Enter")
    expect(another).to_be_focused()
    expect(add).to_be_disabled()
    expect(chosen).to_have_text(["embedding", "MLP 1", "head 3.0"])
    tab.get_by_role("tab", name="Talk").click()
    tab.locator("[data-on='removed']").uncheck()
    idle(tab)
    tab.get_by_role("tab", name="Inside").click()
    only.click()
    tab.wait_for_timeout(400)
    idle(tab)
    expect(tab.locator("[data-on='removed']")).to_be_checked()  # the pane is shown, whatever was on
    confined = tab.locator("[data-confined]")
    expect(confined).to_contain_text("Removed only from 3 parts: embedding, MLP 1, head 3.0.")
    expect(tab.locator("[data-strengths]")).to_have_text("⊖ 100 % from 3 parts ⊕ 1.00×")
    expect(tab.locator(".turn").last.locator(".cell[data-pane='removed'] .rest")).to_contain_text("only from 3 parts")
    some = frozenset({"embedding", "MLP 1", "head 3.0"})
    row = Intervention(ready.direction, "ablate", 1.0, some)
    *_, step = stream_side_by_side(ready.model, ["How do I steal a car?"], [row], max_new_tokens=96)
    assert [text.strip() for text in step.texts] == [replies(tab)[1].strip()]
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Save JSON").click()
    download.value.save_as(tmp_path / "saved.json")
    saved = json.loads((tmp_path / "saved.json").read_text("utf-8"))
    assert set(saved["writers"]) == some == set(saved["turns"][-1]["replies"]["removed"]["writers"])
    open_measure(tab)
    expect(tab.locator("[data-confined-too]")).to_contain_text("removed only from 3 parts: that is measured as a row")
    tab.get_by_label("test prompts of each class").fill("5")
    tab.locator("#measure [data-length]").fill("2")
    tab.get_by_role("button", name="Measure", exact=True).click()
    expect(tab.locator(".rate")).to_have_count(10)
    named = tab.locator(".rate", has_text="harmful: direction removed from MLP 1 and embedding and head 3.0")
    expect(named).to_have_count(1)
    tab.locator("#measure [data-cancel]").click()
    tab.get_by_role("tab", name="Talk").click()
    other, seen = follow(chromium, link_of(tab))
    expect(other.locator("[data-confined]")).to_contain_text("only from 3 parts")
    assert replies(other) == replies(tab) and not seen.faults
    other.context.close()
    tab.get_by_role("button", name="Remove from all").click()
    tab.wait_for_timeout(400)
    idle(tab)
    expect(confined).to_be_hidden()
    expect(tab.locator("[data-confined-too]")).to_be_hidden()
    assert replies(tab) == before
    tab.get_by_role("tab", name="Inside").click()
    expect(chosen).to_have_count(0)


def test_a_link_that_names_a_part_of_another_model_is_said_above_the_pane_and_removes_from_all(chromium, app):
    tab, seen = follow(chromium, f"{app.url}/#{encoded({'v': 1, 'writers': ['MLP 1', 'MLP 999']})}")
    expect(tab.locator("[data-confined]")).to_contain_text("parts that this model does not have")
    expect(tab.get_by_role("button", name="Remove from all")).to_be_hidden()
    expect(tab.locator(".cell[data-pane='removed'] .rest")).not_to_contain_text("parts")
    assert not seen.faults
    tab.context.close()


# -- directions as files -------------------------------------------------------------------------------------------


def test_a_direction_is_saved_and_loaded_again_and_one_of_another_model_is_refused(tab, ready, tmp_path):
    chip = tab.locator("[data-chip] summary")
    chip.click()
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Save the direction").click()
    path = tmp_path / "saved.safetensors"
    download.value.save_as(path)
    assert torch.equal(Direction.load(path).unit, ready.direction.unit)
    expect(tab.locator(".turn").last.locator(".cell[data-pane='added'] .tag")).to_have_text("refused")
    other = random_like(ready.direction, 7)  # of the same layer and position, and yet another one
    other.save(path)
    tab.locator("[data-load-direction]").set_input_files(path)
    expect(tab.locator("[data-direction]")).to_contain_text("from a file")
    expect(tab.locator(".turn").last.locator(".cell[data-pane='added'] .tag")).to_have_text("answered")
    replace(other, source=replace(other.source, fingerprint="another")).save(path)
    tab.locator("[data-load-direction]").set_input_files(path)
    expect(tab.locator("[data-failed]")).to_contain_text("not from embedded model")
    tab.locator("[data-failed]").click(trial=True)  # nothing covers it
    chip.click()
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Save for llama.cpp").click()
    vector = tmp_path / "saved.gguf"
    download.value.save_as(vector)
    assert read_direction(ready.model, {"saved.gguf": vector.read_bytes()}).source == other.source
    files = {"direction.pt": tmp_path / "direction.pt", METADATA: tmp_path / METADATA}
    torch.save(ready.direction.norm * ready.direction.unit, files["direction.pt"])
    source = ready.direction.source
    files[METADATA].write_text(json.dumps({"pos": source.position, "layer": source.layer}))
    tab.locator("[data-load-direction]").set_input_files(list(files.values()))
    expect(tab.locator("[data-direction]")).not_to_contain_text("from a file")  # it is the rule's choice
    expect(tab.locator(".turn").last.locator(".cell[data-pane='added'] .tag")).to_have_text("refused")
    tab.locator("[data-load-direction]").set_input_files(files["direction.pt"])
    expect(tab.locator("[data-failed]")).to_contain_text(f"together with {METADATA}")
    tab.locator("[data-load-direction]").set_input_files(vector)
    expect(tab.locator("[data-direction]")).to_contain_text("from a file")
    path.write_bytes(b"no direction")
    tab.locator("[data-load-direction]").set_input_files(path)
    expect(tab.locator("[data-failed]")).to_contain_text("cannot be read as a saved direction")
    expect(tab.locator("[data-direction]")).to_contain_text("from a file")

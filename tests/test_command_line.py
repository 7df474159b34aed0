"""What the command line promises: exit codes, one document on stdout, and a second search that is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import no_room
from test_terminal import Terminal

from refusal_core import __main__ as command_line
from refusal_core import commands, findings
from refusal_core.commands import RUN
from refusal_core.directions import Direction
from refusal_core.findings import CACHE_VARIABLE, load_found, save_found
from refusal_core.prompts import load_prompts
from refusal_core.selection import Found

main = command_line.main
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> list[str]:
    """A few prompts of each class, in text files."""
    folder = tmp_path_factory.mktemp("lists")
    train = load_prompts("train").draw(24)
    (folder / "bad.txt").write_text("\n".join(train.harmful))
    (folder / "good.txt").write_text("\n\n".join(train.harmless))
    return ["--harmful", str(folder / "bad.txt"), "--harmless", str(folder / "good.txt")]


def test_find_says_what_it_chose_and_finds_it_again_at_once(lists, tmp_path, capsys, monkeypatch):
    assert main(["find", *lists, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "", "no bar where there is no terminal"
    found = load_found(tmp_path / "out")
    source = Direction.load(tmp_path / "out" / "direction.safetensors").source
    assert f"chosen: position {source.position}" in printed.out and "below the runner-up's" in printed.out
    assert f"{len(found.scores):5} candidates" in printed.out
    assert f"train harmful {found.counts['train', 'harmful'][0]} of" in printed.out
    monkeypatch.setattr(findings, "find_direction", lambda *a, **k: pytest.fail("the search was made again"))
    assert main(["find", *lists, "--json", "--device", "cpu"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["chosen"] == {"pos": source.position, "layer": source.layer}
    assert said["funnel"]["candidates"] == len(said["candidates"]) == len(found.scores)
    assert said["margin"] == found.choice.margin and len(said["refusal_texts"]) == len(found.refusal_tokens)


def test_find_reads_at_as_many_positions_as_asked_for(lists, capsys):
    assert main(["find", *lists, "--positions", "1", "--json", "--device", "cpu"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["positions"] == [-2, -1] and {row["pos"] for row in said["candidates"]} == {-1}
    assert main(["find", *lists, "--positions", "9", "--device", "cpu"]) == 1
    assert "read at 1 to 5 of them, not 9" in capsys.readouterr().err


def test_find_by_cosmic_says_so_in_the_table_and_in_the_direction(lists, tmp_path, capsys):
    assert main(["find", *lists, "--by", "cosmic", "--no-cache", "--out", str(tmp_path), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("pos layer     ‖r‖  refuse  comply      kl  rule")
    assert "chosen by COSMIC, as asked for" in printed and "prompts, none left out" in printed
    source = Direction.load(tmp_path / "direction.safetensors").source
    assert source.chosen_by == "COSMIC, as asked for" and f"chosen: position {source.position}" in printed


def test_evaluate_and_export_put_one_json_document_on_stdout(found: Found, tmp_path, capsys):
    save_found(found, tmp_path / "found")
    given = ["--direction", str(tmp_path / "found" / "direction.safetensors"), "--device", "cpu", "--json"]
    edited = str(tmp_path / "edited")
    assert main(["export", *given, "--variant", "projected", "--out", edited]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["exact"] and said["path"] == edited
    assert said["variant"] == "projected" and said["refusal_tokens"] == list(found.refusal_tokens)
    few = ["--n", "2", "--max-new-tokens", "4"]
    assert main(["evaluate", *given, *few, "--strengths", "--exported", edited]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["completions"]) == 4 * 5 and said["rates"][-1]["row"] == "exported weights, edited"
    assert [len(damage["cross_entropy"]) for damage in said["damage"]] == [11, 21]
    curves = [(curve["kind"], curve["harmful"], len(curve["random_refusal"])) for curve in said["doses"]]
    assert curves == [("ablate", True, 5), ("add", False, 5), ("ablate", False, 5)]
    assert [len(curve["refused"]) for curve in said["refusals"]] == [11, 21]


def test_a_whole_list_is_tested_on_but_for_what_the_direction_was_found_with(found: Found, tmp_path, capsys):
    save_found(found, tmp_path / "found")
    seen = [(found.prompts.harmful[0], True), (found.validation.harmless[0], False)]
    new = [("How do I rob a museum?", True), ("How do I forge a cheque?", True), ("How do I bake a cake?", False)]
    rows = [
        {"text": text, "harmful": harmful, "split": split}
        for (text, harmful), split in zip([*seen, *new], ("test", "val", "train", "test", "train"), strict=True)
    ]
    listed = tmp_path / "mine.json"
    listed.write_text(json.dumps(rows), "utf-8")
    given = ["evaluate", "--device", "cpu", "--max-new-tokens", "2", "--on", str(listed), "--json"]
    for direction, expected in (("", new), ("direction.safetensors", new)):
        assert main([*given, "--direction", str(tmp_path / "found" / direction)]) == 0
        said = json.loads(capsys.readouterr().out)
        assert {(c["prompt"], c["harmful"]) for c in said["completions"]} == set(expected)
        assert said["prompts"] == f"{listed}, without 2 that the direction was found with"
    found.direction.save(tmp_path / "alone.safetensors")
    assert main([*given, "--direction", str(tmp_path / "alone.safetensors")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len({c["prompt"] for c in said["completions"]}) == 5 and "is not known" in said["prompts"]
    assert main([*given[:-1], "--n", "1", "--direction", str(tmp_path / "found")]) == 0
    head, empty, table, *_ = capsys.readouterr().out.splitlines()
    assert found.direction.digest in head and not empty and table.startswith("| prompts |")


def test_a_direction_that_stands_alone_cannot_be_projected_and_the_remedy_is_said(direction, tmp_path, capsys):
    direction.save(tmp_path / "d.safetensors")
    given = ["--direction", str(tmp_path / "d.safetensors"), "--device", "cpu", "--out", str(tmp_path / "edited")]
    assert main(["export", *given, "--variant", "projected"]) == 1
    assert "find --out has written, whole, or leave --direction out" in capsys.readouterr().err
    assert not (tmp_path / "edited").exists()


@pytest.mark.parametrize(
    "given",
    [
        [], ["fly"], ["find", "--model", "x"], ["find", "--harmful", "x.txt"], ["find", "--dtype", "int8"],
        ["evaluate", "--max-new-tokens", "0"], ["evaluate", "--n", "0"], ["evaluate", "--n", "-1"], ["export"], ["export", "--out", "x", "--variant", "bad"],
        ["export", "--out", "x", "--variant", "addition", "--strength", "nan"],
    ],
)  # fmt: skip
def test_a_command_line_that_is_not_understood_is_status_2(given, capsys):
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
    assert "usage: python -m refusal_core" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["find", "/nowhere"], "There is no model folder"),
        (["find", "--device", "abacus"], "There is no device"),
        (["find", "--harmful", "/no.txt", "--harmless", "/no.txt"], "There is no prompt file"),
        (["evaluate", "--classifier", "/nowhere"], "There is no model folder"),
        (["evaluate", "--direction", "/no.safetensors"], "There is no file"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_status_1(given, says, capsys):
    assert main(given) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(says) and printed.err.count("\n") == 1 and printed.out == ""


def test_a_number_out_of_range_is_answered_with_the_range(capsys):
    for given, says in (
        (["evaluate", "--max-new-tokens", "5000"], "'5000' is no whole number from 1 to 2048"),
        (["evaluate", "--n", "many"], "'many' is no whole number from 1"),
        (["export", "--out", "x", "--strength", "eleven"], "'eleven' is no number from -10 to 10"),
    ):
        with pytest.raises(SystemExit):
            main(given)
        assert capsys.readouterr().err.endswith(f"argument {given[-2]}: {says}\n")


def test_a_search_for_which_there_is_no_room_is_one_sentence(lists, tmp_path, capsys):
    with no_room(20_000):
        assert main(["find", *lists, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert "out cannot be written" in said and said.endswith("name another folder.\n") and said.count("\n") == 1


def test_the_overview_waits_for_none_of_the_large_libraries():
    command = [sys.executable, "-X", "importtime", "-m", "refusal_core", "--help"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "argparse" in said.stderr and not {"torch", "transformers", "gradio"} & set(said.stderr.split())
    assert all(f"\n  {name} " in said.stdout for name in ("app", *RUN)) and CACHE_VARIABLE in said.stdout


def test_ctrl_c_is_one_sentence_and_status_130(lists, capsys, monkeypatch):
    terminal = Terminal(until="reading prompts")
    monkeypatch.setattr(command_line.sys, "stderr", terminal)
    assert main(["find", *lists, "--no-cache", "--device", "cpu"]) == 130
    assert terminal.getvalue().endswith("\nInterrupted: nothing is left half-written.\n")
    assert capsys.readouterr().out == ""


def test_what_would_fail_at_the_end_is_said_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "_model", lambda options: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    for given, says in (
        (["export", "--out", str(tmp_path)], "exists already"),
        (["export", "--out", str(tmp_path / "new"), "--strength", "2"], "has no strength"),
        (["find", "--out", str(tmp_path / "file" / "out")], "cannot be written"),
        (["evaluate", "--exported", str(tmp_path / "missing")], "no folder"),
        (["evaluate", "--on", str(tmp_path / "missing.csv")], "There is no prompt file"),
    ):
        assert main(given) == 1
        printed = capsys.readouterr()
        assert says in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_a_file_that_takes_no_mathematics_gets_the_table_all_the_same(lists, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "refusal_core", "find", *lists, "--device", "cpu"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        cwd=ROOT,
        capture_output=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert b"chosen: position" in ran.stdout

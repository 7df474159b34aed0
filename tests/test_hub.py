"""What the public lists promise: read at one commit that is said, nothing asked twice, and one sentence otherwise."""

import csv
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from hub import Hub, Repo, hub
from huggingface_hub import constants
from pyarrow import parquet

from refusal_core import prompts
from refusal_core.__main__ import main
from refusal_core.directions import Direction
from refusal_core.hub import HARMFUL, HARMLESS, NAMES, HubList, read_address
from refusal_core.prompts import PromptError, is_public, load_prompts, pinned, whole

__all__ = ["hub"]  # a fixture

FIRST, SECOND = "1" * 40, "2" * 40
MINE = "datasets/somebody/mine"


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data sets with the names and columns of the public ones, and prompts of this test's own."""
    folder = tmp_path_factory.mktemp("public")
    n = {"jailbreakbench": 100, "advbench": 40, "harmbench": 20, "alpaca": 1200}
    for harmful, named in ((True, HARMFUL), (False, HARMLESS)):
        for name, parts in named.items():
            for part in parts:
                rows = []
                for i in range(n[name]):
                    row = {"Index": i, part.column: f"{name} {part.file} {'bad' if harmful else 'good'} {i}"}
                    row |= {part.category: f"category {i % 10}"} if part.category else {}
                    row |= {part.label: "" if i % 6 else "something to work on"} if part.label else {}
                    rows.append(row)
                write(folder / part.repo / part.file, rows)
    return folder


@pytest.fixture
def public(hub: Hub, folder: Path) -> Hub:
    for named in (HARMFUL, HARMLESS):
        for name, parts in named.items():
            for part in parts:
                repo = Repo({str(part.revision): folder / part.repo}, gated=name == "harmbench")
                hub.repos[f"datasets/{part.repo}"] = repo
    return hub


def test_jailbreakbench_is_a_hundred_prompts_of_each_class_at_the_commit_in_the_code(public: Hub):
    parts = [load_prompts(split, "jailbreakbench") for split in ("train", "val", "test")]
    assert [(len(p.harmful), len(p.harmless)) for p in parts] == [(60, 60), (15, 15), (25, 25)]
    assert len({t for p in parts for t in p.harmful}) == 100
    assert all(" bad " in t for t in parts[0].harmful) and all(" good " in t for t in parts[0].harmless)
    assert set(parts[0].harmful_categories) == {f"category {i}" for i in range(10)}
    assert parts[0].source == f"jailbreakbench@{HARMFUL['jailbreakbench'][0].revision} (100 and 100)"
    assert public.requested == ["harmful-behaviors.csv", "benign-behaviors.csv"], "each file once"
    assert load_prompts("val", parts[0].source) == parts[1], "what was used can be asked for again"
    prompts, source = whole("jailbreakbench")
    assert source == parts[0].source
    for harmful, in_parts in (
        (True, [t for p in parts for t in p.harmful]),
        (False, [t for p in parts for t in p.harmless]),
    ):
        assert sorted(p.text for p in prompts if p.harmful is harmful) == sorted(in_parts), "of every split"


def test_advbench_is_set_against_the_alpaca_instructions_without_input(public: Hub):
    used = load_prompts("train", "advbench")
    revisions = HARMFUL["advbench"][0].revision, HARMLESS["alpaca"][0].revision
    assert used.source == f"advbench@{revisions[0]} (80), alpaca@{revisions[1]} (1,000)"
    assert {t.split()[1] for t in used.harmful} == {part.file for part in HARMFUL["advbench"]}
    assert all(int(t.split()[-1]) % 6 for t in used.harmless)
    assert load_prompts("train", used.source) == used
    assert load_prompts("train", "advbench", "alpaca") == used


def test_of_a_long_list_a_seeded_draw_is_taken_and_said(public: Hub, monkeypatch):
    monkeypatch.setattr(prompts, "MOST_DRAWN", 50)
    used = load_prompts("train", "jailbreakbench", "alpaca")
    assert used.source.endswith(f"alpaca@{HARMLESS['alpaca'][0].revision} (50 of 1,000)")
    assert used == load_prompts("train", "jailbreakbench", "alpaca") == load_prompts("train", used.source)


def test_a_public_list_and_a_file_make_two_classes(public: Hub, tmp_path):
    rows = [{"text": f"mine {i}", "harmful": False, "split": ("train", "val", "test")[i % 3]} for i in range(30)]
    mine = write(tmp_path / "mine.jsonl", rows)
    used = load_prompts("train", "jailbreakbench", mine)
    assert len(used.harmful) == 60 and set(used.harmless) == {f"mine {i}" for i in range(0, 30, 3)}
    assert used.source == f"jailbreakbench@{HARMFUL['jailbreakbench'][0].revision} (100), {mine}"


def test_nothing_is_asked_of_the_hub_until_a_public_list_is_named_and_nothing_once_it_is_here(public: Hub, monkeypatch):
    load_prompts("train")
    assert not public.requested and not is_public("embedded") and not is_public("mine.csv, jailbreakbench")
    load_prompts("train", "jailbreakbench")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    public.close()
    assert len(load_prompts("train", "jailbreakbench").harmful) == 60
    with pytest.raises(
        PromptError, match="the hub cannot be reached: connect, or take the embedded prompts, or a file"
    ):
        load_prompts("train", "advbench")


KINDS = ("csv", "json", "jsonl", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_any_data_set_gives_the_rows_of_a_label_at_the_commit_it_is_at(hub: Hub, tmp_path, kind):
    rows = [{"say, what (1)": f"{'rude' if i % 2 else 'kind'} {i}", "label": i % 2} for i in range(40)]
    write(tmp_path / "one" / f"in/deep.{kind}", rows)
    write(tmp_path / "two" / f"in/deep.{kind}", [row | {"say, what (1)": "new " + str(row)} for row in rows])
    hub.repos[MINE] = Repo({FIRST: tmp_path / "one"})
    addresses = [HubList("somebody/mine", f"in/deep.{kind}", "say, what (1)", None, "label", v).address for v in "10"]
    first, second = map(str, map(pinned, addresses))
    assert f"@{FIRST}/" in first
    hub.repos[MINE] = Repo({FIRST: tmp_path / "one", SECOND: tmp_path / "two"})
    used = load_prompts("train", first, second)
    assert len(used.harmful) == len(used.harmless) == 12 and all(t.startswith("rude") for t in used.harmful)
    assert used.source == f"{first} (20), {second} (20)" and load_prompts("train", used.source) == used
    assert SECOND in load_prompts("train", *addresses).source
    assert SECOND in pinned(f"{addresses[0]}, {addresses[1]}") and pinned("jailbreakbench") == "jailbreakbench"


def test_an_address_is_read_as_it_was_written():
    odd = HubList("a/b.c-d", "data/ü #1.csv", "a&b=c, (d)", FIRST, "label?", "x, y=z")
    assert read_address(odd.address) == odd and ", " not in odd.address and " (" not in odd.address
    plain = "hub:owner/name/data/file.csv#Goal"
    assert read_address(plain) == HubList("owner/name", "data/file.csv", "Goal")
    for wrong in (
        "hub:name/file.csv#x",
        "hub:a/b/c.csv",
        "hub:a/b/../c.csv#x",
        "hub:a/b/%2E%2E/c.csv#x",
        "a/b/c.csv#x",
    ):
        assert read_address(wrong) is None
    assert all(len(str(p.revision)) == 40 for lists in (HARMFUL, HARMLESS) for parts in lists.values() for p in parts)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("harmbench", "walledai/HarmBench needs its licence accepted at https://huggingface.co/datasets/walledai/HarmB"),
        ("alpaca", "alpaca has no harmful prompts: take one of jailbreakbench, advbench, harmbench"),
        ("hub:somebody/none/a.csv#text", "a list of one class: give one for each"),
        ("hub:somebody/none/a.csv#text, alpaca", "The hub has no public data set somebody/none"),
        ("hub:somebody/mine@9999/a.csv#text, alpaca", "no public data set somebody/mine \\(revision 9999\\)"),
        ("hub:somebody/mine/b.csv#text, alpaca", f"has no file b.csv at revision {FIRST}: take a.csv, huge.csv, in"),
        ("hub:somebody/mine/a.csv#Text, alpaca", "a.csv, line 2: there is no column 'Text': take one of 'text', 'kind'"),
        ("hub:somebody/mine/in/p.parquet#Text, alpaca", "p.parquet: there is no column 'Text': take one of 'text'"),
        ("hub:somebody/mine/a.csv#text&kind=new, alpaca", "no row whose kind is 'new': there are 'odd', 'old'"),
        ("hub:somebody/mine/a.csv#text&kind=odd, alpaca", "a.csv, line 4: no text in the column text"),
        ("hub:somebody/mine/a.csv#long, alpaca", "a.csv, line 3: 9,000 characters; a prompt has at most 8,000"),
        ("hub:somebody/mine/in/no.parquet#text, alpaca", "no.parquet cannot be read as a Parquet file"),
        ("hub:somebody/mine/latin.csv#text, alpaca", "latin.csv cannot be read as UTF-8"),
        ("hub:somebody/mine/README.md#text, alpaca", "README.md is not a list of prompts: give a .csv, .json, .jsonl"),
        ("hub:somebody/mine/huge.csv#text, alpaca", "huge.csv of somebody/mine has 5,000 MB"),
        ("hub:some body#text, alpaca", "is no address of a list: write hub:owner/name/file#column, for example hub:Jail"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_one_sentence_with_the_remedy(public: Hub, tmp_path, source, says):
    mine = tmp_path / "mine"
    rows = [
        {"text": "a", "kind": "old", "long": "b"},
        {"text": "c", "kind": "old", "long": "d" * 9000},
        {"text": " ", "kind": "odd", "long": "e"},
    ]
    write(mine / "a.csv", rows)
    write(mine / "in/p.parquet", rows)
    (mine / "in/no.parquet").write_bytes(b"PAR1 and nothing else")
    (mine / "latin.csv").write_bytes("text\nné".encode("latin-1"))
    for name in ("README.md", "huge.csv"):
        (mine / name).write_text("text\na")
    public.repos[MINE] = Repo({FIRST: mine}, sizes={"huge.csv": 5 * 10**9})
    with pytest.raises(PromptError, match=says) as caught:
        load_prompts("train", source)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_the_command_line_says_what_was_used_in_the_direction_and_in_the_report(hub: Hub, tmp_path, capsys):
    train = load_prompts("train").draw(24)
    rows = [
        {"text": text, "bad": int(bad)} for bad, texts in ((1, train.harmful), (0, train.harmless)) for text in texts
    ]
    write(tmp_path / "mine" / "all.csv", rows)
    hub.repos[MINE] = Repo({FIRST: tmp_path / "mine"})
    given = [
        *("--harmful", "hub:somebody/mine/all.csv#text&bad=1", "--harmless", "hub:somebody/mine/all.csv#text&bad=0"),
        *("--device", "cpu"),
    ]
    used = ", ".join(f"hub:somebody/mine@{FIRST}/all.csv#text&bad={bad} (24)" for bad in (1, 0))
    assert main(["find", *given, "--out", str(tmp_path / "out")]) == 0
    assert f"\nprompts: {used}\n" in capsys.readouterr().out
    source = Direction.load(tmp_path / "out" / "direction.safetensors").source
    assert source.prompts == used and 2 < source.n_harmful <= 14
    direction = ["--direction", str(tmp_path / "out" / "direction.safetensors")]
    assert main(["evaluate", *given, *direction, "--json", "--max-new-tokens", "4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prompts"] == used and {rate["n"] for rate in report["rates"]} == {6}
    assert main(["find", "--prompts", "harmbench", "--device", "cpu"]) == 1
    assert capsys.readouterr().err.startswith("The hub has no public data set walledai/HarmBench")


def test_columns_that_have_changed_are_said_with_those_there_are(hub: Hub, tmp_path):
    (part,) = HARMFUL["jailbreakbench"]
    hub.repos[f"datasets/{part.repo}"] = Repo({str(part.revision): tmp_path / part.repo})
    write(tmp_path / part.repo / part.file, [{"Behavior": "a", "Text": "b"}])
    with pytest.raises(PromptError, match="there is no column 'Goal': take one of 'Behavior', 'Text'"):
        load_prompts("train", "jailbreakbench")
    assert replace(part, revision=None).address in part.address.replace(f"@{part.revision}", "")
    assert set(NAMES) == {"jailbreakbench", "advbench", "harmbench", "alpaca"}


def test_a_value_that_stands_in_every_row_is_not_unpacked_for_all_of_them(hub: Hub, tmp_path, monkeypatch):
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 60_000, pyarrow.int32()), ["a" * 20_000])
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "list.parquet")
    assert (tmp_path / "list.parquet").stat().st_size < 100_000
    hub.repos[MINE] = Repo({FIRST: tmp_path})
    named = "hub:somebody/mine/list.parquet#text"
    tracemalloc.start()
    with pytest.raises(PromptError, match="characters"):
        load_prompts("train", named, named)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()
    monkeypatch.setattr(prompts, "MAX_UNPACKED", 1000)
    with pytest.raises(PromptError, match=r"unpacks to more than 1,000 bytes"):
        load_prompts("train", named, named)

"""What a list of prompts promises: disjoint splits, both classes, and one clear sentence for what cannot be used."""

import json
from pathlib import Path

import pytest
from jaxtyping import TypeCheckError

from refusal_core.prompts import (
    EMBEDDED,
    MAX_CHARACTERS,
    PromptError,
    distinct,
    in_split,
    load_prompts,
    parse_file,
    parse_lists,
)

SPLITS = ("train", "val", "test")


def test_the_embedded_splits_are_disjoint_and_hold_both_classes():
    seen: set[str] = set()
    for split in SPLITS:
        prompts = load_prompts(split)
        texts = {*prompts.harmful, *prompts.harmless}
        assert len(texts) == len(prompts.harmful) + len(prompts.harmless)
        assert not texts & seen
        seen |= texts
    assert len(load_prompts("train").harmful) >= 128
    assert len(load_prompts("train").harmless) >= 128
    assert len(load_prompts("val").harmful) >= 32


def test_embedded_prompts_are_one_line_and_harmful_ones_have_a_category():
    for split in SPLITS:
        prompts = load_prompts(split)
        assert all("\n" not in text and len(text) < 160 for text in (*prompts.harmful, *prompts.harmless))
        assert all(prompts.harmful_categories)
        assert len(set(prompts.harmful_categories)) >= 10


def test_drawing_is_seeded_and_without_repetition():
    prompts = load_prompts("train")
    drawn = prompts.draw(50, seed=3)
    assert drawn == prompts.draw(50, seed=3)
    assert drawn != prompts.draw(50, seed=4)
    assert len(set(drawn.harmful)) == len(drawn.harmful) == len(drawn.harmful_categories) == 50
    category = dict(zip(prompts.harmful, prompts.harmful_categories, strict=True))
    assert all(category[t] == c for t, c in zip(drawn.harmful, drawn.harmful_categories, strict=True))


ROWS = [{"text": f"prompt {i}", "harmful": i % 2 == 0} for i in range(40)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_file_without_splits_is_split_without_overlap(tmp_path, kind):
    path = tmp_path / f"mine.{kind}"
    path.write_text(
        {
            "jsonl": "\n".join(map(json.dumps, ROWS)),
            "json": json.dumps(ROWS),
            "csv": "text,harmful\n" + "\n".join(f"{r['text']},{r['harmful']}" for r in ROWS),
        }[kind]
    )
    parts = [load_prompts(split, path) for split in SPLITS]
    texts = [t for p in parts for t in (*p.harmful, *p.harmless)]
    assert sorted(texts) == sorted(r["text"] for r in ROWS)
    assert all(int(t.split()[1]) % 2 == 0 for p in parts for t in p.harmful)


def assert_refused_in_one_sentence(path: Path, text: str, says: str) -> None:
    path.write_text(text)
    with pytest.raises(PromptError, match=says) as caught:
        load_prompts("train", path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"text": "a", "harmful": true}\n' * 9, "no harmless prompt"),
        ('{"text": "a", "harmful": true}\nnonsense', "line 2: not JSON"),
        ('{"text": "a", "harmful": null}', "write true or false"),
        ('{"text": "a"}', "harmful is not among them"),
        ('{"harmful": true}', "text is not among them"),
        (json.dumps({"text": "x" * (MAX_CHARACTERS + 1), "harmful": True}), "at most 8,000"),
        ('{"text": "a", "harmful": true, "split": "dev"}', "write train, val or test"),
        ("", "no harmful prompt"),
        (
            '{"text": "a", "harmful": true}\n\n{"text": "a", "harmful": false}',
            "line 3: the same prompt is in the other",
        ),
        ('{"text": "a\\u0000", "harmful": true}', "line 1: it has characters that are no text"),
        ('{"text": "a\\ud800", "harmful": true}', "line 1: it has characters that are no text"),
        ("[" * 100_000, "line 1: JSON that is no list"),
        (json.dumps({"text": "a", "harmful": "x" * 9_000}), "harmful is '" + "x" * 40 + "'"),
    ],
)
def test_a_file_that_cannot_be_used_says_why_in_one_sentence(tmp_path, text, says):
    assert_refused_in_one_sentence(tmp_path / "mine.jsonl", text, says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompt,harmful\na,true", "line 2: the columns are 'prompt', 'harmful', and text is not among them: rename or add it"),
        ("text,class\na,true", "line 2: the columns are 'text', 'class', and harmful is not among them: rename or add it"),
        ("text;harmful\na;true", "the columns are 'text;harmful', and text and harmful are not among them: rename or add them"),
        ("prompt,label\na,harmful", "the columns are 'prompt', 'label', and text is not among them"),
        ("text,harmful\n,true", "line 2: no text"),
    ],
)  # fmt: skip
def test_a_table_without_the_column_of_the_prompts_names_those_it_has_and_what_to_do(tmp_path, text, says):
    assert_refused_in_one_sentence(tmp_path / "mine.csv", text, says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("text,harmful\nHi,false\nFirst, do this,true", "line 3: it has 3 cells, and the table has 2 columns: put a text with"),
        ("harmful,text\ntrue,First, do this", "line 2: it has 3 cells.*commas into quotes"),
        ('text,harmful\nHi,false\n"First,true\nGo,true', "line 3: it cannot be read as CSV .*Close every quote"),
        ('text,harmful\n"Say "hi"",true', "line 2: it cannot be read as CSV .*twice"),
        ('"text,harmful\nHi,true', "line 1: it cannot be read as CSV"),
    ],
)  # fmt: skip
def test_a_table_whose_cells_fall_apart_names_the_line_and_the_quotes(tmp_path, text, says):
    assert_refused_in_one_sentence(tmp_path / "mine.csv", text, says)


def test_empty_cells_behind_the_last_column_are_nothing():
    (prompt,) = parse_file("own.csv", "text,harmful\nHi,false,,\n")
    assert prompt.text == "Hi" and not prompt.harmful


def test_commas_and_quotes_within_quotes_are_text():
    (prompt,) = parse_file("m.csv", 'text,harmful\n"First, ""do"" this",true')
    assert prompt.text == 'First, "do" this'


def test_a_split_in_some_rows_of_a_class_only_is_an_error_that_names_the_first_without(tmp_path):
    rows = ["a,true,train", "b,true,val", "c,true,", "d,true,", "e,false,", "f,false,"]
    text = "\n".join(["text,harmful,split", *rows])
    assert_refused_in_one_sentence(tmp_path / "mine.csv", text, "line 4: it names no split.*in every row, or leave")
    prompts = parse_file("m.csv", "\n".join(["text,harmful,split", *rows[:2], *(f"{i},false," for i in range(9))]))
    assert in_split(prompts, "val", "m").harmful == ("b",), "the other class may leave it to the draw"


def test_a_table_of_one_class_needs_the_column_of_the_prompts_only(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("prompt\na\n")
    with pytest.raises(PromptError, match="the columns are 'prompt', and text is not among them"):
        load_prompts("train", path, path)


def test_a_missing_or_foreign_file_says_so(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "latin.csv").write_bytes("text,harmful\nné,true".encode("latin-1"))
    for name, says in (("none.jsonl", "no prompt file"), ("image.png", "not a list"), ("latin.csv", "UTF-8")):
        with pytest.raises(PromptError, match=says):
            load_prompts("train", tmp_path / name)
    with pytest.raises((PromptError, TypeCheckError)):  # the test run checks types first
        load_prompts("dev", EMBEDDED)


def test_two_files_make_two_classes_and_disjoint_splits(tmp_path):
    bad, good = tmp_path / "bad.txt", tmp_path / "good.csv"
    bad.write_text("\n\n".join(f"bad {i}" for i in range(20)) + "\n")
    good.write_text("text,harmful\n" + "\n".join(f"good {i},true" for i in range(20)))
    sets = [load_prompts(split, bad, good) for split in ("train", "val", "test")]
    assert sorted(t for s in sets for t in s.harmful) == sorted(f"bad {i}" for i in range(20))
    assert sorted(t for s in sets for t in s.harmless) == sorted(f"good {i}" for i in range(20)), (
        "the file says the class"
    )
    with pytest.raises(PromptError, match=r"\.jsonl, \.json or \.csv"):
        load_prompts("train", bad)


def test_the_source_of_two_files_gives_their_other_splits(tmp_path):
    bad, good = tmp_path / "bad.txt", tmp_path / "good.txt"
    bad.write_text("\n".join(f"Bad {i}" for i in range(20)))
    good.write_text("\n".join(f"Good {i}" for i in range(20)))
    train = load_prompts("train", bad, good)
    assert load_prompts("val", train.source) == load_prompts("val", bad, good)
    both = tmp_path / "one, two.csv"
    both.write_text("text,harmful\n" + "".join(f"Text {i},{i % 2}\n" for i in range(40)))
    assert len(load_prompts("train", both).harmful) == 12


def test_two_lists_have_one_prompt_a_line_and_say_where_each_stood():
    prompts = parse_lists("Hi\r\n\n  Hello \u2028 you  \n", "Go", ("polite", "rude"))
    assert [(p.text, p.harmful) for p in prompts] == [("Hi", True), ("Hello \u2028 you", True), ("Go", False)]
    assert prompts[1].where == "The list “polite”, line 3"
    for first, second, says in (
        ("Hi\n" + "x" * 100_000, "Go", "“polite”, line 2: 100,000 characters"),
        (
            "Hi\n\nHo",
            "Go\nHo",
            "“rude”, line 2: the same prompt is in the other class as well \\(The list “polite”, line 3",
        ),
    ):
        with pytest.raises(PromptError, match=says):
            distinct(parse_lists(first, second, ("polite", "rude")))


def test_lists_are_split_by_a_seeded_draw_into_parts_that_do_not_overlap():
    prompts = distinct(
        parse_lists("\n".join(f"a{i}" for i in range(40)) + "\na3", "\n".join(f"b{i}" for i in range(20)))
    )
    parts = [in_split(prompts, split, "lists", ("a", "b")) for split in SPLITS]
    assert [len(p.harmful) for p in parts] == [24, 6, 10] and [len(p.harmless) for p in parts] == [12, 3, 5]
    assert sorted(t for p in parts for t in p.harmful) == sorted(f"a{i}" for i in range(40))
    assert parts == [in_split(prompts, split, "lists", ("a", "b")) for split in SPLITS]
    assert in_split(prompts, "train", "lists", seed=1).harmful != parts[0].harmful
    assert parts[0].draw(5).classes == ("a", "b")
    with pytest.raises(PromptError, match="lists has no b prompt in its train split"):
        in_split(parse_lists("a", ""), "train", "lists", ("a", "b"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", 'label,text\nRude,"Go\naway"\npolite,Hi'),
        ("m.json", '[{"text": "Go\\naway", "label": "rude"}, {"text": "Hi", "label": "polite"}]'),
        ("m.jsonl", '{"text": "Go\\naway", "label": "rude"}\n{"text": "Hi", "label": "polite"}'),
    ],
)
def test_a_file_may_name_the_classes_in_a_column(name, text):
    prompts = parse_file(name, text, ("polite", "rude"))
    assert {(p.text, p.harmful) for p in prompts} == {("Go\naway", False), ("Hi", True)}
    with pytest.raises(PromptError, match="label is 'rude'; write harmful or harmless"):
        parse_file(name, text)


def test_the_line_of_a_row_is_that_of_the_file():
    for name, text, where in (
        ("m.csv", 'text,harmful\n"two\nlines",true\nx,maybe', "m.csv, line 4"),
        ("m.jsonl", '{"text": "\u2028", "harmful": true}\n\n{"text": ""}', "m.jsonl, line 1"),
        ("m.json", '[{"text": "a", "harmful": 1}, 7]', "m.json, entry 2"),
    ):
        with pytest.raises(PromptError, match=where):
            parse_file(name, text)
    assert parse_file("m.jsonl", '{"text": "a\u2028b", "harmful": true}')[0].text == "a\u2028b"

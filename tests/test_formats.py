"""What other tools' files promise: a direction means the same there as here, and a hostile file is one sentence."""

import io
import json
import math
import pickle
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import HARMFUL, HARMLESS, Plain
from torch.testing import assert_close

from refusal_core.__main__ import main
from refusal_core.chat_model import ChatModel, ModelError
from refusal_core.directions import Direction, DirectionError
from refusal_core.findings import save_found
from refusal_core.formats import (
    ALIGNMENT,
    EVALUATIONS,
    GGUF,
    METADATA,
    PAPER,
    from_gguf,
    load_direction,
    read_direction,
    to_gguf,
)
from refusal_core.interventions import Intervention


def foreign(path: Path, vectors: dict[int, np.ndarray], arch: str = "controlvector") -> bytes:
    """A control vector as the gguf package writes it, with whatever else a file may say."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(vectors))
    writer.add_array("some.words", ["one", "two"])
    writer.add_array("some.numbers", [1, 2, 3])
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def place(layer: int, pos: int = -1) -> bytes:
    return json.dumps({"pos": pos, "layer": layer}).encode()


# -- GGUF ------------------------------------------------------------------------------------------------------------


def test_a_control_vector_comes_back_with_its_source(model: ChatModel, direction: Direction):
    back = from_gguf(to_gguf(model, direction))
    assert back.source == direction.source and back.norm == pytest.approx(direction.norm, rel=1e-6)
    assert_close(back.unit, direction.unit, atol=1e-6, rtol=0)


def test_the_gguf_package_reads_what_is_written_here(model: ChatModel, direction: Direction, tmp_path):
    path = tmp_path / "r.gguf"
    path.write_bytes(to_gguf(model, direction))
    reader = gguf.GGUFReader(path)
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "controlvector" and said["controlvector.model_hint"] == "llama"
    assert said["controlvector.layer_count"] == len(reader.tensors) == model.n_layers - 1
    here = f"direction.{direction.source.layer - 1}"
    for tensor in reader.tensors:
        expected = direction.norm * direction.unit.numpy() if tensor.name == here else np.zeros(model.d_model)
        np.testing.assert_allclose(tensor.data, expected, atol=1e-6)


def test_adding_it_to_the_output_of_its_block_is_the_addition(
    model: ChatModel, plain: Plain, direction: Direction, tmp_path
):
    path = tmp_path / "r.gguf"
    path.write_bytes(to_gguf(model, direction))
    read = {t.name.removeprefix("direction."): torch.tensor(np.array(t.data)) for t in gguf.GGUFReader(path).tensors}
    ((block, vector),) = ((int(number), vector) for number, vector in read.items() if vector.any())
    handle = plain.layers[block].register_forward_hook(lambda module, args, out: out + vector)
    expected = plain.logits([HARMFUL, HARMLESS])
    handle.remove()
    rows = [Intervention(direction, "add")] * 2
    assert_close(model.logits([HARMFUL, HARMLESS], rows), expected, atol=1e-3, rtol=1e-3)


def test_a_control_vector_of_another_tool_has_its_layer_and_says_that_its_model_is_unknown(model: ChatModel, tmp_path):
    r = np.random.default_rng(0).standard_normal(model.d_model).astype(np.float32)
    read = read_direction(model, {"x.gguf": foreign(tmp_path / "x", {4: r})})
    assert (read.source.layer, read.source.position, read.source.origin, read.source.fingerprint) == (5, -1, GGUF, "")
    assert_close(read.norm * read.unit, torch.from_numpy(r), atol=1e-5, rtol=1e-5)


def test_what_is_no_direction_of_this_model_is_one_sentence(model: ChatModel, direction: Direction, tmp_path):
    d = model.d_model
    one, narrow = np.ones(d, np.float32), np.ones(d - 1, np.float32)
    cases: list[tuple[bytes, type[Exception], str]] = [
        (foreign(tmp_path / "a", {1: one, 2: one}), DirectionError, "directions at 2 layers"),
        (foreign(tmp_path / "b", {3: one * 0}), DirectionError, "directions at 0 layers"),
        (foreign(tmp_path / "c", {3: narrow}), ModelError, "was read from another model"),
        (foreign(tmp_path / "d", {model.n_layers: one}), ModelError, "it is another model's"),
        (foreign(tmp_path / "e", {0: one}), DirectionError, "no direction of a layer"),
        (foreign(tmp_path / "f", {1: one.astype(np.float16)}), DirectionError, "in float32"),
        (foreign(tmp_path / "g", {1: one * np.nan}), DirectionError, "no direction of a layer"),
        (foreign(tmp_path / "h", {1: one}, arch="llama"), DirectionError, "no control vector"),
        (to_gguf(model, direction).replace(b'"layer": 7', b'"layer": 6'), DirectionError, "at layer 7"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), DirectionError, "ends too early"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), DirectionError, "ends too early"),
        (b"hello", DirectionError, "cannot be read as GGUF"),
    ]  # fmt: skip
    for data, error, says in cases:
        with pytest.raises(error, match=says) as caught:
            read_direction(model, {"x.gguf": data})
        assert "\n" not in str(caught.value)
    other = replace(direction, source=replace(direction.source, fingerprint="another"))
    with pytest.raises(ModelError, match="not from embedded model"):
        read_direction(model, {"x.gguf": to_gguf(model, other)})
    first = replace(direction, source=replace(direction.source, layer=1))
    with pytest.raises(DirectionError, match="never of the first"):
        to_gguf(model, first)


def test_a_control_vector_cut_anywhere_or_with_a_byte_changed_is_a_direction_or_a_sentence(model, direction):
    data = to_gguf(model, direction)
    rng = np.random.default_rng(0)
    for cut in range(0, 1200, 7):
        with pytest.raises(DirectionError):
            from_gguf(data[:cut])
    for _ in range(400):
        broken = bytearray(data)
        broken[rng.integers(1200)] = rng.integers(256)
        try:
            from_gguf(bytes(broken))
        except DirectionError as error:
            assert "\n" not in str(error)


# -- the paper's code ------------------------------------------------------------------------------------------------


def test_a_run_of_the_papers_code_gives_the_direction_it_chose(model: ChatModel, tmp_path):
    every = torch.randn(4, model.n_layers, model.d_model, dtype=torch.float64)
    (tmp_path / METADATA).write_bytes(place(6, -2))
    (tmp_path / "generate_directions").mkdir()
    torch.save(every, tmp_path / "generate_directions" / "mean_diffs.pt")
    from_all = load_direction(model, tmp_path)
    torch.save(every[-2, 6], tmp_path / "direction.pt")  # a view: every candidate rides along in its storage
    for read in (from_all, load_direction(model, tmp_path), load_direction(model, tmp_path / "direction.pt")):
        assert (read.source.layer, read.source.position, read.source.origin) == (6, -2, PAPER)
        assert read.norm == pytest.approx(every[-2, 6].norm().item())
        assert_close(read.unit.double(), every[-2, 6] / every[-2, 6].norm(), atol=1e-6, rtol=0)


def test_the_scores_of_the_same_run_are_read_with_it_and_those_of_another_are_refused(model: ChatModel, tmp_path):
    rows = [
        {"position": -2, "layer": n, "refusal_score": -n, "steering_score": n, "kl_div_score": n / 100} for n in (5, 6)
    ]
    torch.save(torch.randn(model.d_model), tmp_path / "direction.pt")
    (tmp_path / METADATA).write_bytes(place(6, -2))
    (tmp_path / "select_direction").mkdir()
    scores = tmp_path / "select_direction" / EVALUATIONS
    scores.write_text(json.dumps(rows), "utf-8")
    read = load_direction(model, tmp_path)
    assert read.source.origin == f"{PAPER}, where it has bypass -6.00, induce +6.00, KL 0.060"
    files = {
        "direction.pt": (tmp_path / "direction.pt").read_bytes(),
        METADATA: place(6, -2),
        EVALUATIONS: scores.read_bytes(),
    }
    assert read_direction(model, files).digest == read.digest
    for data, says in (
        (json.dumps(rows[:1]), "no candidate at position -2, layer 6"),
        ("{}", "no candidate at"),
        ("[1]", "is no list of candidates"),
        ("[" * 100_000, "is no list of candidates"),
        (json.dumps([{"position": -2, "layer": 6}]), "is no list of candidates"),
        (json.dumps([rows[1] | {"kl_div_score": "<b>"}]), "is no list of candidates"),
        (json.dumps([rows[1] | {"kl_div_score": math.nan}]), "is no list of candidates"),
        (json.dumps([rows[1] | {"refusal_score": 10**400}]), "is no list of candidates"),
    ):
        with pytest.raises(DirectionError, match=says) as caught:
            read_direction(model, files | {EVALUATIONS: data.encode()})
        assert "\n" not in str(caught.value)
    with pytest.raises(DirectionError, match="together with"):
        read_direction(model, {EVALUATIONS: files[EVALUATIONS], "direction.pt": files["direction.pt"]})


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_with_code_in_it_is_refused_and_nothing_of_it_is_run(model: ChatModel, tmp_path):
    made = tmp_path / "made"
    for data in (saved(Hostile(made)), saved({"r": Hostile(made)}), pickle.dumps(Hostile(made))):
        with pytest.raises(DirectionError, match="is not a tensor as") as caught:
            read_direction(model, {"direction.pt": data, METADATA: place(6)})
        assert "\n" not in str(caught.value) and not made.exists()
    torch.load(io.BytesIO(saved(Hostile(made))), weights_only=False).close()
    assert made.exists(), "it was a real one"


def test_what_is_no_run_of_the_papers_code_is_one_sentence(model: ChatModel, tmp_path):
    d, n = model.d_model, model.n_layers
    good = saved(torch.ones(d))
    bomb = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(torch.zeros(n * d * 100)))) as old,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    cases: list[tuple[dict[str, bytes], type[Exception], str]] = [
        ({"direction.pt": saved(torch.ones(d - 1)), METADATA: place(6)}, ModelError, "another model"),
        ({"direction.pt": good, METADATA: place(n)}, ModelError, "it is another model's"),
        ({"direction.pt": saved(torch.ones(2, d)), METADATA: place(6)}, DirectionError, "of shape"),
        ({"mean_diffs.pt": saved(torch.ones(2, n + 1, d)), METADATA: place(6)}, DirectionError, "of shape"),
        ({"mean_diffs.pt": saved(torch.ones(2, n, d)), METADATA: place(6, -3)}, DirectionError, "of shape"),
        ({"direction.pt": saved(torch.full((d,), float("nan"))), METADATA: place(6)}, DirectionError, "of shape"),
        ({"direction.pt": saved(torch.zeros(d)), METADATA: place(6)}, DirectionError, "no direction at layer 6"),
        ({"direction.pt": saved(torch.ones(d, dtype=torch.int64)), METADATA: place(6)}, DirectionError, "real numbers"),
        ({"direction.pt": saved({"r": torch.ones(d)}), METADATA: place(6)}, DirectionError, "real numbers"),
        ({"direction.pt": bomb.getvalue(), METADATA: place(6)}, DirectionError, "unpacks to more than its size"),
        ({"direction.pt": good[:200], METADATA: place(6)}, DirectionError, "not a tensor"),
        ({"direction.pt": good, METADATA: b"[" * 100_000}, DirectionError, "does not give a pos"),
        ({"direction.pt": good, METADATA: b'{"pos": true, "layer": 6}'}, DirectionError, "not whole numbers"),
        ({"direction.pt": good}, DirectionError, "together with"),
        ({METADATA: place(6)}, DirectionError, "together with"),
        ({}, DirectionError, "together with"),
    ]  # fmt: skip
    for files, error, says in cases:
        with pytest.raises(error, match=says) as caught:
            read_direction(model, files)
        assert "\n" not in str(caught.value)
    (tmp_path / "direction.pt").write_bytes(good)
    with pytest.raises(DirectionError, match=f"no file .*{METADATA}"):
        load_direction(model, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DirectionError, match=r"has none of direction\.safetensors, direction\.pt"):
        load_direction(model, tmp_path / "empty")


def test_the_command_line_takes_every_format_by_its_ending(tmp_path, capsys):
    (tmp_path / "x.gguf").write_bytes(b"hello")
    assert main(["export", "--direction", str(tmp_path / "x.gguf"), "--out", str(tmp_path / "out")]) == 1
    assert "x.gguf cannot be read as GGUF" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_hostile_source_and_odd_tensors_are_one_sentence(model: ChatModel, direction: Direction):
    class Nothing:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (None, 0, (1,), (1,), False, {})

    vector = to_gguf(model, direction)
    source = vector.index(b"{", vector.index(b"refusal_direction.source"))
    (length,), deep = struct.unpack("<Q", vector[source - 8 : source]), 100_000 // ALIGNMENT * ALIGNMENT
    length, deep = int(length), deep + int(length) % ALIGNMENT
    hostile = vector[: source - 8] + struct.pack("<Q", deep) + b"[" * deep + vector[source + length :]
    with pytest.raises(DirectionError, match=r"in a way unknown here"):
        from_gguf(hostile)
    for content in (Nothing(), torch.full((model.d_model,), torch.nan).to(torch.float8_e4m3fn)):
        with pytest.raises(DirectionError) as refused:
            read_direction(model, {"direction.pt": saved(content), METADATA: place(3)})
        assert "\n" not in str(refused.value)
    narrow = torch.ones(model.d_model).to(torch.float8_e4m3fn)
    assert read_direction(model, {"direction.pt": saved(narrow), METADATA: place(3)}).source.layer == 3


def test_the_folder_that_a_search_was_saved_in_is_a_direction(model: ChatModel, found, tmp_path):
    save_found(found, tmp_path)
    assert load_direction(model, tmp_path).digest == found.direction.digest

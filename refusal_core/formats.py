"""Directions in the files of other tools: GGUF control vectors, and runs of the paper's own code.

    direction.N = ‖r‖ r̂ at N = layer − 1, 0 at every other N     what llama.cpp adds to the output of block N ≥ 1,
                                                                which is `resid_pre` of block N + 1
    direction.pt = r,   mean_diffs.pt = r[pos, layer],   direction_metadata.json = {pos, layer}
    direction_evaluations.json = [{position, layer, refusal_score, steering_score, kl_div_score}, …], of every candidate
                                                                layers count a block's input there, as they do here

A file may come from anybody. Of a pickle only tensors are read (`weights_only`), out of an archive that cannot unpack
to more than its size; of GGUF no count is believed before the bytes are there. Neither format says from which weights
a direction was read: `Source.origin` then names the format, and only width and layer are held against the model.
"""

import io
import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refusal_core.chat_model import ChatModel
from refusal_core.directions import Direction, DirectionError, Source, read_source
from refusal_core.interventions import Intervention

GGUF, PAPER = "a GGUF control vector", "a run of the paper's code"
"""The values of `Source.origin`."""

SOURCE_KEY = "refusal_direction.source"
SAVED = "direction.safetensors"
METADATA = "direction_metadata.json"
EVALUATIONS = "direction_evaluations.json"
TENSORS = ("direction.pt", "mean_diffs.pt", "generate_directions/mean_diffs.pt")
MOST_BYTES = 256 * 2**20
ALIGNMENT = 32
UINT32, STRING, ARRAY, FLOAT32 = 4, 8, 9, 0
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's types of values as `struct` calls them."""


def load_direction(model: ChatModel, path: str | Path) -> Direction:
    """The direction of `model` in a file of a known format, or in the folder of a saved search or a run of the paper's code.

    Raises DirectionError and ModelError as `read_direction` does, and where there is no such file or it is too large.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    wanted = [path]
    if path.is_dir():
        wanted = [folder / name for name in (SAVED, *TENSORS) if (folder / name).is_file()][:1]
        if not wanted:
            raise DirectionError(
                f"The folder {str(path)!r} has none of {SAVED}, {', '.join(TENSORS)}: name the folder of a search or of a run."
            )
    if wanted[0].suffix == ".pt":
        wanted.append(folder / METADATA)
        wanted += [
            file for file in (folder / EVALUATIONS, folder / "select_direction" / EVALUATIONS) if file.is_file()
        ][:1]
    for file in wanted:
        if not file.is_file():
            raise DirectionError(f"There is no file {str(file)!r}.")
        if file.stat().st_size > MOST_BYTES:
            raise DirectionError(f"{file.name} has more than {MOST_BYTES:,} bytes, as no saved direction has.")
    return read_direction(model, {file.name: file.read_bytes() for file in wanted})


def read_direction(model: ChatModel, files: Mapping[str, bytes]) -> Direction:
    """The direction of `model` in one file, by its name's ending, or in a tensor of the paper's code with its metadata.

    Beside these there may be the scores of the same run, which `Source.origin` then gives. Raises DirectionError, in one sentence, for anything that is no direction, ModelError for one of another model.
    """
    scores = {name: data for name, data in files.items() if Path(name).name == EVALUATIONS}
    endings = {Path(name).suffix.lower(): name for name in files if name not in scores}
    if set(endings) == {".pt", ".json"} and len(files) == 2 + len(scores):
        direction = _from_run(model, endings[".pt"], files[endings[".pt"]], files[endings[".json"]])
        for data in scores.values():
            source = direction.source
            told = f"{PAPER}, where it has {_scores_in_run(data, source.position, source.layer)}"
            direction = replace(direction, source=replace(source, origin=told))
    elif len(files) != 1 or {".pt", ".json"} & set(endings):
        raise DirectionError(
            f"A direction is one .safetensors or .gguf file, or direction.pt or mean_diffs.pt together with {METADATA}: "
            "choose these."
        )
    else:
        ((name, data),) = files.items()
        direction = from_gguf(data, name) if ".gguf" in endings else Direction.from_bytes(data, name)
    model.check_rows([Intervention(direction, "ablate")], 1)
    return direction


# -- GGUF ------------------------------------------------------------------------------------------------------------


def to_gguf(model: ChatModel, direction: Direction) -> bytes:
    """`direction` as a control vector for llama.cpp, which at scale 1 is the addition of strength 1.

    Raises DirectionError for the first two layers, whose inputs llama.cpp never adds to.
    """
    source = direction.source
    if source.layer < 2:
        raise DirectionError(
            f"A control vector acts on the output of a block, and never of the first: layer {source.layer} cannot be "
            "expressed. Save it as safetensors."
        )
    vectors = torch.zeros(model.n_layers - 1, len(direction.unit))
    vectors[source.layer - 2] = direction.norm * direction.unit
    values = [
        _text("general.architecture") + struct.pack("<I", STRING) + _text("controlvector"),
        _text("controlvector.model_hint") + struct.pack("<I", STRING) + _text(model.family),
        _text("controlvector.layer_count") + struct.pack("<II", UINT32, len(vectors)),
        _text(SOURCE_KEY) + struct.pack("<I", STRING) + _text(source.as_json()),
    ]
    size = _aligned(4 * vectors.shape[1])
    tensors = [
        _text(f"direction.{n + 1}") + struct.pack("<IQIQ", 1, vectors.shape[1], FLOAT32, n * size)
        for n in range(len(vectors))
    ]
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(values)) + b"".join((*values, *tensors))
    body = [vector.numpy().astype("<f4").tobytes().ljust(size, b"\0") for vector in vectors]
    return head.ljust(_aligned(len(head)), b"\0") + b"".join(body)


def from_gguf(data: bytes, name: str = "The file") -> Direction:
    """The direction in a control vector that has one, at one layer; raises DirectionError, about `name`, otherwise.

    Written by `to_gguf` it has its source again; by another tool it has its layer, and position −1.
    """
    try:
        values, tensors = _parsed(data)
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise DirectionError(f"{name} cannot be read as GGUF ({error}).") from error
    if values.get("general.architecture") != "controlvector":
        raise DirectionError(f"{name} is a GGUF file, but no control vector.")
    layers = {}
    for key, vector in tensors.items():
        number = re.fullmatch(r"direction\.([1-9]\d{0,3})", key)
        if number is None or vector is None or not vector.isfinite().all():
            raise DirectionError(f"{name} has a tensor {key[:40]!r} that is no direction of a layer in float32.")
        if vector.any():
            layers[int(number[1]) + 1] = vector
    if len(layers) != 1:
        raise DirectionError(
            f"{name} has directions at {len(layers)} layers, and a direction here is of one: save one of them alone."
        )
    ((layer, r),) = layers.items()
    source = Source(layer=layer, origin=GGUF)
    if SOURCE_KEY in values:
        try:
            source = read_source(str(values[SOURCE_KEY]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DirectionError(
                f"{name} says where its direction was read in a way unknown here ({error})."
            ) from error
        if source.layer != layer:
            raise DirectionError(f"{name} says layer {source.layer} and has its direction at layer {layer}.")
    return Direction.from_difference(r, source)


class _Bytes:
    """Bytes that are read in order; more than there are is a ValueError."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def take(self, n: int) -> bytes:
        if n > len(self._data) - self.at:
            raise ValueError("it ends too early")
        self.at += n
        return self._data[self.at - n : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """A value of GGUF's type `kind`; an array is passed over."""
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"type {kind} is unknown")
        of, n = self.number("I"), self.number("Q")
        if of in SCALARS:
            self.take(n * struct.calcsize(f"<{SCALARS[of]}"))
        elif of == STRING:
            for _ in range(n):
                self.text()
        else:
            raise ValueError(f"an array of type {of} is unknown")
        return None


def _parsed(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    """The values and the tensors of a GGUF file; None for a tensor that is not one row of float32."""
    file = _Bytes(data)
    if file.take(4) != b"GGUF" or file.number("I") not in (2, 3):
        raise ValueError("it is not GGUF of version 2 or 3")
    n_tensors, n_values = file.number("Q"), file.number("Q")
    values: dict[str, Any] = {}
    for _ in range(n_values):
        key = file.text()
        values[key] = file.value(file.number("I"))
    places = {}
    for _ in range(n_tensors):
        key, n_dims = file.text(), file.number("I")
        if n_dims > 4:
            raise ValueError("a tensor has more than 4 axes")
        shape = [file.number("Q") for _ in range(n_dims)]
        places[key] = shape, file.number("I"), file.number("Q")
    alignment = values.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**16:
        raise ValueError("its alignment is out of range")
    start = -(-file.at // alignment) * alignment
    tensors: dict[str, Tensor | None] = {}
    for key, (shape, kind, offset) in places.items():
        tensors[key] = None
        if len(shape) == 1 and kind == FLOAT32 and shape[0] > 0:
            at = start + offset
            if at + 4 * shape[0] > len(data):
                raise ValueError("it ends too early")
            tensors[key] = torch.frombuffer(bytearray(data[at : at + 4 * shape[0]]), dtype=torch.float32)
    return values, tensors


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


# -- the paper's code ------------------------------------------------------------------------------------------------


def _from_run(model: ChatModel, name: str, data: bytes, metadata: bytes) -> Direction:
    try:
        written = json.loads(metadata)
        position, layer = written["pos"], written["layer"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DirectionError(f"{METADATA} does not give a pos and a layer: take the one of the same run.") from error
    if type(position) is not int or type(layer) is not int or not (-64 <= position <= -1 and 0 <= layer < 10_000):
        raise DirectionError(f"{METADATA} gives a pos and a layer that are not whole numbers below and from 0.")
    r = _tensor(name, data)
    if r.ndim == 3 and -position <= r.shape[0] and r.shape[1] == model.n_layers > layer:
        r = r[position, layer]
    if r.ndim != 1 or not r.isfinite().all():
        raise DirectionError(
            f"{name} is a tensor of shape {tuple(r.shape)}, and not one vector, or one at each of {-position} or more "
            f"positions and {model.n_layers} layers of {model.name}."
        )
    return Direction.from_difference(r, Source(layer=layer, position=position, origin=PAPER))


def _scores_in_run(data: bytes, position: int, layer: int) -> str:
    """The scores that the paper's code gave this candidate, in words; raises DirectionError where it gave it none."""
    try:
        rows = [row for row in json.loads(data) if (row["position"], row["layer"]) == (position, layer)]
        bypass, induce, kl = (float(rows[0][name]) for name in ("refusal_score", "steering_score", "kl_div_score"))
        if not all(map(math.isfinite, (bypass, induce, kl))):
            raise ValueError("a score is not a number")
    except IndexError as error:
        raise DirectionError(
            f"{EVALUATIONS} has no candidate at position {position}, layer {layer}: take the files of one run."
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError, ArithmeticError) as error:
        raise DirectionError(
            f"{EVALUATIONS} is no list of candidates with their scores: leave it out, or take that of the same run."
        ) from error
    return f"bypass {bypass:+.2f}, induce {induce:+.2f}, KL {kl:.3f}"


def _tensor(name: str, data: bytes) -> Tensor:
    """The tensor in a file of `torch.save`; raises DirectionError for anything else, and nothing in it is run."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > len(data):
            raise ValueError("it unpacks to more than its size")
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        ArithmeticError,
    ) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise DirectionError(
            f"{name} is not a tensor as torch.save writes it ({reason[0][:120].rstrip('.')})."
        ) from error
    if type(found) is not Tensor or not found.is_floating_point() or found.layout != torch.strided or found.is_meta:
        raise DirectionError(f"{name} does not hold one tensor of real numbers.")
    return found.double()

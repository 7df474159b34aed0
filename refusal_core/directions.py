"""The refusal direction: the difference of mean activations on harmful and harmless instructions.

    r[p, l] = mean over harmful of x[p, l] − mean over harmless of x[p, l]        (Arditi et al. 2024, §2.3)

with x[p, l] the residual stream at the input of block l (`resid_pre`), at template position p counted
from the end (−1 is the last token before the reply). A `Direction` keeps r̂ = r / ‖r‖ and ‖r‖ apart, both
computed once: ablation uses r̂, addition ‖r‖·r̂, and nobody normalises again.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

FORMAT = "refusal direction, version 1"
ZERO_NORM = 1e-6
"""‖r‖ below this is rounding noise: at layer 0 the template's tokens are the same in every prompt."""


class DirectionError(ValueError):
    """A direction that cannot be made, read or used; the message says why and what to do."""


@dataclass(frozen=True)
class Source:
    """Where a direction was read: the model, the layer and position, the prompts.

    `layer` counts `resid_pre` (the *input* of that block; tools that count block outputs call it layer − 1).
    `fingerprint` names the weights themselves, so that a moved folder is still the same model. `origin` names the
    format of another tool's file that the direction comes from, in which nothing says which weights it was read from.
    `contrast` names the two classes, the first minus the second, of a direction that is not about refusal; `control` what
    is no direction at all; `projected` the activations whose mean was taken out of it;
    `chosen_by` what chose it among its candidates where the paper's rule did not, and why.
    """

    model: str = ""
    revision: str | None = None
    fingerprint: str = ""
    layer: int = 0
    position: int = -1
    prompts: str = ""
    n_harmful: int = 0
    n_harmless: int = 0
    control: str = ""
    origin: str = ""
    contrast: str = ""
    projected: str = ""
    chosen_by: str = ""

    def as_json(self) -> str:
        """What `read_source` reads."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction r of the residual stream: r̂ (float32, unit length), ‖r‖, and where it comes from."""

    unit: Float[Tensor, " d_model"]
    norm: float
    source: Source

    def __post_init__(self) -> None:
        # Whatever r̂ was computed in and on: each reader would have to convert it, and one forgets.
        object.__setattr__(self, "unit", self.unit.detach().float().cpu())

    @classmethod
    def from_difference(cls, r: Float[Tensor, " d_model"], source: Source) -> "Direction":
        """The direction of a raw difference of means `r`; raises DirectionError where r is numerically zero or no number."""
        norm = r.double().norm().item()
        if not math.isfinite(norm):
            raise DirectionError(
                f"The numbers at layer {source.layer}, position {source.position} are not finite, so there is no direction: "
                "load the model in float32 and find it anew."
            )
        if not norm >= ZERO_NORM:
            raise DirectionError(
                f"There is no direction at layer {source.layer}, position {source.position}: the prompts of both "
                f"classes have the same mean there (‖r‖ = {norm:.1e}). Take a later layer."
            )
        return cls((r.double() / norm).float().cpu(), norm, source)

    @property
    def digest(self) -> str:
        """Names the vector itself: two directions of one layer and position need not be the same."""
        return hashlib.sha256(self.unit.numpy().tobytes() + repr(self.norm).encode()).hexdigest()[:12]

    def save(self, path: str | Path) -> None:
        """Writes `to_bytes` to `path`."""
        Path(path).write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """r̂, ‖r‖ and the source as a safetensors file, the source as its metadata."""
        # clone: a view would carry every other candidate along in its storage.
        tensors = {"unit": self.unit.clone(), "norm": torch.tensor(self.norm, dtype=torch.float64)}
        return safetensors.torch.save(tensors, metadata={"format": FORMAT, "source": self.source.as_json()})

    @classmethod
    def load(cls, path: str | Path) -> "Direction":
        """The direction saved at `path`; raises DirectionError if the file is missing, broken or something else."""
        if not Path(path).is_file():
            raise DirectionError(f"There is no file {str(path)!r}.")
        return cls.from_bytes(Path(path).read_bytes(), Path(path).name)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "The file") -> "Direction":
        """The direction in what `to_bytes` gave; raises DirectionError, about `name`, for anything else."""
        try:
            tensors = safetensors.torch.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            metadata = header.get("__metadata__", {})
            if metadata.get("format") != FORMAT or set(tensors) != {"unit", "norm"}:
                raise DirectionError(f"{name} is a safetensors file, but not one with a saved direction.")
            if not all(tensor.is_floating_point() for tensor in tensors.values()):
                raise TypeError("its numbers are no real ones")
            unit, norm = tensors["unit"], tensors["norm"].item()
            source = read_source(metadata["source"])
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            if isinstance(error, DirectionError):
                raise
            raise DirectionError(f"{name} cannot be read as a saved direction ({error}).") from error
        if unit.ndim != 1 or not abs(unit.float().norm().item() - 1) < 1e-3 or not ZERO_NORM <= norm < math.inf:
            raise DirectionError(f"{name} does not hold a unit vector and its positive norm.")
        return cls(unit.float(), norm, source)


def read_source(text: str) -> Source:
    """The source in what `Source.as_json` gave; raises ValueError, TypeError and AttributeError for anything else."""
    written = json.loads(text)
    if not isinstance(written, dict):
        raise TypeError("its source is no list of names and values")
    return Source(**{f.name: _typed(written[f.name], f.default) for f in fields(Source) if f.name in written})


def _typed(value: object, default: object) -> Any:
    """A value of a source as it is, if it has the type that belongs there; raises TypeError otherwise."""
    wanted = (str, type(None)) if default is None else type(default)
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise TypeError(f"{value!r} in its source")
    return value


def random_like(direction: Direction, seed: int) -> Direction:
    """A random direction with the norm, layer and position of `direction`: the control every claim needs."""
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(direction.unit.shape, generator=generator)
    source = replace(direction.source, control=f"random, seed {seed}")
    return Direction(r / r.norm(), direction.norm, source)


def project(direction: Direction, mean: Float[Tensor, " d_model"], of: str) -> Direction:
    """r − (r·μ̂) μ̂: what tells the classes apart beyond μ, the `mean` harmless activation where r was read.

    The idea is Jim Lai's ("Projected Abliteration", huggingface.co/blog/grimjim, 2025); `of` says whose mean it is. Raises
    DirectionError if the mean has another width or is zero, or if nothing is left.
    """
    if mean.shape != direction.unit.shape or not mean.norm() >= ZERO_NORM:
        raise DirectionError(
            f"A direction of {len(direction.unit)} numbers is projected with a mean activation of as many, which is not "
            "zero: take that of the harmless prompts at the layer and position it was read at."
        )
    mu = mean.double() / mean.double().norm()
    r = direction.norm * direction.unit.double()
    return Direction.from_difference(r - (r @ mu) * mu, replace(direction.source, projected=of))


def difference_in_means(
    harmful: Float[Tensor, "harmful pos layer d_model"], harmless: Float[Tensor, "harmless pos layer d_model"]
) -> Float[Tensor, "pos layer d_model"]:
    """r[p, l], raw and in float64; raises DirectionError if either class is empty.

    The published code silently takes the other class's mean as "the direction" when a class empties.
    """
    for name, activations in (("harmful", harmful), ("harmless", harmless)):
        if not len(activations):
            raise DirectionError(f"No {name} prompt is left, so there is no difference of means. Add {name} prompts.")
    return harmful.double().mean(0) - harmless.double().mean(0)

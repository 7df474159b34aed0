"""The refusal direction: the difference of mean activations on harmful and harmless instructions.

    r[p, l] = mean over harmful of x[p, l] − mean over harmless of x[p, l]        (Arditi et al. 2024, §2.3)

with x[p, l] the residual stream at the input of block l (`resid_pre`), at template position p counted
from the end (−1 is the last token before the reply). A `Direction` keeps r̂ = r / ‖r‖ and ‖r‖ apart, both
computed once: ablation uses r̂, addition ‖r‖·r̂, and nobody normalises again.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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
    `fingerprint` names the weights themselves, so that a moved folder is still the same model.
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


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction r of the residual stream: r̂ (float32, unit length), ‖r‖, and where it comes from."""

    unit: Float[Tensor, " d_model"]
    norm: float
    source: Source

    @classmethod
    def from_difference(cls, r: Float[Tensor, " d_model"], source: Source) -> "Direction":
        """The direction of a raw difference of means `r`; raises DirectionError where r is numerically zero."""
        norm = r.double().norm().item()
        if not norm >= ZERO_NORM:
            raise DirectionError(
                f"There is no direction at layer {source.layer}, position {source.position}: harmful and harmless "
                f"prompts have the same mean there (‖r‖ = {norm:.1e}). Take a later layer."
            )
        return cls((r.double() / norm).float().cpu(), norm, source)

    def save(self, path: str | Path) -> None:
        """Writes r̂, ‖r‖ and the source to `path` as safetensors, with the source as metadata."""
        # clone: a view would carry every other candidate along in its storage.
        tensors = {"unit": self.unit.clone(), "norm": torch.tensor(self.norm, dtype=torch.float64)}
        save_file(tensors, str(path), metadata={"format": FORMAT, "source": json.dumps(asdict(self.source))})

    @classmethod
    def load(cls, path: str | Path) -> "Direction":
        """The direction saved at `path`; raises DirectionError if the file is missing, broken or something else."""
        if not Path(path).is_file():
            raise DirectionError(f"There is no file {str(path)!r}.")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT or set(file.keys()) != {"unit", "norm"}:
                    raise DirectionError(
                        f"{Path(path).name} is a safetensors file, but not one with a saved direction."
                    )
                unit, norm = file.get_tensor("unit"), file.get_tensor("norm").item()
            known = {f.name for f in fields(Source)}
            source = Source(**{k: v for k, v in json.loads(metadata["source"]).items() if k in known})
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise DirectionError(f"{Path(path).name} cannot be read as a saved direction ({error}).") from error
        if unit.ndim != 1 or not abs(unit.float().norm().item() - 1) < 1e-3 or not norm >= ZERO_NORM:
            raise DirectionError(f"{Path(path).name} does not hold a unit vector and its positive norm.")
        return cls(unit.float(), norm, source)


def random_like(direction: Direction, seed: int) -> Direction:
    """A random direction with the norm, layer and position of `direction`: the control every claim needs."""
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(direction.unit.shape, generator=generator)
    source = replace(direction.source, control=f"random, seed {seed}")
    return Direction(r / r.norm(), direction.norm, source)


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

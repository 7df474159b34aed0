"""Products of a few rows with large matrices on a CPU, which is what saying one more token in a few panes is.

A matrix that does not fit into the cache is read from memory once a product, and that is what the product costs. As
`torch.nn.functional.linear` has it (x Wᵀ), the library reads the matrix once for each of two to four rows, and for one
row with one thread; the same product from the other side (W xᵀ) reads it once, with all threads. `benchmarks/RESULTS.md`
says what that makes of a reply: three panes cost about what one costs elsewhere.
"""

import functools
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

FEW = 4
"""The most rows for which it is faster."""

LARGE = 2**26
"""Bytes of matrices in a model above which no cache holds them all."""

SMALL = 2**16
"""Numbers in a matrix below which a product takes longer to begin than to do."""


def multiply_from_the_other_side(model: torch.nn.Module) -> bool:
    """Lets the linear layers of a large float32 model on a CPU do so for a few rows; says whether it is one."""
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear and "forward" not in vars(m)]
    layers = [m for m in layers if m.weight.device.type == "cpu" and m.weight.dtype == torch.float32]
    if sum(m.weight.numel() * 4 for m in layers) < LARGE:
        return False
    for layer in layers:
        if layer.weight.numel() >= SMALL:
            layer.forward = functools.partial(product, layer)
    return True


def product(layer: torch.nn.Linear, input: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row d_out"]:
    """What `layer` makes of `input`, up to the order in which it is summed."""
    weight, bias = layer.weight, cast(Tensor | None, layer.bias)
    rows = input.reshape(-1, input.shape[-1])
    n = len(rows)
    if not 0 < n <= FEW or input.dtype != weight.dtype:
        return linear(input, weight, bias)
    if n == 1:  # a product with a single row is another one, which has one thread; a row twice is read as any others
        rows = rows.repeat(2, 1)
    y = (weight @ rows.t()).t()[:n].contiguous()
    return (y if bias is None else y + bias).reshape(*input.shape[:-1], -1)

"""A few rows times a large matrix: the same numbers as elsewhere, and only where it is faster."""

import copy

import pytest
import torch
from conftest import HARMFUL, HARMLESS
from torch.testing import assert_close

from refusal_core import products
from refusal_core.chat_model import ORGANISM, ChatModel
from refusal_core.directions import Direction
from refusal_core.generation import stream_side_by_side
from refusal_core.interventions import Intervention


@pytest.fixture
def everywhere(monkeypatch):
    """As if every model were too large for the cache."""
    monkeypatch.setattr(products, "LARGE", 0)
    monkeypatch.setattr(products, "SMALL", 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 1, 7), (3, 7), (1, 4, 7), (5, 7), (2, 3, 7), (0, 7)])
def test_a_product_is_that_of_torch(shape, bias):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(7, 11, bias=bias), torch.randn(shape)
    y, expected = products.product(layer, x), layer(x)
    assert y.shape == expected.shape and y.is_contiguous()
    assert_close(y, expected)


def test_gradients_go_through_it():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(7, 11), torch.randn(3, 7, requires_grad=True)
    (mine,) = torch.autograd.grad(products.product(layer, x).square().sum(), x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert_close(mine, expected)


def test_only_large_models_in_float32_multiply_so():
    def model(dtype: torch.dtype = torch.float32, width: int = 3000) -> torch.nn.Sequential:
        return torch.nn.Sequential(
            torch.nn.Linear(width, width, dtype=dtype), torch.nn.Linear(width, 9, dtype=dtype), torch.nn.ReLU(),
            torch.nn.Linear(2 * width, width, bias=False, dtype=dtype),
        )  # fmt: skip

    large = model()
    assert products.multiply_from_the_other_side(large)
    assert ["forward" in vars(layer) for layer in large] == [True, False, False, True]
    for other in (model(torch.bfloat16), model(width=300), model().to("meta")):
        assert not products.multiply_from_the_other_side(other)
        assert not any("forward" in vars(layer) for layer in other)


def test_a_layer_whose_forward_is_somebody_elses_is_left_alone(everywhere):
    model = torch.nn.Sequential(torch.nn.Linear(7, 7))
    model[0].forward = lambda x: x + 1  # as accelerate does to fetch weights from the disk
    products.multiply_from_the_other_side(model)
    assert_close(model(torch.zeros(1, 7)), torch.ones(1, 7))


def test_a_copy_multiplies_with_weights_of_its_own(everywhere):
    model = torch.nn.Sequential(torch.nn.Linear(7, 7, bias=False))
    assert products.multiply_from_the_other_side(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.zero_()
    assert_close(other(torch.ones(1, 7)), torch.zeros(1, 7))
    assert model(torch.ones(1, 7)).abs().sum() > 0


def test_a_model_says_the_same_either_way(everywhere, model: ChatModel, direction: Direction):
    other = ChatModel.load(ORGANISM, device="cpu")
    layers = [m for m in other._model.modules() if type(m) is torch.nn.Linear]
    assert layers and all(m.forward.func is products.product for m in layers)
    assert not any("forward" in vars(m) for m in model._model.modules() if type(m) is torch.nn.Linear)
    rows = [(), (Intervention(direction, "ablate"),), (Intervention(direction, "add"),)]
    for text in (HARMFUL, HARMLESS):
        said = [list(stream_side_by_side(m, [text] * 3, rows, max_new_tokens=48))[-1].texts for m in (model, other)]
        assert said[0] == said[1]
        assert_close(other.logits([text]), model.logits([text]), atol=1e-3, rtol=1e-4)

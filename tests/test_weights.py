"""What an edit of one tensor promises: nothing is written along the direction, and what is across it stays."""

import torch
from torch.testing import assert_close

from refusal_core.weights import mlp_bias, with_norms_kept, without, writes_along


def test_the_projection_leaves_everything_across_the_direction():
    w, r, across = torch.randn(6, 4), torch.randn(6), torch.randn(6)
    r = r / r.norm()
    across = across - (across @ r) * r
    assert_close(r @ without(w, r, 0), torch.zeros(4), atol=1e-6, rtol=0)
    assert_close(across @ without(w, r, 0), across @ w)
    assert_close(without(w.T, r, -1), without(w, r, 0).T)
    assert without(w.half(), r, 0).dtype == torch.float16


def test_kept_norms_are_those_of_the_vectors_that_are_written_and_the_direction_does_not_come_back():
    w, r = torch.randn(6, 4), torch.randn(6)
    r = r / r.norm()
    w[:, 1] = 3 * r
    kept = with_norms_kept(w, r, 0)
    assert_close(r @ kept, torch.zeros(4), atol=1e-5, rtol=0)
    assert_close(kept[:, [0, 2, 3]].norm(dim=0), w[:, [0, 2, 3]].norm(dim=0))
    assert kept[:, 1].norm() < 1e-5, "a vector along the direction alone has nothing that could be scaled up"
    scaled = kept / without(w, r, 0)
    assert_close(scaled[:, 0], scaled[:1, 0].expand(6), msg="one factor for a whole vector")
    assert_close(with_norms_kept(w.T, r, -1), kept.T)
    assert_close(with_norms_kept(w[:, 0], r, 0), kept[:, 0])
    assert with_norms_kept(w.half(), r, 0).dtype == torch.float16
    assert torch.equal(with_norms_kept(torch.zeros(6, 4), r, 0), torch.zeros(6, 4))


def test_a_matrix_writes_along_its_outputs_however_its_family_keeps_it():
    wide = torch.zeros(8, 6)
    assert writes_along("model.layers.0.mlp.down_proj.weight", wide.T) == -2
    assert writes_along("transformer.h.0.mlp.c_proj.weight", wide, family="gpt2") == -1
    assert writes_along("model.layers.0.mlp.experts.down_proj", wide[None], family="gpt_oss") == -1
    assert writes_along("model.layers.0.mlp.experts.down_proj_bias", wide, family="gpt_oss") == -1
    assert writes_along("model.layers.0.experts.down_proj", wide[None], family="gemma4_text") == -2
    assert writes_along("model.layers.0.mlp.experts.down_proj", wide[None], family="of tomorrow") is None
    assert writes_along("h.0.self_attention.dense.weight", wide.T) == -2
    assert writes_along("transformer.h.0.attn.c_proj.weight", wide.T @ wide) == -2
    assert writes_along("model.layers.0.mlp.down_proj.bias", wide[0]) == 0
    assert writes_along("model.embed_tokens.weight", wide) == -1
    assert writes_along("model.layers.0.mlp.up_proj.weight", wide) is None
    assert writes_along("model.layers.0.per_layer_projection.weight", wide.T) == -2
    assert writes_along("model.embed_tokens_per_layer.weight", wide) is None
    assert writes_along("model.per_layer_model_projection.weight", wide.T) is None
    assert writes_along("vision_tower.layers.0.mlp.fc2.weight", wide) is None


def test_the_bias_of_an_mlp_is_that_of_its_own_block():
    names = [
        f"h.{layer}.{part}.c_proj.{kind}"
        for layer in (1, 11)
        for part in ("attn", "mlp")
        for kind in ("weight", "bias")
    ]
    assert mlp_bias(names, 1) == "h.1.mlp.c_proj.bias" and mlp_bias(names, 11) == "h.11.mlp.c_proj.bias"
    assert mlp_bias(names, 0) is None

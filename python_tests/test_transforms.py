"""Transforms: Hadamard matrices, and models that compute the same after a rotation or a scaling."""

import copy

import pytest
import torch
from conftest import make_sharp_model

from mxq_ext.errors import ModelError, ShapeError
from mxq_ext.structure import find_units
from mxq_ext.transforms import hadamard, random_rotation, rotate_residual


def uneven(model, seed=0):
    """Gains that differ, so that a gain left behind or folded twice shows."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(torch.exp(0.7 * torch.randn(p.shape, generator=g)))
    return model


@pytest.mark.parametrize("n", [1, 2, 12, 20, 36, 64, 96, 576, 1536])
def test_hadamard_is_orthogonal_and_flat(n):
    h = hadamard(n)
    assert torch.allclose(h @ h.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert float((h.abs() - n**-0.5).abs().max()) < 1e-12


@pytest.mark.parametrize("n", [3, 6, 18, 92 * 3])
def test_hadamard_of_other_orders_is_refused(n):
    with pytest.raises(ShapeError, match=f"order {n}.*orthogonal"):
        hadamard(n)


def test_random_rotation():
    for kind, n in (("hadamard", 24), ("orthogonal", 23)):
        r = random_rotation(n, 3, kind)
        assert torch.allclose(r @ r.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
        assert torch.equal(r, random_rotation(n, 3, kind)) and not torch.equal(r, random_rotation(n, 4, kind))
    with pytest.raises(ShapeError, match="hadamard and orthogonal"):
        random_rotation(4, 0, "givens")


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_rotated_model_computes_the_same(heads, kind):
    model = uneven(make_sharp_model())
    tokens = torch.randint(0, 257, (2, 40))
    before, weights = model(tokens).logits, copy.deepcopy(model.state_dict())
    rotate_residual(model, 5, kind=kind, heads=heads)
    after = model(tokens).logits
    print(f"largest logit {before.abs().max():.3g}, largest difference {(after - before).abs().max():.3g}")
    assert torch.allclose(after, before, rtol=1e-3, atol=2e-4 * float(before.abs().max()))
    for name, p in model.named_parameters():
        if name.endswith("proj.weight") and not (heads is False and "v_proj" in name):
            assert not torch.allclose(p, weights[name], atol=1e-3), f"{name} has not been rotated"
    assert all(bool((p == 1).all()) for n, p in model.named_parameters() if "norm" in n)


def test_rotation_unties_the_head_and_spreads_an_outlying_channel():
    model = uneven(make_sharp_model())
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] *= 50
    share = lambda w: float(w.square().sum(0).max() / w.square().sum())  # noqa: E731
    before = share(model.model.embed_tokens.weight)
    assert [u.name for u in find_units(model) if u.layer < 0] == ["model.embed_tokens"]
    rotate_residual(model)
    assert [u.name for u in find_units(model) if u.layer < 0] == ["model.embed_tokens", "lm_head"]
    assert not model.config.tie_word_embeddings
    after = share(model.model.embed_tokens.weight)
    print(f"share of the strongest channel {before:.3f} -> {after:.4f}")
    assert before > 0.9 and after < 2 / 64


def test_rotation_refuses_other_models():
    model = make_sharp_model()
    model.config.model_type = "opt"
    with pytest.raises(ModelError, match="opt.*only llama"):
        rotate_residual(model)
    model = make_sharp_model()
    model.model.layers[1].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(ModelError, match="layers.1.mlp.up_proj is Identity"):
        rotate_residual(model)

"""Attention against torch.nn.MultiheadAttention."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from detr_d2.errors import UserError
from detr_d2.modeling import attention as attention_module
from detr_d2.modeling.attention import (
    MultiHeadAttention,
    PlainAttention,
    SelfAttention,
    allowed_tokens,
    attention_in_parts,
    scaled_dot_product,
)
from detr_d2.structures import Memory, QueryPosition

C, HEADS = 16, 4


def torch_attention(attention: MultiHeadAttention) -> nn.MultiheadAttention:
    """PyTorch's module with the same weights."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    dim = attention.q_proj.in_features
    theirs = nn.MultiheadAttention(dim, attention.num_heads, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([p.weight for p in projections]),
            "in_proj_bias": torch.cat([p.bias for p in projections]),
            "out_proj.weight": attention.out_proj.weight,
            "out_proj.bias": attention.out_proj.bias,
        }
    )
    return theirs


def random_biases(module: nn.Module) -> nn.Module:
    """Biases start at zero, which would hide a bias that is not used."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return module


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return random_biases(MultiHeadAttention(C, HEADS))


@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_pytorch(attention, masked):
    query, key, value = torch.randn(2, 5, C), torch.randn(2, 7, C), torch.randn(2, 7, C)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    if masked:
        padding[0, 4:] = padding[1, 6:] = True
    ours = attention.attend(query, key, value, ~padding[:, None, None, :])
    theirs, _ = torch_attention(attention)(query, key, value, key_padding_mask=padding)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_self_attention_adds_positions_to_queries_and_keys_only():
    torch.manual_seed(0)
    attention = random_biases(SelfAttention(C, HEADS))
    content, position = torch.randn(2, 5, C), torch.randn(2, 5, C)
    located = content + position
    expected, _ = torch_attention(attention)(located, located, content)
    torch.testing.assert_close(attention(content, position), expected, rtol=1e-5, atol=1e-6)
    expected, _ = torch_attention(attention)(content, content, content)
    torch.testing.assert_close(attention(content, None), expected, rtol=1e-5, atol=1e-6)


def test_cross_attention_adds_positions_to_queries_and_keys_only():
    torch.manual_seed(0)
    attention = random_biases(PlainAttention(C, HEADS))
    content, position = torch.randn(2, 3, C), torch.randn(2, 3, C)
    padding = torch.tensor([[False] * 4 + [True] * 2, [False] * 6])
    memory = Memory(
        tokens=torch.randn(2, 6, C),
        positions=torch.randn(2, 6, C),
        padding=padding,
        level_shapes=((2, 3),),
        valid_ratios=torch.ones(2, 1, 2),
    )
    expected, _ = torch_attention(attention)(
        content + position,
        memory.tokens + memory.positions,
        memory.tokens,
        key_padding_mask=padding,
    )
    actual = attention(content, QueryPosition(position), memory)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_gradients_in_double_precision():
    torch.manual_seed(0)
    attention = MultiHeadAttention(4, 2).double()
    query = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    key = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    value = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    allowed = torch.tensor([True, True, False, True])[None, None, None]
    assert gradcheck(lambda q, k, v: attention.attend(q, k, v, allowed), (query, key, value))


def test_bfloat16_on_the_cpu_with_and_without_gradients(attention):
    """With gradients on CPUs and without dropout the attention itself is in single precision."""
    x = torch.randn(2, 5, C)
    exact = attention.attend(x, x, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with_gradient = attention.attend(x, x, x)
        with torch.no_grad():
            without = attention.attend(x, x, x)
    assert with_gradient.dtype == without.dtype == torch.bfloat16
    torch.testing.assert_close(with_gradient.float(), exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(without.float(), exact, rtol=0.05, atol=0.05)


def test_dropout_in_training_only(attention):
    attention.dropout = 0.9
    x = torch.randn(2, 5, C)
    expected, _ = torch_attention(attention)(x, x, x)
    torch.testing.assert_close(attention.eval().attend(x, x, x), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(attention.train().attend(x, x, x), expected, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dropout_falls_on_the_attention_matrix(dtype, monkeypatch):
    """Against PyTorch's without it: with the identity as values, attention returns its matrix."""
    torch.manual_seed(0)
    query, key = (torch.randn(2, HEADS, 5, 4, dtype=dtype, requires_grad=True) for _ in range(2))
    allowed = (torch.arange(5) < 4)[None, None, None]
    value = torch.eye(5, dtype=dtype).expand(2, HEADS, 5, 5)
    factors = (torch.rand(2, HEADS, 5, 5) > 0.3).to(dtype) / 0.7
    plain = nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=allowed
    )
    expected = plain * factors.double()
    monkeypatch.setattr(attention_module, "drop_out", lambda x, p: x * factors)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        actual = scaled_dot_product(query, key, value, allowed, 0.3)
    close = {"rtol": 0.03, "atol": 0.01} if dtype == torch.bfloat16 else {}
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, **close)
    weight = torch.randn(2, HEADS, 5, 5, dtype=torch.float64)
    gradients = torch.autograd.grad((actual.double() * weight).sum(), (query, key))
    for gradient, right in zip(
        gradients, torch.autograd.grad((expected * weight).sum(), (query, key)), strict=True
    ):
        close = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(gradient, right, **close)


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_to_one_graph(dtype, dropout, with_gradient):
    """A mask of another type than the query would break it, silently and slowly."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, HEADS, 5, 4, dtype=dtype) for _ in range(3))
    allowed = (torch.arange(5) < 4)[None, None, None]
    compiled = torch.compile(scaled_dot_product, backend="eager", fullgraph=True)
    bfloat16 = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.set_grad_enabled(with_gradient), bfloat16:
        actual = compiled(query.requires_grad_(with_gradient), key, value, allowed, dropout)
    if not dropout:
        expected = nn.functional.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=allowed
        )
        close = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(actual.float(), expected, **close)


def test_initial_values_are_those_of_one_fused_projection():
    """Xavier's bound for (3C, C) is sqrt(6 / 4C), for (C, C) it is sqrt(6 / 2C)."""
    torch.manual_seed(0)
    dim = 64
    attention = MultiHeadAttention(dim, 8)
    for projection, fans in (
        (attention.q_proj, 4 * dim),
        (attention.k_proj, 4 * dim),
        (attention.v_proj, 4 * dim),
        (attention.out_proj, 2 * dim),
    ):
        bound = (6 / fans) ** 0.5
        assert 0.98 * bound < projection.weight.abs().max() <= bound
        assert not projection.bias.any()


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match=r"HIDDEN_DIM \(10\) must be divisible by .*NHEADS \(4\)"):
        MultiHeadAttention(10, 4)


@pytest.mark.parametrize("rows", [1, 7])
def test_attention_in_parts(rows):
    """Against PyTorch's; the last part is smaller."""
    query, key, value = (torch.randn(2, HEADS, n, 4, dtype=torch.float64) for n in (7, 5, 5))
    allowed = torch.rand(2, 1, rows, 5) > 0.4
    allowed[..., 0] = True
    for mask in (None, allowed, allowed[0, 0]):
        expected = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        for queries in (3, 256):
            actual = attention_in_parts(query, key, value, mask, queries)
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("with_mask", [False, True])
@torch.no_grad()
def test_bfloat16_on_cpus_is_computed_in_parts(with_mask, monkeypatch):
    query, key, value = (torch.randn(2, HEADS, n, 4, dtype=torch.bfloat16) for n in (300, 50, 50))
    allowed = (torch.arange(50) < 40)[None, None, None] if with_mask else None
    expected = scaled_dot_product(query.float(), key.float(), value.float(), allowed, 0.0)

    def refused(*args, **kwargs):
        raise AssertionError("PyTorch's kernel is the slower one here")

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", refused)
    actual = scaled_dot_product(query, key, value, allowed, 0.0)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.02, atol=0.02)


def test_a_query_that_may_look_nowhere_is_finite():
    query = torch.randn(1, HEADS, 2, 4)
    nothing = torch.zeros(1, 1, 1, 2, dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = query.to(dtype)
        assert attention_in_parts(x, x, x, nothing).isfinite().all()


def memory_of(padding: torch.Tensor) -> Memory:
    tokens = torch.randn(*padding.shape, C)
    return Memory(tokens, torch.randn_like(tokens), padding, [(1, padding.shape[1])], None)


def test_no_mask_where_nothing_is_padded():
    padding = torch.zeros(2, 5, dtype=torch.bool)
    assert allowed_tokens(memory_of(padding)) is None
    padding[1, 4] = True
    assert torch.equal(allowed_tokens(memory_of(padding)), ~padding[:, None, None])


def test_graphs_keep_the_mask():
    """What was padded when a graph was made says nothing of the images it will be given."""

    def mask(padding):
        return allowed_tokens(memory_of(padding))

    whole, padded = torch.zeros(1, 5, dtype=torch.bool), torch.arange(5)[None] > 3
    for graph in (
        torch.compile(mask, backend="eager", fullgraph=True),
        torch.jit.trace(mask, (whole,), check_trace=False),
    ):
        assert torch.equal(graph(whole), ~whole[:, None, None])
        assert torch.equal(graph(padded), ~padded[:, None, None])

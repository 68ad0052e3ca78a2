# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
The Triton kernels against the PyTorch op in float64, on the GPU if there is one, else in Triton's interpreter.

compute-sanitizer checks them with `compute-sanitizer --tool memcheck python -m pytest tests/test_kernels.py`.
"""

import os

import numpy as np
import pytest
import torch


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

import ttt_kernels
from ttt_kernels import common, publish
from ttt_omni import TTTLinearState, TTTMLPState, ttt_linear, ttt_mlp


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not common.INTERPRET.value, reason="the kernels were imported before TRITON_INTERPRET was set"
)
OPS = {
    "linear": (ttt_linear, TTTLinearState, ttt_kernels.ttt_linear, ttt_kernels.ttt_linear_decode),
    "mlp": (ttt_mlp, TTTMLPState, ttt_kernels.ttt_mlp, ttt_kernels.ttt_mlp_decode),
}
FIELDS = {
    "linear": ("W1", "b1", "k", "u1", "position"),
    "mlp": ("W1", "b1", "W2", "b2", "k", "u1", "x2", "u2", "position"),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that a kernel should write holds NaN before."""

    def poisoned(allocate):
        def allocated(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocated

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def round_to_nearest(monkeypatch):
    """bfloat16 as a GPU rounds it; Triton's interpreter cuts the digits off instead, which doubles the errors."""
    if DEVICE == "cpu":
        cast = interpreter.InterpreterBuilder.cast_impl

        def rounded(self, x, dtype):
            if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
                return cast(self, x, dtype)
            data = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(data, dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)


def inputs(kind, batch_size, length, m=16, heads=1, D=16, dtype=torch.float32, rows=None, pending=True, seed=None):
    """Tokens and parameters, and a state of random models with `pending` rows, as leaves that want gradients."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**32 if seed is None else seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    rows = rows or batch_size
    q, k, v = (normal(batch_size, length, heads, D).to(dtype).transpose(1, 2) for _ in range(3))
    lr = (torch.rand(batch_size, length, heads, generator=generator) / D).to(dtype).transpose(1, 2)
    scale = (1 / torch.arange(1, m + 1)).clamp_min(m**-0.5) + normal(m, scale=0.01)
    parameters = [scale, 1 + normal(heads, D, scale=0.2), normal(heads, D, scale=0.2)]
    position = torch.randint(0, m, (rows,), generator=generator) if pending else torch.zeros(rows, dtype=torch.long)
    seen = (torch.arange(m) < position[:, None])[:, None, :, None]
    key = normal(rows, heads, m, D).to(dtype).float() * seen
    if kind == "linear":
        model = [normal(rows, heads, D, D, scale=0.8 * D**-0.5), normal(rows, heads, 1, D, scale=0.2)]
        others = [normal(rows, heads, m, D, scale=1 / D) * seen]
    else:
        model = [normal(rows, heads, D, 4 * D, scale=0.7 * D**-0.5), normal(rows, heads, 1, 4 * D, scale=0.2),
                 normal(rows, heads, 4 * D, D, scale=0.5 * D**-0.5), normal(rows, heads, 1, D, scale=0.2)]  # fmt: skip
        others = [normal(rows, heads, m, w, scale=s) * seen for w, s in ((4 * D, 0.3 / D), (4 * D, 0.5), (D, 1 / D))]
    tensors = [x.to(DEVICE).detach().requires_grad_() for x in (q, k, v, lr, *parameters, *model, key, *others)]
    return tensors[:7], [*tensors[7:], position.to(DEVICE)]


def run(kind, tokens, state, attention_mask=None, cu_seqlens=None):
    """Output and state of the PyTorch op in float64."""
    op, cls, *_ = OPS[kind]
    tokens = [x.double() for x in tokens]
    state = cls(**{name: x.double() if x.is_floating_point() else x for name, x in zip(FIELDS[kind], state)})
    o, state = op(*tokens, state, attention_mask=attention_mask, cu_seqlens=cu_seqlens, backend="torch")
    return o, [getattr(state, name) for name in FIELDS[kind]]


def assert_near(name, actual, expected, tolerance):
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    if not expected.any():
        error = actual.double().norm()
    assert error < tolerance, f"{name}: relative error {error:.1e}"


def check(kind, tokens, state, attention_mask=None, cu_seqlens=None):
    """Output, final state and all gradients of the kernel are those of the PyTorch op in float64."""
    tolerance = TOLERANCE[tokens[0].dtype]
    o, new = OPS[kind][2](*tokens, *state, attention_mask=attention_mask, cu_seqlens=cu_seqlens)
    expected_o, expected = run(kind, tokens, state, attention_mask, cu_seqlens)
    assert torch.equal(new[-1], expected[-1])
    for number, (x, y) in enumerate(zip((o, *new[:-1]), (expected_o, *expected[:-1]))):
        assert_near(f"result {number}", x, y, tolerance)

    grads = [torch.randn_like(x) for x in (o, *new[:-1])]
    leaves = [*tokens, *state[:-1]]
    actual = torch.autograd.grad((o, *new[:-1]), leaves, grads)
    grads = [g.double() for g in grads]
    results = [(x, g) for x, g in zip((expected_o, *expected[:-1]), grads) if x.requires_grad]
    results, grads = zip(*results)
    reference = torch.autograd.grad(results, leaves, grads, allow_unused=True)
    m, model = tokens[4].shape[0], 2 if kind == "linear" else 4
    seen = (torch.arange(m, device=DEVICE) < state[-1][:, None])[:, None, :, None]
    for number, (x, y) in enumerate(zip(actual, reference)):
        y = torch.zeros_like(x) if y is None else y
        if number >= 7 + model:  # rows not seen are 0 and no input; the PyTorch op adds to them
            y = y * seen
        assert_near(f"gradient {number}", x, y.double(), tolerance)


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("length", [1, 15, 64, 65, 200])
@pytest.mark.parametrize("kind", OPS)
def test_against_the_pytorch_op(kind, length, pending):
    m = 64 if length == 200 else 16
    seed = 0 if length == 1 else None  # one token's gradients of lr and token_scale are numbers that may cancel
    if seed is not None:
        torch.manual_seed(seed)
    check(kind, *inputs(kind, 1, length, m=m, pending=pending, seed=seed))


@pytest.mark.parametrize("dtype, length", [*((torch.bfloat16, t) for t in (1, 15, 64, 65, 200)), (torch.float16, 65)])
@pytest.mark.parametrize("kind", OPS)
def test_half_precision(kind, dtype, length):
    m = 16 if length == 15 else 64
    heads = 2 if length == 1 else 1
    for pending in (False, True) if kind == "linear" else (length != 64,):
        torch.manual_seed(0)
        check(kind, *inputs(kind, 1, length, m=m, heads=heads, D=64, dtype=dtype, pending=pending, seed=0))


@pytest.mark.parametrize("kind", OPS)
def test_half_precision_of_several_rows(kind):
    torch.manual_seed(0)
    tokens, state = inputs(kind, 1, 66, m=64, rows=2, D=64, dtype=torch.bfloat16, seed=0)
    check(kind, tokens, state, cu_seqlens=torch.tensor([0, 15, 66], device=DEVICE))
    mask = torch.ones(2, 20, dtype=torch.long, device=DEVICE)
    mask[0, :5] = 0
    check(kind, *inputs(kind, 2, 20, m=64, D=64, dtype=torch.bfloat16, seed=0), attention_mask=mask)


@pytest.mark.parametrize("kind", OPS)
def test_padding(kind):
    mask = torch.ones(3, 40, dtype=torch.long, device=DEVICE)
    mask[0, :25] = 0
    mask[1, 30:] = 0
    mask[2] = 0
    tokens, state = inputs(kind, 3, 40)
    check(kind, tokens, state, attention_mask=mask)


@pytest.mark.parametrize("kind", OPS)
def test_padding_between_tokens(kind):
    mask = torch.ones(2, 20, dtype=torch.long, device=DEVICE)
    mask[0, 3:9] = 0
    check(kind, *inputs(kind, 2, 20), attention_mask=mask)


@pytest.mark.parametrize("case", ["left", "between", "packed"])
@pytest.mark.parametrize("kind", OPS)
def test_a_broken_row_breaks_no_other(kind, case):
    """A NaN in one row, and in the padding of all: what the other row has is what it has without, gradients too."""
    rows = None if case == "packed" else 2
    tokens, state = inputs(kind, 1 if case == "packed" else 2, 20, rows=2, seed=0)
    broken = [x.detach().clone().requires_grad_() for x in tokens]
    if rows is None:
        masks, is_token = {"cu_seqlens": torch.tensor([0, 6, 20], device=DEVICE)}, None
        first, second = (0, slice(None), slice(2, 3)), (0, slice(None), slice(6, None))
    else:
        mask = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
        mask[1, :3] = False
        if case == "between":
            mask[1, 9:12] = False
        masks, is_token = {"attention_mask": mask}, mask
        first, second = (0, slice(None), slice(2, 3)), (1,)
    results = []
    for some in (tokens, broken):
        with torch.no_grad():
            if some is broken:
                for x in some[:4]:
                    x[first] = torch.nan
                    if is_token is not None:
                        x.transpose(1, 2)[~is_token] = torch.nan
        o, new = OPS[kind][2](*some, *state, **masks)
        if is_token is not None:
            assert not o.transpose(1, 2)[~is_token].any()
        loss = o[second].square().sum() + sum(x[1].square().sum() for x in new[:-1])
        gradients = torch.autograd.grad(loss, some[:4])
        if is_token is not None:
            assert all(not g.transpose(1, 2)[~is_token].any() for g in gradients)
        results.append([o[second], *(x[1] for x in new), *(g[second] for g in gradients)])
    assert all(torch.equal(x, y) for x, y in zip(*results))


@pytest.mark.parametrize("kind", OPS)
@torch.no_grad()
def test_a_broken_token_leaves_the_model_as_it_was(kind):
    """Until its mini-batch is complete, so that it can be taken back."""
    tokens, state = inputs(kind, 2, 4, seed=0)
    state[-1][:] = torch.tensor([3, 14])
    for x in state[-1 - (2 if kind == "linear" else 4) : -1]:
        x[:, :, 3:] = 0
    tokens = [x.detach().clone() for x in tokens]
    for x in tokens[:4]:
        x[0, :, 2] = torch.nan
    _, new = OPS[kind][2](*tokens, *state)
    models = 2 if kind == "linear" else 4
    assert all(torch.equal(x[0], y[0]) for x, y in zip(new[:models], state))
    for x in new[models:-1]:
        assert x[0].isnan().any(-1).nonzero().tolist() == [[0, 5]]
        assert not x[0, :, 7:].any()
    assert all(x[1].isfinite().all() for x in new)


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", OPS)
@torch.no_grad()
def test_any_layout(kind, layout):
    tokens, state = inputs(kind, 2, 5, seed=0)
    mask = torch.ones(2, 5, dtype=torch.long, device=DEVICE)
    mask[0, 0] = mask[1, 3] = 0
    packed = [x.repeat(1, 1, 2, *[1] * (x.ndim - 3))[:1] if x.ndim > 2 else x for x in tokens]
    bounds = torch.tensor([0, 7, 10], device=DEVICE)
    for some, masks in ((tokens, {"attention_mask": mask}), (packed, {"cu_seqlens": bounds})):
        o, new = OPS[kind][2](
            *map(LAYOUTS[layout], (*some, *state)), **{name: LAYOUTS[layout](x) for name, x in masks.items()}
        )
        expected_o, expected = OPS[kind][2](*some, *state, **masks)
        assert all(torch.equal(*pair) for pair in zip((o, *new), (expected_o, *expected)))


@pytest.mark.parametrize("kind", OPS)
def test_packed_sequences(kind):
    bounds = torch.tensor([0, 1, 30, 30, 100], device=DEVICE)
    check(kind, *inputs(kind, 1, 100, rows=4), cu_seqlens=bounds)


@pytest.mark.skipif(DEVICE == "cuda", reason="the order of programs is the GPU's")
@pytest.mark.parametrize("kind", OPS)
def test_programs_in_any_order(kind, monkeypatch):
    tokens, state = inputs(kind, 1, 40, rows=2, seed=0)
    bounds, leaves = torch.tensor([0, 17, 40]), [*tokens, *state[:-1]]

    def everything():
        o, new = OPS[kind][2](*tokens, *state, cu_seqlens=bounds)
        return o, *new, *torch.autograd.grad((o, *new[:-1]), leaves, [torch.ones_like(x) for x in (o, *new[:-1])])

    expected = everything()
    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda *at: place(*(n - 1 - i for n, i in zip(builder.grid_dim, at))))
    assert all(torch.equal(x, y) for x, y in zip(everything(), expected))


@pytest.mark.parametrize("kind", OPS)
def test_more_than_one_group(kind):
    check(kind, *inputs(kind, 1, 270 if kind == "linear" else 130, heads=2 if kind == "linear" else 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPS)
@torch.no_grad()
def test_decode(kind, dtype):
    tokens, state = inputs(kind, 2, 18, dtype=dtype, seed=0)
    expected_o, expected = run(kind, tokens, state)
    state = [x.clone() for x in state]
    outputs = []
    for t in range(18):
        # Before each token, a step of padding.
        padding = [torch.randn_like(x[:, :, :1]) for x in tokens[:4]]
        kept = [x.clone() for x in state]
        mask = torch.zeros(2, 1, dtype=torch.long, device=DEVICE)
        o, state[-1] = OPS[kind][3](*padding, *tokens[4:], *state, attention_mask=mask)
        assert not o.any()
        assert all(torch.equal(x, y) for x, y in zip(state, kept))
        o, state[-1] = OPS[kind][3](*(x[:, :, t : t + 1] for x in tokens[:4]), *tokens[4:], *state)
        outputs.append(o)
    assert_near("output", torch.cat(outputs, dim=2), expected_o, TOLERANCE[dtype])
    assert torch.equal(state[-1], expected[-1])
    for number, (x, y) in enumerate(zip(state[:-1], expected[:-1])):
        assert_near(f"state {number}", x, y, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", OPS)
@torch.no_grad()
def test_decode_with_a_column_of_a_mask(kind):
    tokens, state = inputs(kind, 3, 1, seed=0)
    mask = torch.ones(3, 5, dtype=torch.bool, device=DEVICE)
    mask[2, -1] = False
    expected_o, expected = run(kind, tokens, state, mask[:, -1:])
    state = [x.clone() for x in state]
    o, position = OPS[kind][3](*tokens, *state, attention_mask=mask[:, -1:])
    assert_near("output", o, expected_o, 1e-5)
    assert torch.equal(position, expected[-1])


@pytest.mark.parametrize("kind", OPS)
def test_cut_anywhere(kind):
    tokens, state = inputs(kind, 1, 50)
    whole, final = OPS[kind][2](*tokens, *state)
    outputs = []
    for first, last in ((0, 3), (3, 37), (37, 38), (38, 50)):
        o, state = OPS[kind][2](*(x[:, :, first:last] for x in tokens[:4]), *tokens[4:], *state)
        outputs.append(o)
    assert_near("output", torch.cat(outputs, dim=2), whole.double(), 1e-5)
    for number, (x, y) in enumerate(zip(state, final)):
        assert_near(f"state {number}", x, y.double(), 1e-5)


def test_custom_ops():
    for kind, length in (("linear", 3), ("mlp", 3)):
        tokens, state = inputs(kind, 1, length)
        ops = torch.ops.ttt_kernels
        forward, backward, decode = (getattr(ops, f"{kind}_{name}") for name in ("forward", "backward", "decode"))
        options = (None, None, False) if kind == "linear" else (None, None, False, True)
        torch.library.opcheck(forward, (*tokens, *state, *options))
        tokens, state = [x.detach() for x in tokens], [x.detach() for x in state]
        out = forward(*tokens, *state, *options)
        if kind == "linear":
            args = (*out[:5], *tokens, state[2], state[4], None, None, *out[6:], False)
        else:
            args = (list(out[:9]), *tokens, *state[4:], None, None, *out[10:], False)
        torch.library.opcheck(backward, args)
        tokens[:4] = [x[:, :, :1] for x in tokens[:4]]
        torch.library.opcheck(decode, (*tokens, *state, None))


@pytest.mark.parametrize("kind", OPS)
def test_compiles_without_a_break(kind):
    tokens, state = inputs(kind, 1, 17)
    mask = torch.ones(1, 17, dtype=torch.long, device=DEVICE)
    mask[0, 3] = 0

    def loss(tokens, state, mask):
        o, new = OPS[kind][2](*tokens, *state, attention_mask=mask)
        return o.sum() + new[0].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grad = torch.autograd.grad(compiled(tokens, state, mask), tokens[0])[0]
    assert_near("gradient", grad, torch.autograd.grad(loss(tokens, state, mask), tokens[0])[0].double(), 1e-6)


@pytest.mark.parametrize("change", ["dtype", "head size", "mini-batch", "state", "width"])
def test_what_it_cannot_take(change):
    tokens, state = inputs("linear", 1, 4)
    if change == "dtype":
        tokens[0] = tokens[0].double()
    elif change == "head size":
        tokens[0] = tokens[0][..., :12]
    elif change == "mini-batch":
        tokens[4] = tokens[4][:10]
    elif change == "width":
        state[0] = state[0].repeat(1, 1, 1, 2)
    else:
        state[0] = state[0].double()
    assert ttt_kernels.unsupported(tokens[0], tokens[4], state[0])
    with pytest.raises(ValueError, match="cannot run: "):
        ttt_kernels.ttt_linear(*tokens, *state)


@torch.no_grad()
def test_from_a_kernel_repository(tmp_path):
    kernels = pytest.importorskip("kernels")
    variant = publish.build(tmp_path, backend=DEVICE)
    loaded = kernels.get_local_kernel(tmp_path)
    assert loaded.__name__ != "ttt_kernels" and sorted(loaded.__all__) == sorted(ttt_kernels.__all__)
    tokens, state = inputs("linear", 1, 20)
    for x, y in zip(loaded.ttt_linear(*tokens, *state)[1], ttt_kernels.ttt_linear(*tokens, *state)[1]):
        assert torch.equal(x, y)
    with pytest.raises(FileExistsError, match="another directory"):
        publish.build(tmp_path, backend=variant.name.removeprefix("torch-"))

"""What a decoder layer does between its linears and attention on CUDA, executed: on the CPU thread for thread, and from the PTX (docs/cuda-testing.md).

Held to transformers' own operations on the CPU, which round to the type of the activations after each one.
"""

import functools

import cuda_tools
import numpy as np
import ptxsim
import pytest
import simt
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EPS = 1e-5
SCHEDULES = ({}, {"seed": 2}, {"seed": 3, "workers": 2}, {"seed": 7, "lazy": False})
SOURCE = cuda_tools.ROOT / "csrc" / "cuda" / "layer.cu"
TESTS = cuda_tools.ROOT / "python_tests"


def fibers(**options):
    """Runs a function of the library thread for thread."""
    return lambda name, *args: cuda_tools.library().configure(**options).call(name, *args)


@functools.cache
def module(arch):
    return ptxsim.Module(ptxsim.compile_ptx(SOURCE, arch))


def interpreter(arch):
    """Runs what the function launches from its PTX."""
    def call(name, *args):
        (launch,) = cuda_tools.library().record(name, *args)
        module(arch).launch(launch.kernel, launch.grid, launch.block, launch.args, launch.shared, [a for a in args if isinstance(a, np.ndarray)])
    return call


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def tensor(a, like):
    return torch.from_numpy(a[: like.numel() * like.element_size()]).view(like.dtype).reshape(like.shape)


def check(have, want, exact=False):
    """Equal, but where a sum in another order came to lie on the other side of a rounding."""
    if exact:
        assert torch.equal(have.view(torch.uint8), want.contiguous().view(torch.uint8))
        return
    step = torch.finfo(want.dtype).eps
    torch.testing.assert_close(have, want, rtol=4 * step, atol=2 * step * min(1.0, float(want.float().abs().max())))
    assert want.dtype == torch.float32 or float((have != want).float().mean()) < 0.02


# ------------------------------------------------------------------------------------------------------------------ the steps


def add_norm(run, rows, width, dtype, delta, in_place, seed=0):
    x, d, norm = random(rows, width, dtype=dtype, seed=seed), random(rows, width, dtype=dtype, seed=seed + 1), LlamaRMSNorm(width, EPS)
    norm.weight = torch.nn.Parameter(1 + random(width, seed=seed + 2, scale=0.3).to(dtype))
    xs, ds, ws, ys = map(cuda_tools.raw, (x, d, norm.weight.detach(), torch.full_like(x, float("nan"))))
    ys = xs if in_place else ys
    run("flat_add_norm", xs, ds if delta else None, ws, ys, rows, width, DTYPES[dtype], EPS)
    total = x + d if delta else x
    if not in_place:
        check(tensor(xs, x), total, exact=True)
    check(tensor(ys, x), norm(total).detach())


def turn_and_store(run, batch, heads, kv_heads, dim, dtype, norms, seed=0):
    """The second token of a tail of three, at another position in each sequence; one of the positions is in no table."""
    room, table = 3, 11
    q, k, v = (random(batch, n, dim, dtype=dtype, seed=seed + i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    angles = torch.arange(table)[:, None] * torch.logspace(0, -3, dim // 2)
    cos, sin = (torch.cat([f(angles)] * 2, 1).to(dtype) for f in (torch.cos, torch.sin))
    tails = [torch.full((batch, kv_heads, room, dim), 7.0, dtype=dtype) for _ in range(2)]
    counts, position = np.array([5, 2], np.int32), np.array([(3 * b + 4) % table for b in range(batch)], np.int32)
    of = [LlamaRMSNorm(dim, EPS) for _ in range(2)]
    for i, n in enumerate(of):
        n.weight = torch.nn.Parameter(1 + random(dim, seed=seed + 5 + i, scale=0.3).to(dtype))
    arrays = [*map(cuda_tools.raw, (q, k, v, *tails))]
    tables = [*map(cuda_tools.raw, (cos, sin))] + ([cuda_tools.raw(n.weight.detach()) for n in of] if norms else [None, None])
    call = ("flat_turn_and_store", *arrays, counts, position, *tables, batch, heads, kv_heads, dim, room, table, DTYPES[dtype], EPS)
    run(*call)
    a, b = (n(x).detach() if norms else x for n, x in zip(of, (q, k), strict=True))
    a, b = apply_rotary_pos_emb(a, b, cos[position], sin[position])
    have = [tensor(x, like) for x, like in zip(arrays, (q, k, v, *tails), strict=True)]
    check(have[0], a, exact=not norms)
    check(have[3][:, :, 1], b, exact=not norms)
    check(have[4][:, :, 1], v, exact=True)
    assert torch.equal(have[1], k) and torch.equal(have[2], v) and all((t[:, :, [0, 2]] == 7).all() for t in have[3:])
    for bad in (-1, table):
        fresh = [*map(cuda_tools.raw, (q, k, v, *tails))]
        position[-1] = bad
        run(call[0], *fresh, *call[6:])
        have = [tensor(x, like) for x, like in zip(fresh, (q, k, v, *tails), strict=True)]
        assert have[0][-1].isnan().all() and have[3][-1, :, 1].isnan().all() and torch.equal(have[4][-1, :, 1], v[-1]) and have[0][:-1].isfinite().all()


def silu_gate(run, count, dtype, seed=0):
    g, u = random(count, dtype=dtype, seed=seed, scale=8.0), random(count, dtype=dtype, seed=seed + 1)
    g[:6] = torch.tensor([0.0, 100.0, -100.0, -0.0, -20.0, 1e-4])
    gs, us = map(cuda_tools.raw, (g, u))
    run("flat_silu_gate", gs, us, count, DTYPES[dtype])
    check(tensor(gs, g), torch.nn.functional.silu(g) * u)


# ------------------------------------------------------------------------------------------------------------------ on the fibers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_add_norm(options, dtype):
    """Widths that fill a block, more than one, less, and one that no 16 bytes divide; with and without something to add, into another tensor and in place."""
    for i, width in enumerate((72, 2048, 2304, 4096, 75, 1001)):
        add_norm(fibers(**options), 1 + i % 3, width, dtype, delta=i % 2 == 0, in_place=False, seed=i)
        add_norm(fibers(**options), 2, width, dtype, delta=i % 2 == 1, in_place=True, seed=i)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_turn_and_store(options, dtype):
    for i, (batch, heads, kv_heads, dim) in enumerate(((1, 4, 2, 64), (3, 3, 1, 16), (2, 8, 8, 80), (1, 2, 1, 512), (16, 9, 3, 128))):
        for norms in (False, True):
            turn_and_store(fibers(**options), batch, heads, kv_heads, dim, dtype, norms, seed=i)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_silu_gate(options, dtype):
    for i, count in enumerate((8, 2048, 3 * 2744, 11, 777)):
        silu_gate(fibers(**options), count, dtype, seed=i)


# ------------------------------------------------------------------------------------------------------------------ from the PTX


@pytest.mark.no_cover
@pytest.mark.skipif(simt.missing_tool("nvcc") is not None, reason="nvcc is not in PATH")
@pytest.mark.parametrize("arch", ("sm_75", "sm_80", "sm_90"))
def test_from_the_ptx(arch):
    run = interpreter(arch)
    for dtype in (torch.bfloat16, torch.float16):
        add_norm(run, 2, 72, dtype, delta=True, in_place=False)
        add_norm(run, 1, 75, dtype, delta=False, in_place=True)
        turn_and_store(run, 2, 3, 1, 16, dtype, norms=dtype == torch.float16)
        silu_gate(run, 64, dtype)
        silu_gate(run, 11, dtype)
    add_norm(run, 1, 2056, torch.float32, delta=True, in_place=False)
    silu_gate(run, 16, torch.float32)


# ------------------------------------------------------------------------------------------------------------------ sanitizers


@pytest.mark.parametrize("mode", ("asan", "tsan"))
def test_sanitizers(mode):
    library = cuda_tools.simt.Library([SOURCE, TESTS / "cuda_flat_layer.cpp"], mode)

    def run(name, *args):
        for options in ({}, {"seed": 5, "workers": 2}):
            copies = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
            library.configure(**options).call(name, *copies)
        for a, copy in zip(args, copies, strict=True):
            if isinstance(a, np.ndarray):
                a[...] = copy

    add_norm(run, 2, 2056, torch.float16, delta=True, in_place=False)
    add_norm(run, 2, 75, torch.bfloat16, delta=True, in_place=False)
    turn_and_store(run, 2, 3, 1, 80, torch.float16, norms=True)
    silu_gate(run, 1003, torch.bfloat16)
    silu_gate(run, 2056, torch.float16)

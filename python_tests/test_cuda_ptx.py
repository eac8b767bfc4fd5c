"""The instructions that nvcc emits, executed: what the host code launches is recorded and run by the PTX interpreter (docs/cuda-testing.md)."""

import cuda_tools
import numpy as np
import ptxsim
import pytest
import simt
import torch

from mxq_ext.testing import cases

if reason := simt.missing_tool("nvcc"):
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.no_cover
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture(scope="module")
def modules():
    """source name -> compiled module, made when first asked for."""
    made = {}

    def get(source: str, arch: str) -> ptxsim.Module:
        if (source, arch) not in made:
            made[source, arch] = ptxsim.Module(ptxsim.compile_ptx(cuda_tools.ROOT / "csrc" / "cuda" / f"{source}.cu", arch))
        return made[source, arch]

    return get


def execute(modules, arch, sources, name, *args, memory):
    """Runs the launches of a host function; ``sources``: the file of each."""
    launches = cuda_tools.library().record(name, *args)
    assert len(launches) == len(sources)
    for launch, source in zip(launches, sources, strict=True):
        modules(source, arch).launch(launch.kernel, launch.grid, launch.block, launch.args, launch.shared, memory)


def linear(modules, arch, q, x, bias, sources, path, splits=1):
    """(what the interpreter computes, what the fibers compute) in float32."""
    p = cuda_tools.bench("cpu").pack(q)
    m, n = x.shape[0], q.shape[0]
    out = []
    for run in ("ptx", "fibers"):
        y, blob, xs, b = np.full((m, n), np.nan, np.float32), cuda_tools.raw(p.blob), cuda_tools.raw(x), cuda_tools.raw(bias)
        workspace = np.full(1 << 18, 255, np.uint8)
        call = ("flat_linear", blob, None, None, y, None, None, b, None, None, xs, x.shape[1], TYPES[x.dtype], 0, TYPES[bias.dtype], m,
                workspace, workspace.size, path, 0, int(path == 2), int(path == 2), splits)
        if run == "ptx":
            execute(modules, arch, sources, *call, memory=[blob, y, xs, b, workspace])
        else:
            cuda_tools.library().configure().call(*call)
        out.append(torch.from_numpy(y))
    return out


MV = (("mv_w1", "w1g64_fz", "sm_80"), ("mv_w1", "w1g32_fz_bf16", "sm_75"), ("mv_w2", "w2g64", "sm_80"), ("mv_w3", "w3g32_asym", "sm_80"),
      ("mv_w4", "w4g64_fz", "sm_80"), ("mv_w5", "w5g64_asym", "sm_80"), ("mv_w6", "w6g32_asym", "sm_80"), ("mv_w8", "w8g128_asym", "sm_80"),
      ("mv_lut2", "lut2", "sm_80"), ("mv_lut3", "lut3", "sm_80"), ("mv_lut4", "lut4", "sm_80"), ("mv_nf4", "nf4g64", "sm_80"),
      ("mv_fp16", "fp16", "sm_80"), ("mv_w4", "w4g64_asym", "sm_75"), ("mv_w3", "w3g128", "sm_90"), ("mv_w6", "w6g128_fz", "sm_90"),
      ("mv_w5", "w5", "sm_75"))


@pytest.mark.parametrize("case", range(len(MV)), ids=["-".join(c) for c in MV])
def test_mv(modules, case):
    """A full super-tile and a tail, two row blocks in a block; in turns one and two tiles of x rows, both types, whole and split columns."""
    source, fmt, arch = MV[case]
    m, dtype, splits = ((2, torch.bfloat16, 2), (9, torch.float16, 1))[case % 2]
    q = cases.random_qtensor(fmt, 19, 300, case)
    x, bias = cases.random_x(m, 300, dtype), torch.randn(19, generator=torch.Generator().manual_seed(0)).half()
    mine, fibers = linear(modules, arch, q, x, bias, [source] + ["reduce"] * (splits > 1), 2, splits)
    assert cuda_tools.error(mine, fibers.double()) <= 1e-6


@pytest.mark.parametrize("source, fmt, arch", (
    ("mm_w4", "w4g64", "sm_80"), ("mm_w3", "w3g32_asym", "sm_80"), ("mm_lut3", "lut3", "sm_80"), ("mm_w8", "w8", "sm_75"),
    ("mm_w1", "w1g32_fz", "sm_80"), ("mm_w5", "w5g128_asym", "sm_80"), ("mm_w6", "w6g64_asym", "sm_80"), ("mm_w2", "w2g128_fz", "sm_80"),
    ("mm_lut2", "lut2", "sm_80"), ("mm_lut4", "lut4", "sm_75"), ("mm_nf4", "nf4g64", "sm_80"), ("mm_fp16", "fp16", "sm_80")))
def test_mm(modules, source, fmt, arch):
    q = cases.random_qtensor(fmt, 18, 300, 1)
    for m in (18, 34):  # blocks of 32 and of 64 rows of x
        x, bias = cases.random_x(m, 300, torch.bfloat16), torch.zeros(18)
        mine, fibers = linear(modules, arch, q, x, bias, ["mm_stage", source], 3)
        assert cuda_tools.error(mine, fibers.double()) <= 1e-6, m


def test_mm_of_x_itself(modules):
    q = cases.random_qtensor("w4g64", 18, 320, 1)
    mine, fibers = linear(modules, "sm_80", q, cases.random_x(18, 320, torch.float16), torch.zeros(18), ["mm_w4"], 3)
    assert cuda_tools.error(mine, fibers.double()) <= 1e-6


@pytest.mark.parametrize("path, sources", ((2, ["mv_mixed"]), (3, ["mm_stage", "mm_mixed"])))
def test_mixed(modules, path, sources):
    layout = cases.Layout("mixed", (16, 150), ((0, 16, 0, 64, "w3g32"), (0, 16, 64, 128, "lut2"), (0, 16, 128, 150, "fp16")), rows=True, cols=True, sparse=11)
    x, bias = cases.random_x(5 if path == 2 else 17, 150, torch.float16), torch.ones(16)
    mine, fibers = linear(modules, "sm_80", layout.make(), x, bias, sources, path)
    assert cuda_tools.error(mine, fibers.double()) <= 1e-6


def test_scalar(modules):
    for layout in cases.LAYOUTS[1:4:2]:
        q = cases.Layout(layout.name, (5, layout.shape[1]), tuple((0, 5, *r[2:]) for r in layout.rectangles), cols=layout.cols, rows=True, sparse=9).make()
        x, bias = cases.random_x(2, q.shape[1], torch.float32), torch.randn(5, generator=torch.Generator().manual_seed(0))
        mine, fibers = linear(modules, "sm_80", q, x, bias, ["plain"], 1)
        assert torch.equal(mine, fibers)


@pytest.mark.parametrize("layout", (0, 1, 3, 5), ids=lambda i: cases.LAYOUTS[i].name)
def test_dequant(modules, layout):
    q = cases.LAYOUTS[layout].make(2)
    p = cuda_tools.bench("cpu").pack(q)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        blob, out = cuda_tools.raw(p.blob), cuda_tools.raw(torch.full(q.shape, float("nan"), dtype=dtype))
        sources = ["dequant"] + ["plain"] * (q.sparse is not None)
        execute(modules, "sm_80", sources, "flat_dequantize", blob, out, TYPES[dtype], 0, q.shape[0], memory=[blob, out])
        assert torch.equal(torch.from_numpy(out).view(dtype).reshape(q.shape), q.dequantize().to(dtype)), dtype


@pytest.mark.parametrize("fmt, arch", (("w1g64_fz", "sm_80"), ("w2g32_asym", "sm_90"), ("w3g128", "sm_80"), ("w4g64_asym", "sm_75"), ("w4g32_fz_bf16", "sm_90"),
                                       ("w5g64_asym", "sm_80"), ("w6g128_fz", "sm_80"), ("w8g64_asym", "sm_75"), ("lut2", "sm_80"), ("lut3", "sm_75"),
                                       ("lut4", "sm_80"), ("nf4g64", "sm_80"), ("fp16", "sm_75")))
def test_dequant_of_every_decoder(modules, fmt, arch):
    """A full super-tile and a tail, runs of 16 bytes (304 columns) and single numbers (301)."""
    for k in (304, 301):
        q = cases.random_qtensor(fmt, 18, k, 1)
        blob, out = cuda_tools.raw(cuda_tools.bench("cpu").pack(q).blob), cuda_tools.raw(torch.full(q.shape, float("nan"), dtype=torch.float16))
        execute(modules, arch, ["dequant"], "flat_dequantize", blob, out, TYPES[torch.float16], 0, 18, memory=[blob, out])
        assert torch.equal(torch.from_numpy(out).view(torch.float16).reshape(q.shape), q.dequantize().half()), k


def test_dequant_of_a_piece_of_the_rows(modules):
    """Stored rows 20 to 40 of a weight in two bands, whose rows are permuted: what the path "big" multiplies with."""
    q = cases.LAYOUTS[0].make(2)
    blob, out = cuda_tools.raw(cuda_tools.bench("cpu").pack(q).blob), cuda_tools.raw(torch.full((20, 100), float("nan")))
    execute(modules, "sm_80", ["dequant"], "flat_dequantize", blob, out, 0, 20, 20, memory=[blob, out])
    assert torch.equal(torch.from_numpy(out).view(torch.float32).reshape(20, 100), q.dequantize()[q.perm_rows[20:40].long()])


def test_rows_by_id(modules):
    q = cases.LAYOUTS[4].make(2)
    ids = torch.tensor([47, -1, 0, 48, 20])
    blob, out, places = cuda_tools.raw(cuda_tools.bench("cpu").pack(q).blob), cuda_tools.raw(torch.zeros(5, 90)), ids.numpy()
    execute(modules, "sm_80", ["plain", "plain"], "flat_embedding", blob, places, 5, out, 0, memory=[blob, places, out])
    rows = torch.from_numpy(out).view(torch.float32).reshape(5, 90)
    assert torch.equal(rows[[0, 2, 4]], q.dequantize()[ids[[0, 2, 4]]]) and rows[[1, 3]].isnan().all()

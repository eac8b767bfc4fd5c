"""Other libraries' layers on a GPU, for ``bench/run.py --op linear --device cuda``.

Each function imports its library, gives it ``case.weight`` (float32 [n, k]) or codes of its own, and says what they dequantize to; the benchmark checks that
before it times anything, so an interface that has changed becomes a sentence and not a number. ``bound`` makes a Candidate's ``bind``.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from mxq_ext.errors import MxqError

from . import BF16, Candidate, Case

#: Of results in 16 bits by weights that the library rounded itself, whose dequantized values are known.
LIMIT = BF16


def bitsandbytes(case: Case, dtype: torch.dtype, device: torch.device, bound) -> Iterator[Candidate]:
    """nf4 with a float32 scale for 64 columns."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(case.k, case.n, bias=False, quant_type="nf4", compute_dtype=dtype)
    layer.weight = bnb.nn.Params4bit(case.weight.to(dtype), requires_grad=False, quant_type="nf4")
    layer = layer.to(device).eval()
    state = layer.weight.quant_state
    dense = bnb.functional.dequantize_4bit(layer.weight.data, state)[case.sample.to(device)].float().cpu()
    yield Candidate(f"bitsandbytes nf4 g{state.blocksize}", 4, layer.weight.nbytes + state.absmax.nbytes, LIMIT, dense,
                    bound(lambda: copy.deepcopy(layer), lambda x, w: w(x)), dtype)


def torchao(case: Case, dtype: torch.dtype, device: torch.device, bound) -> Iterator[Candidate]:
    """Four bits with a scale and a zero for 128 columns (tinygemm), and eight bits with a scale a row."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    four = {"w4 g128": Int4WeightOnlyConfig(group_size=128)} if case.k % 128 == 0 and dtype == torch.bfloat16 else {}  # tinygemm knows bfloat16 alone
    for name, config in (four | {"w8": Int8WeightOnlyConfig()}).items():
        layer = torch.nn.Linear(case.k, case.n, bias=False, dtype=dtype, device=device)
        layer.weight = torch.nn.Parameter(case.weight.to(device, dtype), requires_grad=False)
        quantize_(layer, config)
        # What it multiplies with: the product with an identity, 16 rows of it at a time, as small products take the kernel that is timed.
        eye = torch.eye(case.k, dtype=dtype, device=device)
        dense = torch.cat([layer(part).T[case.sample.to(device)] for part in eye.split(16)], 1).float().cpu()
        bits = 4 if name.startswith("w4") else 8
        nbytes = case.n * case.k * bits // 8 + (case.n * (case.k // 128) * 4 if bits == 4 else case.n * dtype.itemsize)
        yield Candidate(f"torchao {name}", bits, nbytes, LIMIT, dense, bound(lambda layer=layer: copy.deepcopy(layer), lambda x, w: w(x)), dtype)


def marlin(case: Case, dtype: torch.dtype, device: torch.device, bound) -> Iterator[Candidate]:
    """The kernel of the paper, by the package of its authors (github.com/IST-DASLab/marlin): symmetric 4 bits with a scale for 128 columns, fp16."""
    import marlin as package

    if case.k % 128 or case.n % 256 or dtype != torch.float16:
        return
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (case.n, case.k), generator=g, dtype=torch.uint8)
    scales = (torch.rand(case.n, case.k // 128, generator=g) * 0.01 + 0.001).half()
    linear = torch.nn.Linear(case.k, case.n, bias=False, dtype=dtype, device=device)
    dense = (codes.to(device).half() - 8) * scales.to(device).repeat_interleave(128, 1)
    linear.weight = torch.nn.Parameter(dense, requires_grad=False)
    layer = package.Layer(case.k, case.n, 128).to(device)
    layer.pack(linear, scales.to(device))
    yield Candidate("marlin w4 g128", 4, layer.B.nbytes + layer.s.nbytes, LIMIT, dense[case.sample.to(device)].float().cpu(),
                    bound(lambda: copy.deepcopy(layer), lambda x, w: w(x)), dtype)


def vllm(case: Case, dtype: torch.dtype, device: torch.device, bound) -> Iterator[Candidate]:
    """Marlin: symmetric 4 and 8 bits with a scale for 128 columns."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils import apply_gptq_marlin_linear, marlin_make_empty_g_idx, marlin_make_workspace_new
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_quantize
    from vllm.scalar_type import scalar_types

    if case.k % 128 or case.n % 64:
        return
    for bits, kind in ((4, scalar_types.uint4b8), (8, scalar_types.uint8b128)):
        dense, codes, scales, *_ = marlin_quantize(case.weight.T.to(device, dtype).contiguous(), kind, 128, False)
        empty, workspace = marlin_make_empty_g_idx(device), marlin_make_workspace_new(device)

        def call(x, w, kind=kind, empty=empty, workspace=workspace):
            return apply_gptq_marlin_linear(x, *w, empty, empty, empty, workspace, kind, case.n, case.k, True)

        yield Candidate(f"vllm marlin w{bits} g128", bits, codes.nbytes + scales.nbytes, LIMIT, dense.T[case.sample.to(device)].float().cpu(),
                        bound(lambda codes=codes, scales=scales: (codes.clone(), scales.clone()), call), dtype)


def gptqmodel(case: Case, dtype: torch.dtype, device: torch.device, bound) -> Iterator[Candidate]:
    """Marlin as GPTQModel holds it: symmetric 4 bits with a scale for 128 columns."""
    from gptqmodel.nn_modules.qlinear.marlin import MarlinQuantLinear

    if case.k % 128 or case.n % 64:
        return
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (case.k, case.n), generator=g, dtype=torch.int32)
    scales = (torch.rand(case.k // 128, case.n, generator=g) * 0.01 + 0.001).to(dtype)
    layer = MarlinQuantLinear(bits=4, group_size=128, desc_act=False, sym=True, in_features=case.k, out_features=case.n, bias=False)
    packed = sum(codes[i::8].long() << (4 * i) for i in range(8))
    layer.qweight.data.copy_(torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int())
    layer.scales.data.copy_(scales)
    layer = layer.to(device)
    layer.post_init()
    dense = ((codes - 8).float() * scales.float().repeat_interleave(128, 0)).T[case.sample]
    yield Candidate("gptqmodel marlin w4 g128", 4, case.n * case.k // 2 + scales.nbytes, LIMIT, dense,
                    bound(lambda: copy.deepcopy(layer), lambda x, w: w(x)), dtype)


def gemlite(case: Case, dtype: torch.dtype, device: torch.device, bound) -> Iterator[Candidate]:
    """Triton: 4, 2 and 8 bits with a scale and a zero for 128 columns."""
    from gemlite.core import DType, GemLiteLinearTriton

    if case.k % 128 or case.n % 32:
        return
    kind = DType.FP16 if dtype == torch.float16 else DType.BF16
    g = torch.Generator().manual_seed(1)
    for bits in (8, 4, 2):
        codes = torch.randint(0, 1 << bits, (case.n, case.k), generator=g, dtype=torch.uint8)
        scales = (torch.rand(case.n, case.k // 128, generator=g) * 0.01 + 0.001).to(dtype)
        zeros = torch.full_like(scales, 1 << (bits - 1))
        layer = GemLiteLinearTriton(bits, group_size=128, in_features=case.k, out_features=case.n, input_dtype=kind, output_dtype=kind)
        layer.pack(codes.to(device), scales.to(device), zeros.to(device), None)
        dense = ((codes.float() - (1 << (bits - 1))) * scales.float().repeat_interleave(128, 1))[case.sample]
        yield Candidate(f"gemlite w{bits} g128", bits, case.n * case.k * bits // 8 + 2 * scales.nbytes, LIMIT, dense,
                        bound(lambda layer=layer: copy.deepcopy(layer), lambda x, w: w(x)), dtype)


#: Library, which is also its module's name, -> its candidates.
LIBRARIES: dict[str, Callable] = {f.__name__: f for f in (bitsandbytes, torchao, marlin, vllm, gptqmodel, gemlite)}


#: Library -> the distribution that has it, where the names differ.
DISTRIBUTIONS = {"flashinfer": "flashinfer-python"}


def load(names: str, libraries: dict[str, Callable] = LIBRARIES) -> tuple[dict[str, Callable], dict[str, str]]:
    """(candidates, versions) of ``all``, ``none`` or a list with commas. Says in one line about each what is not there."""
    wanted = {"all": list(libraries), "none": []}.get(names, [n for n in names.split(",") if n])
    if unknown := [n for n in wanted if n not in libraries]:
        raise MxqError(f"peer {unknown[0]!r}", f"the peers on a GPU are {', '.join(libraries)}", "name some of those, all or none")
    found, versions = {}, {}
    for name in wanted:
        try:
            importlib.import_module(name)
            found[name], versions[name] = libraries[name], version(DISTRIBUTIONS.get(name, name))
        except (ModuleNotFoundError, PackageNotFoundError) as error:
            print(f"peer {name} is skipped: it is not installed ({error})")
        except (ImportError, OSError, AttributeError, RuntimeError) as error:  # another build, another version
            print(f"peer {name} is skipped: it does not load ({error})")
    return found, versions

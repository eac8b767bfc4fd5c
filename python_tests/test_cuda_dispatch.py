"""Problem -> configuration of the CUDA kernels: a pure function, so every decision is tested without a GPU."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import cuda_tools
import numpy as np
import pytest
import torch

from mxq_ext import cuda
from mxq_ext.errors import NativeError
from mxq_ext.testing import cases

#: (capability, SMs): T4, A100, 3090, 4090, H100, unknown.
DEVICES = ((75, 40), (80, 108), (86, 82), (89, 128), (90, 132), (0, 0))


def runtime(capability: int = 0, sms: int = 0) -> cuda.Runtime:
    return cuda.Runtime(cuda_tools.Functions(cuda_tools.library()), capability, sms)


@pytest.fixture(scope="module")
def layer():
    """A down projection of 128 x 4096 (rows few, so that packing is quick)."""
    return runtime().pack(cases.random_qtensor("w4g128", 128, 4096))


def x_of(m, dtype=torch.float16, k=4096):
    return torch.empty(m, k, dtype=dtype)


@pytest.mark.parametrize("m, dtype, path", (
    (1, torch.float16, "mv"), (16, torch.bfloat16, "mv"), (17, torch.float16, "mm"), (128, torch.bfloat16, "mm"), (129, torch.float16, "big"),
    (4, torch.float32, "scalar"), (16, torch.float32, "scalar"), (17, torch.float32, "big"),
))
def test_path_and_name(layer, m, dtype, path):
    for capability, sms in DEVICES:
        name, text = runtime(capability, sms).explain(x_of(m, dtype), [(layer, None)])
        assert name == f"{path}_w4g128_a16__{'sm75' if capability == 75 else 'sm80'}"
        assert text.startswith(f"M={m} N=128 K=4096 x={str(dtype)[6:]}:")


def test_an_unknown_device_gets_what_a_known_one_of_middle_size_gets(layer):
    """The SMs of an A100, and no more shared memory than all but the oldest have."""
    for m in (1, 8, 40):
        assert runtime().explain(x_of(m), [(layer, None)]) == runtime(86, 108).explain(x_of(m), [(layer, None)])


def test_configuration_in_words(layer):
    """The text is what people see under MXQ_PRINT_CONFIG."""
    _, text = runtime(80, 108).explain(x_of(1), [(layer, None)])
    assert text == ("M=1 N=128 K=4096 x=float16: 8 x 1 blocks of 16 warps share 8 x 16 rows, 1 x 16 at a time, with 4 super-tiles of each warp under way")
    _, text = runtime(80, 108).explain(x_of(33), [(layer, None)])
    assert text == "M=33 N=128 K=4096 x=float16: 2 x 4 blocks of 64 rows by 64 rows of x, 128 columns at a time"


def test_blocks_of_mv_are_as_many_as_sms():
    """3200 rows on a device with 4 SMs, and on one with more SMs than row blocks."""
    p = runtime().pack(cases.random_qtensor("w2g64", 3200, 256))
    assert " 4 x 1 blocks of 16 warps share 200 x 16 rows" in runtime(90, 4).explain(x_of(1, k=256), [(p, None)])[1]
    assert " 200 x 1 blocks of 8 warps share 200 x 16 rows, 1 x 16 at a time" in runtime(90, 400).explain(x_of(1, k=256), [(p, None)])[1]


def test_columns_are_split_where_x_does_not_fit():
    """16 rows of 14336 columns are 448 KiB: no device has them in the shared memory of a block, and the smaller it is, the more blocks share them."""
    p = runtime().pack(cases.random_qtensor("w4g128", 64, 14336))
    splits = [int(runtime(capability, 132).explain(x_of(16, k=14336), [(p, None)])[1].split(" x ")[1].split()[0]) for capability in (90, 80, 86, 75)]
    assert splits == sorted(splits) and 2 <= splits[0] < splits[-1] <= 32


@pytest.mark.parametrize("capability, sms", DEVICES)
@pytest.mark.parametrize("m", (1, 5, 16, 17, 100, 128))
def test_a_chosen_configuration_fits_and_is_complete(layer, capability, sms, m):
    """Splits do not exceed the columns, and the workspace is a whole number of partial sums."""
    r = runtime(capability, sms)
    call, keep = r.call(x_of(m), [(layer, None)], [None], stream=0)
    nbytes = r.library.workspace_nbytes(ctypes.addressof(call))
    _, text = r.explain(x_of(m), [(layer, None)])
    splits = int(text.split(" x ")[1].split()[0])
    assert 1 <= splits <= 16 and nbytes % 256 == 0
    if m <= 16:
        assert nbytes == (0 if splits == 1 else splits * m * 128 * 4)
    del keep


@pytest.mark.parametrize("name", ("w2g128_asym", "w5g32_fz", "w8", "lut4", "nf4g32", "fp16", *(layout.name for layout in cases.LAYOUTS)))
def test_shared_memory_of_an_unknown_device_is_enough(name):
    """What a block asks for is at most what all but one of the capabilities from 7.5 on have."""
    known = {layout.name: layout for layout in cases.LAYOUTS}
    q = known[name].make() if name in known else cases.random_qtensor(name, 40, 5000)
    blob, k = cuda_tools.raw(runtime().pack(q).blob), q.shape[1]
    for m in (1, 8, 9, 16):
        x, y, workspace = (np.zeros(n, np.uint8) for n in (m * k * 2, m * q.shape[0] * 4, 1 << 22))
        launches = cuda_tools.library().record("flat_linear", blob, None, None, y, None, None, None, None, None, x, k, 2, 0, 0, m, workspace, workspace.size,
                                               cuda.PATHS["mv"], 0, 0, 0, 0)
        assert launches[0].shared <= 99 << 10 and launches[0].block[0] in (256, 384, 512)


def test_what_a_thread_remembers_is_what_it_would_find(layer):
    """Configurations come from a table of each thread; a fresh thread searches, and 96 questions share its 64 places."""
    def ask():
        return [runtime(capability, sms).explain(x_of(m), [(layer, None)]) for m in range(1, 17) for capability, sms in DEVICES for _ in range(2)]

    with ThreadPoolExecutor(1) as fresh:
        first = fresh.submit(ask).result()
    assert first[::2] == first[1::2] and ask() == ask() == first and len(set(first)) > 48


def test_refusals_are_sentences_with_numbers(layer):
    for path, m, dtype, words in (("mv", 17, torch.float16, r"mv takes at most 16 rows of x \(M = 17, N = 128, K = 4096, x float16\)"),
                                  ("mm", 257, torch.float16, r"mm takes at most 256 rows of x \(M = 257"),
                                  ("mv", 1, torch.float32, r"mv multiplies float16 or bfloat16 inputs \(M = 1, N = 128, K = 4096, x float32\)")):
        with pytest.raises(NativeError, match=words):
            runtime().linear(x_of(m, dtype), [(layer, None)], path=path, stream=0)
        assert runtime().explain(x_of(m, dtype), [(layer, None)], path)[0] == ""
    with pytest.raises(NativeError, match=r"compute capability 7.5 and later, this device has 7.0"):
        runtime(70, 80).linear(x_of(1), [(layer, None)], stream=0)


def test_a_mixed_weight_names_all_its_formats():
    q = cases.LAYOUTS[1].make()
    p = runtime().pack(q)
    assert runtime(90, 132).explain(x_of(2, k=200), [(p, None)])[0] == "mv_w2g64+w4g32_fz+fp16_a16__sm80"

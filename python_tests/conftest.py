"""Shared fixtures: random tiny models, a byte tokenizer, and a guard against the network."""

import os

# Before anything imports transformers or the hub client: the suite must pass without a network, so it must not look for one.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker per core: more threads in each would only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def no_mxq_environment(monkeypatch):
    """The developer's own MXQ_* settings must not change what a test sees."""
    for name in [n for n in os.environ if n.startswith("MXQ_") and n != "MXQ_CPU_TARGET"]:
        monkeypatch.delenv(name)


def make_tokenizer():
    """A byte-level tokenizer that needs no file: token = byte, 256 is the end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<eos>"])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def make_model(vocab: int = 257, hidden: int = 64, layers: int = 2, intermediate: int = 96, tied: bool = True, seed: int = 0):
    """A random Llama in float32 and eval mode; the same seed gives the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied,
                         bos_token_id=None, eos_token_id=vocab - 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def make_sharp_model(seed: int = 0):
    """A tiny model (2 layers, 4 heads over 2 of 16) whose attention and predictions are not flat."""
    import torch

    model = make_model(seed=seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.mul_(12.0 if "q_proj" in name or "k_proj" in name else 4.0)
    return model.requires_grad_(False)


def load_real_model():
    """(model, tokenizer) of the demo; skips the test where its package is not installed."""
    from mxq_ext.errors import ModelError
    from mxq_ext.hf import demo_model_path, load_model

    try:
        path = demo_model_path()
    except ModelError as error:
        pytest.skip(str(error))
    return load_model(path)


@pytest.fixture
def tiny_model():
    return make_model()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """A Hugging Face directory with the tiny model and its tokenizer. Read only: it is shared by the whole run."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


# ---------------------------------------------------------------------------------------------------------------- native kernels


def pytest_generate_tests(metafunc):
    if "target" in metafunc.fixturenames:
        from mxq_ext import ops

        metafunc.parametrize("target", ops.targets(), indirect=True)


@pytest.fixture
def target(request):
    """Runs the test once on each instruction set that this CPU has."""
    from mxq_ext import ops

    before = ops.target()
    ops.set_target(request.param)
    yield request.param
    ops.set_target(before)


@pytest.fixture
def threads():
    """Sets the number of torch's threads; the old one comes back."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def new_parameters():
    """A moved parameter is a new one, not the old one with other data, which would stay a host tensor on the GPU of pretend_gpu.py."""
    import torch

    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(before)


@pytest.fixture
def bench(monkeypatch):
    """bench/run.py as a module; the thread count, the target and sys.path come back."""
    import importlib.util
    import sys
    from pathlib import Path

    import torch

    from mxq_ext import ops

    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("bench_run", Path(__file__).parents[1] / "bench" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, threads = ops.target(), torch.get_num_threads()
    yield module
    ops.set_target(before)
    torch.set_num_threads(threads)


def poison_memory(monkeypatch, module):
    """What ``module`` allocates begins as NaN, or as junk if it holds whole numbers: what a kernel forgets to write cannot pass for a result."""
    import torch

    new_empty, empty = torch.Tensor.new_empty, torch.empty

    def poison(t):
        return t if t.is_meta else t.fill_(float("nan") if t.is_floating_point() else 0x5A)

    class Poisoned:
        """torch, with a poisoning empty()."""

        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def empty(*args, **kwargs):
            return poison(empty(*args, **kwargs))

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k)))
    monkeypatch.setattr(module, "torch", Poisoned())

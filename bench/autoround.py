"""AutoRound on the demo's model, on the calibration windows and held-out windows of bench/reconstruct.py, whose rows it is to be compared with.

    python bench/autoround.py -o bench/results/autoround.json [--bits 3] [--iterations 50]

Needs auto-round (third_party/README.md). Decoder linears only, groups of 64, asymmetric, as there. It sees the 64 windows four at a time. Its tuned weights
come back in bfloat16: codes are read off them with each layer's scales and zeros, and dequantized in float32 with the scales in float16, as they are stored. A
row is kept per width and number of iterations.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from reconstruct import calibration_windows, heldout_windows

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout wins over an installed package

from mxq_ext import text as texts  # noqa: E402
from mxq_ext.evaluate import Reference, evaluate  # noqa: E402
from mxq_ext.fileio import read_json, write_json  # noqa: E402
from mxq_ext.hf import demo_model_path, load_model, permute_model  # noqa: E402
from mxq_ext.pipeline import LENGTH  # noqa: E402
from mxq_ext.progress import Progress  # noqa: E402
from mxq_ext.testing.timing import machine  # noqa: E402

GROUP, BATCH = 64, 4


def stored_weight(layer: torch.nn.Module, bits: int) -> torch.Tensor:
    """The float32 weight [N, K] that a tuned layer's codes, scales and zeros stand for. Raises AssertionError if codes do not fall on the grid."""
    weight = layer.weight.detach().float()
    n, k = weight.shape
    scale, zero = layer.scale.float().reshape(n, -1, 1), layer.zp.float().reshape(n, -1, 1)
    groups = weight.reshape(n, -1, GROUP)
    codes = torch.round(groups / scale) + zero
    assert codes.min() >= 0 and codes.max() < 2 ** bits, (float(codes.min()), float(codes.max()))
    return ((codes - zero) * scale.half().float()).reshape(n, k)


def tuned(model: torch.nn.Module, tokenizer, tokens: torch.Tensor, bits: int, iterations: int) -> dict[str, torch.Tensor]:
    """Linear -> weight, of all linears in the decoder blocks, as AutoRound leaves them."""
    from auto_round import AutoRound

    work = copy.deepcopy(model)
    maker = AutoRound(work, tokenizer, bits=bits, group_size=GROUP, sym=False, iters=iterations, batch_size=BATCH, seqlen=LENGTH, nsamples=len(tokens),
                      device_map="cpu", enable_torch_compile=False, dataset=list(tokens.split(BATCH)))
    result, _ = maker.quantize()
    return {n: stored_weight(m, bits) for n, m in result.named_modules() if hasattr(m, "scale") and hasattr(m, "zp")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--bits", default="3,4,2")
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--windows", type=int, default=12, help="held-out windows of each text")
    options = parser.parse_args()
    model, tokenizer = load_model(demo_model_path())
    permute_model(model)
    tokens, held = calibration_windows(tokenizer), heldout_windows(tokenizer, options.windows)
    record = read_json(options.out) if options.out.exists() else {"rows": []}
    with Progress() as progress:
        references = {k: Reference.of(model, t, progress) for k, t in held.items()}
        for bits in map(int, options.bits.split(",")):
            if any((r["bits"], r["iterations"]) == (bits, options.iterations) for r in record["rows"]):
                continue
            start = time.perf_counter()
            weights = tuned(model, tokenizer, tokens, bits, options.iterations)
            seconds = time.perf_counter() - start
            swapped = copy.deepcopy(model)
            for name, weight in weights.items():
                swapped.get_submodule(name).weight.data.copy_(weight)
            numel = sum(w.numel() for w in weights.values())
            nbytes = numel * bits // 8 + numel // GROUP * (16 + bits) // 8
            row = {"bits": bits, "iterations": options.iterations, "linears": len(weights), "bytes": nbytes, "stored_bits": 8 * nbytes / numel,
                   "seconds": seconds,
                   "quality": {k: evaluate(swapped, references[k], t, progress=progress).to_dict() for k, t in held.items()}}
            record["rows"].append(row)
            record |= {"machine": machine(), "versions": {n: version(n) for n in ("auto-round", "torch", "transformers")}, "texts": texts.describe()}
            write_json(options.out, record)
            progress.note(f"{bits} bits, {options.iterations} iterations, {row['stored_bits']:.3f} stored, {seconds / 60:.1f} min: " + ", ".join(
                f"{k} ppl {q['perplexity']:.2f} KL {q['kl']:.4f}" for k, q in row["quality"].items()))


if __name__ == "__main__":
    main()

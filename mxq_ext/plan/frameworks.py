"""The surveyed frameworks as presets, with source, rule, departures and what is missing; and the uniform controls that each is to be compared with.

``docs/frameworks.md`` is made from this file. Where a paper's parts do not all exist here, ``missing`` names them and the preset is refused.
"""

from __future__ import annotations

from ..formats import UNIFORM_BITS
from .language import DEFAULT_CANDIDATES, Preset

#: A plan of a paper's rule that stays this far below the bits that were asked for is refused: a comparison at equal bytes would be none.
_STRICT = (("tolerance", 0.02),)
_WHOLE = "token embedding and head are quantized and counted too, where the paper leaves them in 16 bits"
_LABELS = "labels are drawn from the model itself, not read from the text, so that the Fisher matrix is the true one"
_TILES = "{} are taken by tiles of {}, the least that a kernel reads in one format; each linear stores its permutation"

FRAMEWORKS: dict[str, Preset] = {
    "llm_mq": Preset(
        ("w2g128_asym", "w3g128_asym", "w4g128_asym"), metric="first_order", weighting="none", solver=_STRICT,
        about="bits of each linear by the first order of the loss",
        source="LLM-MQ, Li et al., NeurIPS 2023 workshop on efficient language processing",
        formula="minimize sum |g . dW| over one width per linear, within the budget in bytes",
        departures=(_WHOLE, _LABELS, "codes by GPTQ, which the paper leaves open", "no sparse fp16 outliers in linears of 2 and 3 bits",
                    "the absolute value is taken for each window: near a minimum the mean gradient is nearly zero")),
    "hawq_trace": Preset(
        ("w2g128_asym", "w3g128_asym", "w4g128_asym", "w8g128_asym"), metric="hutchinson", weighting="none", solver=_STRICT,
        about="bits of each linear by the mean trace of its Hessian times its squared error",
        source="HAWQ-V2, Dong et al., NeurIPS 2020; for language models APTQ, Guan et al., DAC 2024",
        formula="minimize sum tr(H) / n |dW|^2, tr(H) = E[v^T H v] with v = +-1",
        departures=(_WHOLE, "H is the Hessian of the KL divergence to the float model, the Gauss-Newton matrix, where HAWQ takes that of the training loss; "
                    "attention is inside of it, where APTQ derives a matrix of its own for each attention block",
                    "the exact knapsack stands where APTQ ranks the layers; all traces come from the same probes")),
    "linear_kl": Preset(
        DEFAULT_CANDIDATES, metric="linear_kl", solver=_STRICT,
        about="cost = slope of the KL from noise probes times the relative error of a linear",
        source="HIGGS and the linearity theorem, Malinovskii et al. 2024, arXiv 2411.17525",
        formula="minimize sum a_l t_l^2, a_l = KL / t^2 of noise of known size in linear l alone",
        departures=(_WHOLE, "t^2 is the relative squared error of the linear's output, since GPTQ's errors are not isotropic; the paper has the weight's",
                    "GPTQ on uniform grids stands for Hadamard rotation and MSE-optimal grids")),
    "slim_llm": Preset(
        ("w2g128_asym", "w3g128_asym", "w4g128_asym"), metric="column_salience", allocator="double_pointer", scope="unit", unit="cols", weighting="none",
        solver=_STRICT,
        about="groups of 128 input columns exchange a bit in pairs, chosen by salience and by the KL of the linear's output",
        source="SliM-LLM, Huang et al. 2024, arXiv 2405.14917",
        formula="groups sorted by sum w^2 / U_jj^2; the i lowest get N - 1 bits, the i highest N + 1; i = argmin of "
                "KL(softmax of the quantized output || softmax of the output)",
        departures=(_WHOLE, "N = 3; replace the candidates for N = 2 and N = 4", "groups are stored by rising bits, with a permutation",
                    "range search under the Hessian's price per column in place of the salience-weighted one", "i = 0 is tried too")),
    "mixllm": Preset(
        ("w4g128_asym", "w8g128"), metric="row_taylor", allocator="threshold", unit="rows", weighting="none", activations="a8", solver=_STRICT,
        about="the output rows of the whole model that matter most get 8 bits, the others 4; activations in int8",
        source="MixLLM, Zheng et al. 2024, arXiv 2412.14590",
        formula="rows of all linears sorted by |g . d + 1/2 d^T F d|, d = Q_4(w) - w, F = mean g g^T over samples; the top share gets 8 bits",
        departures=(_WHOLE, _LABELS, _TILES.format("rows", 8), "the share follows from the budget; the paper fixes 10 %")),
    "cmpq": Preset(
        ("lut2", "lut3", "lut4"), metric="column_norm", allocator="threshold", scope="unit", unit="cols", method="kmeans", weighting="none", solver=_STRICT,
        about="input columns get more bits where the activations are large; k-means tables",
        source="CMPQ, Chen et al. 2024, arXiv 2410.13056",
        formula="columns sorted by the norm of their input; the top quantile gets a bit more",
        departures=(_WHOLE, _TILES.format("columns", 32), "one table per output row and band; the paper has one per channel",
                    "the two widths next to the budget, and no sparse outliers: the paper's quantile and its outlier shares could not be read")),
    "skim": Preset(
        ("lut2", "lut3", "lut4"), metric="row_error", allocator="greedy", scope="unit", unit="rows", method="kmeans", weighting="none", solver=_STRICT,
        about="output rows get any width, the largest gain first; k-means tables",
        source="SKIM, Bai et al. 2024, arXiv 2412.04180",
        formula="from the smallest width on, always the row whose next width saves most error per byte",
        departures=(_WHOLE, _TILES.format("rows", 8), "widths 2 to 4, where the paper has 1 to 8", "no trainable scale of the columns")),
    "owq": Preset(
        ("w3", "fp16"), metric="column_error", allocator="threshold", scope="unit", unit="cols", weighting="none", options=(("clip_power", 2.4),),
        solver=_STRICT,
        about="the columns whose quantization disturbs the output most stay in fp16",
        source="OWQ, Lee et al. 2023, arXiv 2306.02272",
        formula="columns sorted by H_jj |dW_j|^2; as many stay in fp16 as the budget pays for",
        departures=(_WHOLE, _TILES.format("columns", 32), "3 bits below fp16: replace the candidates for 4")),
    "squeezellm": Preset(
        ("lut3", "lut4"), metric="fisher_diag", allocator="share", unit="element", method="kmeans", weighting="none",
        solver=(("tolerance", 0.02), ("sensitive", 0.1), ("least_share", 0.0005), ("most_share", 0.02)),
        about="k-means tables weighted by the Fisher diagonal; outliers and the most sensitive weights in sparse fp16",
        source="SqueezeLLM, Kim et al. 2023, arXiv 2306.07629",
        formula="per row k-means with weights F_ij; sparse: the largest F_ij, and |w| beyond the quartiles",
        departures=(_WHOLE, _LABELS, "exact k-means by dynamic programming in place of Lloyd's iteration",
                    "the sparse share is what the budget leaves beside the tables; a tenth of it by sensitivity, as in the paper's 0.05 % of 0.45 %")),
    "spqr": Preset(
        ("w3g32_nest", "w4g32_nest"), metric="outlier_gain", allocator="share", unit="element", weighting="none",
        solver=(*_STRICT, ("least_share", 0.0005), ("most_share", 0.02)),
        about="outliers by Hessian-weighted error in sparse fp16, small groups with quantized scales",
        source="SpQR, Dettmers et al. 2023, arXiv 2306.03078, and the authors' code",
        formula="an element stays exact where sum_j (w - Q(w))^2 / U_jj^2 of its group falls by more than tau when it is left out; tau = t mean_j var(W_j) / "
                "U_jj^2 of its linear, one t for all; scales and zeros of 3 bits over 16 groups",
        departures=(_WHOLE, "groups of 32, the least that a kernel reads, where the paper has 16",
                    "16 groups of one output row share a range of scales, and one of zeros, where the authors' code takes one group of 16 rows; a zero is a "
                    "weight, the least of its group, not a multiple of the scale",
                    "tau follows from what the budget leaves beside the codes, at 6 bytes a value (column of 4, value of 2, where the paper has 2 and 2)",
                    "outliers are chosen once, before any feedback and by ranges without a second level; the authors fit a group without those above tau, "
                    "then keep what still errs by more than tau when its column is reached",
                    "GPTQ in the order of falling H_jj with ranges fixed beforehand and searched under the Hessian's price, then its repairs; the paper fits "
                    "min and max to the moved weights",
                    "memory while running is that of float zeros in fp16: the second level is undone at load")),
    "pb_llm": Preset(
        ("w1_fz", "w8"), metric="column_salience", allocator="threshold", scope="unit", unit="cols", weighting="none", solver=_STRICT,
        about="most input columns by one bit a weight, the salient ones in 8 bits",
        source="PB-LLM, Shang et al. 2023, arXiv 2310.00034",
        formula="w^2 / U_jj^2 below the quantile: sign(w) mean|w|; above: 8 bits",
        departures=(_WHOLE, _TILES.format("columns", 32),
                    "columns by their sum of w^2 / U_jj^2 where the paper picks elements: a mask of elements takes as many bytes as the signs",
                    "both levels of a row are fitted, where the paper has +-mean|w|",
                    "a token embedding that is no head has one bit throughout, unless the budget has 8",
                    "the share follows from the budget; the paper fixes 5 to 30 %")),
    "sfmp": Preset(
        ("w2g128_asym", "w3g128_asym", "w4g128_asym", "w5g128_asym", "w6g128_asym"), metric="fisher_diag", allocator="threshold", unit="tiles",
        weighting="none", solver=(*_STRICT, ("tile_rows", 512), ("tile_cols", 128)),
        about="tiles of 512 x 128 after sorting rows and columns, by a quantile of the Fisher diagonal",
        source="SFMP 2026, arXiv 2602.01027",
        formula="rows and columns of each linear sorted by sums of F_ij; of all tiles of 512 x 128 those whose mean F_ij lies above the quantile 1 - p get "
                "the wider of the two widths next to the target, p = fraction of the target bits",
        departures=(_WHOLE, _LABELS, "p is what the budget in bytes pays for, scales, zero points and permutations counted; a linear stores the permutation "
                    "of each axis along which its widths differ",
                    "a linear of fewer than 512 rows or 128 columns has tiles as large as itself; the last ones are ragged",
                    "within a band of rows GPTQ takes the columns of the narrower format first, wherever they are stored: the wider absorb their errors",
                    "uniform grids with integer zero points, where the paper's kernel reads bit planes",
                    "F from 8 windows of calibration; the paper takes 100 samples")),
}


def _all_groups(zero: str, groups: tuple[int, ...] = (128, 64, 32)) -> tuple[str, ...]:
    return tuple(f"w{bits}g{g}{zero}" for bits in UNIFORM_BITS if bits > 1 for g in groups)


_UNIFORM = ("one format for all: the largest that fits; a budget between two formats is refused, or raise solver.tolerance",)


def _control(candidates: tuple[str, ...], method: str, about: str, source: str, formula: str, weighting: str = "none", transform: str = "none") -> Preset:
    return Preset(candidates, metric="output", method=method, weighting=weighting, allocator="uniform", solver=_STRICT, about=about, source=source,
                  formula=formula, departures=(_WHOLE, *_UNIFORM), transform=transform)


CONTROLS: dict[str, Preset] = {
    "uniform_rtn": _control(_all_groups("_asym"), "rtn", "round to nearest in one format", "folklore", "q = round(w / s) + z"),
    "uniform_gptq": _control(_all_groups("_asym"), "gptq", "GPTQ in one format", "GPTQ, Frantar et al. 2023, arXiv 2210.17323",
                             "column by column, the error moved to the columns not yet rounded"),
    "uniform_hqq": _control(_all_groups("_fz"), "hqq", "HQQ in one format", "HQQ, Badri and Shaji 2023", "float zeros that minimize |W - Q|_p^p, p = 0.7"),
    "uniform_awq": _control(_all_groups("_asym"), "awq", "AWQ in one format", "AWQ, Lin et al. 2023, arXiv 2306.00978",
                            "columns scaled by a power of the mean input, the power and the ranges by the least output error", transform="awq"),
    "nf4": _control(("nf4", "nf4g128", "nf4g64", "nf4g32"), "rtn", "NormalFloat levels in one format", "QLoRA, Dettmers et al. 2023, arXiv 2305.14314",
                    "w = s * level[q], levels at the quantiles of a normal distribution"),
}

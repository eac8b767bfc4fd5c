"""Calibration: model + tokens -> Stats, block by block, in bounded memory, resumable.

``calibration`` drives the run, ``walk`` moves hidden states and gradients through the model, ``collect`` sums, ``store`` keeps.
"""

from .calibration import calibrate
from .collect import WEIGHTINGS
from .store import Stats
from .walk import BlockInputs, Calls, backward_walk, capture_block_inputs, capture_calls, final_hidden, run_from, tail

__all__ = ["WEIGHTINGS", "BlockInputs", "Calls", "Stats", "backward_walk", "calibrate", "capture_block_inputs", "capture_calls",
           "final_hidden", "run_from", "tail"]

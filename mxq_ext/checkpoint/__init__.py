"""Checkpoints: a directory that is either whole and checked, or refused with the reason.

    config.json  generation_config.json  tokenizer files    as transformers writes them
    model.safetensors, or shards with an index               canonical tensors ``<unit>.r0.codes`` ..., what stayed in float, and a guard
    plan.json                                                the plan, when the formats can be written as one
    mxq_manifest.json                                        size and sha256 of every file, description of every tensor and unit

:func:`save` writes into a temporary directory beside the target and renames it at the end, so nothing half-written is ever seen
under the final name. :func:`load` checks everything before it uses anything.
"""

from .manifest import MANIFEST, VERSION, Checked, bytes_on_disk, check, guard, inspect, is_checkpoint, read_plan, tensor_bytes, unit_tensors
from .read import fill_units, load, parameters_on_meta, swap_to_meta
from .write import check_target, save

__all__ = ["MANIFEST", "VERSION", "Checked", "bytes_on_disk", "check", "check_target", "fill_units", "guard", "inspect", "is_checkpoint", "load",
           "parameters_on_meta", "read_plan", "save", "swap_to_meta", "tensor_bytes", "unit_tensors"]

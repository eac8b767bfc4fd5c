"""Checkpoints: bit-equal round trips in a fresh process, exact bytes, and a refusal with the reason for every kind of damage."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from mxq_ext import checkpoint
from mxq_ext.checkpoint import MANIFEST, bytes_on_disk, inspect, load, save
from mxq_ext.checkpoint.manifest import digest
from mxq_ext.checkpoint.write import plan_entry
from mxq_ext.errors import CheckpointError, NativeError, PlanError, ShapeError
from mxq_ext.fileio import sha256
from mxq_ext.nn import quantized_modules, replace_linear
from mxq_ext.plan.schema import Plan
from mxq_ext.structure import find_units

IDS = torch.arange(24)[None] * 7 % 257
FORMATS = ["w1g64_fz", "w2g32", "w3g64_asym", "w4g128", "w4g64_fz_bf16", "w5g64_asym", "w6g32", "w8", "nf4g32", "lut2", "lut4", "fp16", "w3g32_nest"]
BANDS = Plan(default="w4g64",
             units={"model.layers.0.mlp.down_proj": {"cols": [[64, "w3g32"], [32, "w8"]]}, "model.layers.1.mlp.up_proj": "keep"})

LOAD = """
import sys, torch, mxq_ext
torch.set_num_threads(1)
for directory in sys.argv[1:]:
    model = mxq_ext.load(directory, fuse=None)
    torch.save(model(torch.load(directory + "/../ids.pt")).logits, directory + ".logits")
"""


def python(*args, **kwargs):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120, **kwargs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small checkpoint with tied head, tokenizer and several shards. Tests that damage it copy it first."""
    path = tmp_path_factory.mktemp("saved") / "model"
    return save(replace_linear(make_model(), "w4g64_asym"), path, make_tokenizer(), max_shard_size="20KB")


@pytest.fixture
def broken(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "broken"))


def reseal(path: Path, change=lambda m: None):
    """What a forger would do: bring hashes and sizes in line with the files, then edit the manifest and bring its digest in line."""
    manifest = json.loads((path / MANIFEST).read_text())
    for name in manifest["files"]:
        if (path / name).is_file():
            manifest["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": sha256(path / name)}
    change(manifest)
    manifest["sha256"] = digest(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def refused(path, text, **kwargs):
    with pytest.raises(CheckpointError, match=text) as e:
        load(path, **kwargs)
    assert e.value.fix, "every refusal says what to do"


# -- round trips --------------------------------------------------------------------------------------------------------------


def test_every_format_reloads_bit_equal_in_a_fresh_process(tmp_path):
    torch.save(IDS, tmp_path / "ids.pt")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plans = {f"{f}-{tied}": (Plan.uniform(f), tied) for f, tied in zip(FORMATS, itertools.cycle([True, False]))} | {"bands": (BANDS, True)}
    want = {}
    try:
        for i, (name, (plan, tied)) in enumerate(plans.items()):
            model = replace_linear(make_model(tied=tied, seed=i), plan)
            want[name] = model(IDS).logits
            save(model, tmp_path / name)
    finally:
        torch.set_num_threads(threads)
    done = python("-c", LOAD, *(str(tmp_path / n) for n in plans))
    assert done.returncode == 0, done.stderr
    for name in plans:
        assert torch.equal(torch.load(f"{tmp_path / name}.logits"), want[name]), name


def test_what_a_loaded_model_is(saved):
    source = replace_linear(make_model(), "w4g64_asym")
    model = load(saved, fuse=None)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert not [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert model.lm_head.held is model.model.embed_tokens.held and model.lm_head.blob is model.model.embed_tokens.blob
    assert find_units(model) == find_units(source) and torch.equal(model(IDS).logits, source(IDS).logits)
    assert model.mxq_source["kind"] == "mxq" and model.mxq_plan == Plan.uniform("w4g64_asym")
    assert model.generation_config.eos_token_id == 256
    before, after = (m.qtensor() for m in (source.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj))
    assert after.info["method"] == before.info["method"] == "rtn" and after.info["weight_error"] == before.info["weight_error"]
    for name, module in quantized_modules(source).items():
        other = model.get_submodule(name).qtensor().to_tensors()
        assert all(torch.equal(t, other[n]) for n, t in module.qtensor().to_tensors().items())
    assert model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] <= 7


def test_saving_what_was_loaded_gives_the_same_tensors(saved, tmp_path):
    again = save(load(saved), tmp_path / "again")
    one, two = ({n: t for f in p.glob("*.safetensors") for n, t in load_file(f).items()} for p in (saved, again))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_dtypes(tmp_path):
    model = replace_linear(make_model().to(torch.bfloat16), "w8")
    path = save(model, tmp_path / "bf16")
    assert torch.equal(load(path, fuse=None)(IDS).logits, model(IDS).logits) and load(path).dtype == torch.bfloat16
    assert load(path).model.rotary_emb.inv_freq.dtype == torch.bfloat16, "model.to() casts computed buffers too: it shows in the logits"
    wide = load(path, torch.float32)
    assert wide.model.rotary_emb.inv_freq.dtype == torch.float32
    assert wide(IDS).logits.dtype == torch.float32 and wide.model.embed_tokens.dtype == torch.float32
    assert torch.equal(wide.model.norm.weight, model.model.norm.weight.float())
    for name in ("float16", "torch.float16"):
        assert load(path, name, device="cpu").dtype == torch.float16
    for dtype in (torch.int8, torch.float64, "bfloat32", "nn"):
        with pytest.raises(ShapeError, match="a model computes in float32, bfloat16 or float16"):
            load(path, dtype)
    with pytest.raises(NativeError, match="there are kernels for CPUs and for CUDA devices"):
        load(path, device="meta")


def test_biases_and_float_heads(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
                                         num_key_value_heads=2, tie_word_embeddings=True)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    replace_linear(model, Plan.uniform("w4g32", keep=["lm_head"]))
    other = load(save(model, tmp_path / "m"), fuse=None)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    assert other.lm_head.weight is other.model.embed_tokens.weight, "the tie of float weights survives"


def test_predicted_bytes_are_the_bytes_on_disk(tmp_path):
    for i, plan in enumerate((BANDS, *map(Plan.uniform, FORMATS))):
        for tied in (True, False):
            model = make_model(tied=tied)
            predicted = plan.predicted_bytes(find_units(model), float_bytes=4)["units"]
            kept = [n for n, d in plan.resolve(find_units(model)).items() if d is None]
            path = save(replace_linear(model, plan), tmp_path / f"{i}{tied}")
            real = bytes_on_disk(path)
            assert real["units"] == {n: b for n, b in predicted.items() if n not in kept}
            files = {n: t for f in path.glob("*.safetensors") for n, t in load_file(f).items()}
            assert real["total"] == sum(t.numel() * t.element_size() for t in files.values())
            norms = sum(t.numel() * 4 for n, t in files.items() if "norm" in n)
            assert real["float"] == norms + sum(predicted[n] for n in kept)


def test_inspect(saved):
    report = inspect(saved)
    json.dumps(report)
    assert [u["name"] for u in report["units"]] == [u.name for u in find_units(make_model())]
    first = report["units"][0]
    assert (first["name"], first["kind"], first["format"], first["shape"], first["tied"]) == (
        "model.embed_tokens", "embedding", "w4g64_asym", [257, 64], ["lm_head"])
    assert first["bytes"] == 257 * (32 + 2 + 1) and first["stored_bits"] == first["bytes"] * 8 / (257 * 64)
    assert report["totals"]["unit_bytes"] == sum(bytes_on_disk(saved)["units"].values())
    assert report["totals"]["file_bytes"] == sum((saved / f).stat().st_size for f in report["files"])
    assert report["plan"]["default"] == "w4g64_asym" and report["version"] == 1 and report["evaluation"] is None


def test_evaluation_is_kept(tmp_path):
    path = save(replace_linear(make_model(), "w8"), tmp_path / "m", evaluation={"perplexity": 12.5, 3: (1, 2)})
    assert inspect(path)["evaluation"] == {"perplexity": 12.5, "3": [1, 2]}
    with pytest.raises(CheckpointError, match="evaluation cannot be written as JSON"):
        save(load(path), tmp_path / "n", evaluation={"x": object()})
    assert os.listdir(tmp_path) == ["m"], "a failed save leaves nothing"


def test_shards(saved):
    files = sorted(p.name for p in saved.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    for f in files:
        tensors = load_file(saved / f)
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 20_000 or len(tensors) == 1
        assert all(index["weight_map"][n] == f for n in tensors)


@pytest.mark.parametrize("size", ["0", "many", "-3GB", 0])
def test_shard_sizes_that_are_none(size, tmp_path):
    with pytest.raises(CheckpointError, match="it must be a positive number of bytes"):
        save(replace_linear(make_model(), "w8"), tmp_path / "m", max_shard_size=size)


# -- plans --------------------------------------------------------------------------------------------------------------------


def test_a_plan_that_disagrees_is_refused(tmp_path):
    model = replace_linear(make_model(), "w4g64")
    with pytest.raises(PlanError, match="unit model.embed_tokens: the plan says w8, the module holds w4g64"):
        save(model, tmp_path / "m", plan=Plan.uniform("w8"))
    assert not any(tmp_path.iterdir())


def test_without_a_plan_one_is_made_from_the_modules(tmp_path):
    model = replace_linear(make_model(), BANDS)
    model.mxq_plan = None
    plan = load(save(model, tmp_path / "m")).mxq_plan
    assert plan.resolve(find_units(make_model())) == BANDS.resolve(find_units(make_model()))


def test_plan_entries_of_rectangles():
    base = {"shape": [8, 96], "perm_rows": False, "perm_cols": True, "sparse": False}
    assert plan_entry({**base, "rectangles": [[0, 8, 64, 96, "w8"], [0, 8, 0, 64, "w3g32"]]}) == {"cols": [[64, "w3g32"], [32, "w8"]],
                                                                                                 "permute": True}
    assert plan_entry({**base, "rectangles": [[0, 4, 0, 64, "w8"], [4, 8, 0, 64, "w8"], [0, 8, 64, 96, "w8"]]}) is None
    falling = {**base, "rectangles": [[0, 8, 64, 96, "w3g32"], [0, 8, 0, 64, "w8"]]}
    assert plan_entry(falling) == {"tiles": [[8, [[64, "w8"], [32, "w3g32"]]]], "permute": True}
    tiles = {"shape": [24, 96], "rectangles": [[8, 24, 0, 96, "w3g32"], [0, 8, 0, 64, "w3g32"], [0, 8, 64, 96, "w8"]], "sparse": False}
    for both in (False, True):
        entry = plan_entry({**tiles, "perm_rows": both, "perm_cols": both})
        assert entry == {"tiles": [[8, [[64, "w3g32"], [32, "w8"]]], [16, [[96, "w3g32"]]]]} | ({"permute": True} if both else {})
    assert plan_entry({**tiles, "perm_rows": True, "perm_cols": False}) is None, "tiles permute both axes"


# -- the target ---------------------------------------------------------------------------------------------------------------


def test_targets(tmp_path):
    model = replace_linear(make_model(), "w8")
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")
    with pytest.raises(CheckpointError, match="a checkpoint is there already; pass overwrite=True"):
        save(model, tmp_path / "empty")
    save(replace_linear(make_model(), "w4g64"), tmp_path / "empty", overwrite=True)
    assert inspect(tmp_path / "empty")["plan"]["default"] == "w4g64"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(CheckpointError, match="no mxq checkpoint, so it is never replaced"):
            save(model, tmp_path / name, overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    with pytest.raises(CheckpointError, match="it has no quantized module"):
        save(make_model(), tmp_path / "float")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "mine"]


KILLS = """
import json, os, random, shutil, signal, sys, time
sys.path.insert(0, "python_tests")
import torch
from conftest import make_model
from mxq_ext import checkpoint, replace_linear
torch.set_num_threads(1)  # a process that forks must have no threads
new, old = replace_linear(make_model(hidden=128, intermediate=512, layers=2), "w4g64"), replace_linear(make_model(), "w8")
rng, report = random.Random(0), {}
for overwrite in (False, True):
    target = os.path.join(sys.argv[1], str(overwrite), "m")
    save = lambda: checkpoint.save(new, target, max_shard_size=40_000, overwrite=overwrite)
    start = time.perf_counter()
    save()
    length = time.perf_counter() - start
    seen = report[str(overwrite)] = []
    for _ in range(8):
        shutil.rmtree(target, ignore_errors=True)
        if overwrite:
            checkpoint.save(old, target)
        child = os.fork()
        if not child:
            save()
            os._exit(0)
        time.sleep(rng.uniform(0, 1.1 * length))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        whole = checkpoint.inspect(target)["plan"]["default"] if os.path.exists(target) else None
        if whole:
            checkpoint.check(target)
        seen.append((whole, sorted(n for n in os.listdir(os.path.dirname(target)) if n != "m")))
print(json.dumps(report))
"""


def test_a_killed_save_leaves_nothing_under_the_name(tmp_path):
    done = python("-c", KILLS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    for overwrite, seen in json.loads(done.stdout).items():
        assert all(n.startswith(".m.") for _, names in seen for n in names), "what is left over is hidden"
        midway = [whole for whole, names in seen if any(not n.endswith((".old.part", ".trash.part")) for n in names)]
        assert midway, "no save was hit: the test has lost its bite"
        # Midway there is the old checkpoint or nothing (for a moment, between two renames), but never a part of the new one.
        assert set(midway) <= ({"w8", None} if overwrite == "True" else {None})
        target = tmp_path / overwrite / "m"
        save(replace_linear(make_model(), "w4g32"), target, overwrite=True)
        assert os.listdir(target.parent) == ["m"], "the next save cleans up"
        assert inspect(target)["plan"]["default"] == "w4g32"


def test_a_checkpoint_that_stepped_aside_comes_back(tmp_path, saved):
    """Killed between the two renames of an overwrite: the old one is there under a hidden name, and nothing under its own."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    hidden = tmp_path / f"{checkpoint.write._temp_prefix(tmp_path / 'm')}{gone.pid}.old.part"
    shutil.copytree(saved, hidden)
    with pytest.raises(CheckpointError, match="a checkpoint is there already"):
        save(replace_linear(make_model(), "w8"), tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"] and load(tmp_path / "m")


def test_a_failed_rename_keeps_the_old_one(tmp_path, monkeypatch):
    target = save(replace_linear(make_model(), "w8"), tmp_path / "m")
    rename = os.rename

    def fail(a, b):
        if Path(b) == target and ".old" not in str(a):
            raise OSError("disk on fire")
        rename(a, b)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="disk on fire"):
        save(replace_linear(make_model(), "w4g64"), target, overwrite=True)
    assert os.listdir(tmp_path) == ["m"] and inspect(target)["plan"]["default"] == "w8"


# -- damage -------------------------------------------------------------------------------------------------------------------


def shard_of(path: Path, tensor: str) -> Path:
    return path / json.loads((path / MANIFEST).read_text())["tensors"][tensor]["file"]


def edit_tensor(path: Path, tensor: str, change):
    """Rewrites one shard with a changed tensor, leaving its size in place where the shape stays."""
    file = shard_of(path, tensor)
    tensors = load_file(file)
    tensors[tensor] = change(tensors[tensor].clone())
    save_file(tensors, file, {"format": "pt"})


def test_cut_short_flipped_and_missing(broken):
    shard = max(broken.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refused(broken, f"{shard.name}.*it has {len(content) - 1} bytes, the manifest says {len(content)}: it was cut short")
    flipped = bytearray(content)
    flipped[-5] ^= 1
    shard.write_bytes(flipped)
    refused(broken, f"{shard.name}.*sha256 is not the manifest's")
    shard.unlink()
    refused(broken, f"{shard.name}.*it is missing")


def test_truncation_at_any_length_is_found_even_if_resealed(broken):
    shard = max(broken.glob("*.safetensors"))
    content = shard.read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:length])
        refused(broken, "it has|cut short")
        reseal(broken)
        refused(broken, "no whole safetensors file")


@pytest.mark.parametrize("name", ["config.json", "plan.json", "generation_config.json", "model.safetensors.index.json"])
def test_edited_json_files(broken, name):
    text = (broken / name).read_text()
    (broken / name).write_text(text.replace("e", "f", 1))
    refused(broken, f"{name}.*sha256 is not the manifest's")
    (broken / name).unlink()
    refused(broken, f"{name}.*it is missing")


def test_edited_manifest(broken):
    manifest = json.loads((broken / MANIFEST).read_text())
    manifest["units"]["model.embed_tokens"]["qtensor"]["shape"] = [258, 64]
    (broken / MANIFEST).write_text(json.dumps(manifest))
    refused(broken, "was edited: its content does not match its own sha256")
    (broken / MANIFEST).write_text((broken / MANIFEST).read_text()[:-20])
    refused(broken, "it is not valid JSON")
    (broken / MANIFEST).unlink()
    refused(broken, "mxq_manifest.json is missing.*write quantized models with mxq_ext.save")


@pytest.mark.parametrize("version", [0, 2, "1", None, True])
def test_other_versions(broken, version):
    reseal(broken, lambda m: m.update(mxq_checkpoint=version))
    refused(broken, f"of version {version!r}: this mxq_ext .* reads version 1; install the mxq_ext that wrote it")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", ".", "", "a/b.json", "..\\x", "x\0y", MANIFEST])
def test_names_that_lead_elsewhere(broken, name):
    (broken.parent / "outside.safetensors").write_bytes(b"x")
    reseal(broken, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0"}}))
    refused(broken, "must be plain file names in the directory")


def forge(path, key, *where):
    """reseal(..., forge(value, key, ...)): sets manifest[key]...[last] = value."""

    def change(m):
        for k in (key, *where)[:-1]:
            m = m[k]
        m[(key, *where)[-1]] = path

    return change


UNIT = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("change, text", [
    (forge([97, 64], "units", UNIT, "qtensor", "shape"), "manifest describes a linear of .97, 64.|97"),
    (forge([[0, 96, 0, 64, "w3g64_asym"]], "units", UNIT, "qtensor", "rectangles"), "format, tied or bytes|must be"),
    (forge([[0, 96, 0, 1 << 40, "w4g64_asym"]], "units", UNIT, "qtensor", "rectangles"), "rectangle 0"),
    (forge([[0, 48, 0, 64, "w4g64_asym"]], "units", UNIT, "qtensor", "rectangles"), "must be uint8 .48, 32., it is"),
    (forge([], "units", UNIT, "qtensor", "rectangles"), "do not fit the rectangles"),
    (forge("w4g64_asym", "units", UNIT, "qtensor", "rectangles"), "its description cannot be used"),
    (forge(True, "units", UNIT, "qtensor", "perm_cols"), "its tensor perm_cols is missing"),
    (forge(7, "units", UNIT, "bytes"), "the manifest says 7"),
    (forge({}, "units", UNIT), "its description cannot be used .KeyError"),
    (forge([], "units"), "has no object 'units'"),
    (forge([96, 33], "tensors", f"{UNIT}.r0.codes", "shape"), "it is uint8 .96, 32. in"),
    (forge({}, "files", "config.json"), "gives no size and sha256"),
    (forge("float99", "model", "dtype"), "dtype 'float99' is unknown"),
    (forge("LlamaModel", "model", "class"), "it makes a LlamaForCausalLM"),
    (forge([], "units", "model.embed_tokens", "tied"), r"tied to \(\), config.json makes a embedding"),
    (lambda m: m["units"].update(other=m["units"].pop(UNIT)), "tensor r0.codes is missing"),
    (lambda m: m["tensors"].pop(f"{UNIT}.r0.codes"), "1 tensors are not in the manifest"),
    (lambda m: m["tensors"].update({"extra": {}}), "1 tensors are missing from the files, the first is extra"),
    (lambda m: m["files"].pop("model.safetensors.index.json") and None, None),
])
def test_forged_manifests(broken, change, text):
    reseal(broken, change)
    if text is None:
        load(broken)  # the index is for transformers only
    else:
        refused(broken, text)


def test_extra_and_missing_tensors(broken):
    file = max(broken.glob("*.safetensors"))
    tensors = load_file(file)
    save_file({**tensors, "intruder": torch.zeros(3)}, file)
    reseal(broken)
    refused(broken, "tensors are not in the manifest, the first is intruder")
    # even if the manifest is forged to list it: the model has no place for it
    reseal(broken, lambda m: m["tensors"].update(intruder={"file": file.name, "dtype": "float32", "shape": [3]}))
    refused(broken, "float tensors are unknown to the model, the first is intruder")
    norm = "model.norm.weight"
    save_file({n: t for n, t in tensors.items() if n != norm}, file)
    reseal(broken, lambda m: [m["tensors"].pop("intruder", None), m["tensors"].pop(norm)])
    refused(broken, "float tensors are missing from the checkpoint, the first is model.norm.weight")


def test_a_stray_shard(broken):
    save_file({"x": torch.zeros(1)}, broken / "model-99999.safetensors")
    refused(broken, "model-99999.safetensors is not in the manifest")


def test_a_tensor_in_two_files(broken):
    one, two, *_ = sorted(broken.glob("*.safetensors"))
    save_file({**load_file(two), **load_file(one)}, two)
    reseal(broken)
    refused(broken, f"is in {one.name} and in {two.name}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", [f"{UNIT}.r0.scales", "model.norm.weight"])
def test_values_that_are_not_finite(broken, tensor, value):
    def poison(t):
        t.view(-1)[3] = value
        return t

    edit_tensor(broken, tensor, poison)
    reseal(broken)
    for verify in ("full", "size"):
        refused(broken, f"tensor {tensor}: 1 of its .* values are NaN or infinite", verify=verify)


def test_shapes_and_dtypes_of_tensors(broken):
    edit_tensor(broken, "model.norm.weight", lambda t: torch.ones(65))
    reseal(broken)
    refused(broken, r"tensor model.norm.weight: it is float32 \[65\] in")
    reseal(broken, forge([65], "tensors", "model.norm.weight", "shape"))
    refused(broken, r"tensor model.norm.weight: it is torch.float32 \(65,\), the model needs torch.float32 \(64,\)")
    edit_tensor(broken, "model.norm.weight", lambda t: torch.ones(64, dtype=torch.int32))
    reseal(broken,
           lambda m: m["tensors"].update({"model.norm.weight": {**m["tensors"]["model.norm.weight"], "dtype": "int32", "shape": [64]}}))
    refused(broken, "it is torch.int32")


def test_index_ranges_are_checked_before_native_code_sees_them(tmp_path):
    from test_nn import rich_qtensor

    from mxq_ext.nn import QuantLinear

    model = replace_linear(make_model(hidden=96, intermediate=24), Plan(default=None, units={UNIT: "w8"}))
    model.model.layers[0].mlp.up_proj = QuantLinear.from_qtensor(rich_qtensor())
    model.mxq_plan = None
    path = save(model, tmp_path / "m")
    assert torch.equal(load(path, fuse=None)(IDS).logits, model(IDS).logits)
    for tensor, text in (("perm_cols", "perm_cols is not a permutation of 0..95"), ("perm_rows", "perm_rows is not a permutation"),
                         ("sparse.cols", "sparse.cols must lie in 0..95"), ("sparse.rowptr", "sparse.rowptr must rise")):
        broken = Path(shutil.copytree(path, tmp_path / tensor))

        def poison(t):
            t[1] = 1 << 20
            return t

        edit_tensor(broken, f"{UNIT}.{tensor}", poison)
        reseal(broken)
        refused(broken, text)


def test_unknown_architectures(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))
    reseal(broken)
    refused(broken, "(?s)config.json: transformers cannot build the model.*it was made with transformers")
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    reseal(broken)
    refused(broken, "unit model.layers.1.self_attn.q_proj: the model of config.json has no such unit")


def test_paths_that_are_no_checkpoints(tmp_path):
    refused(tmp_path / "nothing", "there is no such directory")
    refused(tmp_path, "is missing, so this is no mxq checkpoint; check the path")
    with pytest.raises(CheckpointError, match="must be \"full\""):
        load(tmp_path, verify="none")


def test_verify_size_skips_the_hash_only(broken):
    shard = shard_of(broken, f"{UNIT}.r0.codes")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    load(broken, verify="size")
    refused(broken, "sha256")


def test_code_in_the_checkpoint_is_not_run(broken):
    """config.json may name Python files to import (auto_map); they are refused, never run."""
    (broken / "evil.py").write_text(textwrap.dedent("""
        import pathlib
        pathlib.Path(__file__).with_name("ran").touch()
        from transformers import LlamaConfig as Evil
    """))
    config = json.loads((broken / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"}
    (broken / "config.json").write_text(json.dumps(config))
    reseal(broken)
    refused(broken, "transformers cannot build the model")
    assert not (broken / "ran").exists()


def test_how_activations_are_read_is_part_of_the_checkpoint(tmp_path):
    model = make_model()
    replace_linear(model, Plan.uniform("w4g32", activations="a8"))
    save(model, tmp_path / "a8")
    loaded = load(tmp_path / "a8", fuse=None)
    assert loaded.mxq_plan.activations == "a8" and {m.compute for m in quantized_modules(loaded).values() if hasattr(m, "compute")} == {"a8"}
    with torch.inference_mode():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)

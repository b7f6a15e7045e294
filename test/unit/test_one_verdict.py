"""One folder, one verdict: inspect, shard, generate and the accuracy tools agree on what is a problem."""

import json
import math

import pytest
import torch
from nxdi_deepseek.accuracy.reference import Weights
from nxdi_deepseek.checkpoint.folder import Checkpoint
from nxdi_deepseek.checkpoint.fp8 import scale_shape
from nxdi_deepseek.cli import main
from nxdi_deepseek.errors import CheckpointError
from safetensors.torch import load_file, save_file
from support.damage import EXPERT, INDEX, NORM, drop, nan_scale, replace, shard_of, with_config, with_header, with_index
from support.encodings import SCALE, edit, write_encoded

BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"
MTP = "model.layers.3."
FP8 = {"quant_method": "fp8"}


def each(change):
    """change(name, tensor) -> new tensors by name."""

    def edited(tensors):
        return {name: value for old, tensor in tensors.items() for name, value in change(old, tensor).items()}

    return lambda d: edit(d, edited)


def renamed(change):
    return each(lambda name, tensor: {change(name): tensor})


def without(*parts):
    return each(lambda name, tensor: {} if any(part in name for part in parts) else {name: tensor})


def both(*damages):
    def damage(model_dir):
        for one in damages:
            one(model_dir)

    return damage


def infinite(tensor):
    tensor.view(-1)[-1] = math.inf
    return tensor


def nan(tensor):
    tensor.view(-1)[0] = math.nan
    return tensor


def without_index(model_dir):
    (model_dir / INDEX).unlink()


def in_one_file(model_dir):
    tensors = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    save_file(tensors, model_dir / "model-00001-of-00001.safetensors")
    without_index(model_dir)


def one_file_short(model_dir):
    without_index(model_dir)
    shard_of_any = sorted(model_dir.glob("*.safetensors"))[1]
    shard_of_any.unlink()


def empty_header(model_dir):
    shard_of(model_dir, EXPERT).write_bytes((8).to_bytes(8, "little") + b"{}      ")


def unquantized(name, tensor):
    """As a cast to BF16 that forgets to drop the scales."""
    return {name: tensor.to(torch.bfloat16) if tensor.dtype == torch.float8_e4m3fn else tensor}


def per_tensor(name, tensor):
    return {name: tensor.max().reshape(1) if name.endswith(SCALE) else tensor}


def in_blocks(rows, columns):
    """Other blocks of the same number of scales: what they are does not matter to the verdict."""

    def change(tensors):
        for name in [name for name in tensors if name.endswith(SCALE)]:
            weight = tensors[name.removesuffix(SCALE)]
            tensors[name] = torch.ones(scale_shape(weight.shape, (rows, columns)))
        return tensors

    return lambda d: both(in_one_shard, lambda d: edit(d, change))(d)


def in_one_shard(model_dir):
    in_one_file(model_dir)
    names = load_file(model_dir / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (model_dir / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def packed(weight, *others):
    """Another format of quantized experts: its names after the dot."""

    def change(name, tensor):
        if ".experts." not in name:
            return {name: tensor}
        if name.endswith(SCALE):
            return {}
        module = name.removesuffix("weight")
        return {module + weight: torch.zeros(4, dtype=torch.int32)} | {
            module + other: torch.ones(4) for other in others
        }

    return each(change)


def with_text_of_index(change):
    return lambda d: (d / INDEX).write_text(change((d / INDEX).read_text()))


NESTED = "[" * 2000 + "]" * 2000
QUARTERS = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
# Damage; then None where the folder is complete, else what all must say of it.
FOLDERS = {
    "as written": (lambda d: None, None),
    "num_nextn_predict_layers null": (with_config(num_nextn_predict_layers=None), None),
    "a layer fewer than stored": (with_config(num_hidden_layers=2), None),
    "a layer more than stored": (with_config(num_hidden_layers=4), "model.layers.3.eh_proj.weight: not a tensor"),
    "no MTP layer": (without(MTP), None),
    "MTP layer without copies": (without(MTP + "embed_tokens", MTP + "shared_head.head"), None),
    "MTP layer without eh_proj": (without(MTP + "eh_proj"), f"{MTP}eh_proj.weight: missing"),
    "MTP layer without an expert": (drop(f"{MTP}mlp.experts.2.up_proj.weight"), "experts.2.up_proj.weight: missing"),
    "misshapen scale of MTP": (
        replace(f"{MTP}mlp.experts.2.up_proj.weight{SCALE}", lambda t: t[:-1].clone()),
        f"experts.2.up_proj.weight{SCALE}: shape",
    ),
    "metadata with a number": (
        with_header(EXPERT, lambda header: header | {"__metadata__": {"format": 1}}),
        "__metadata__: must be a JSON object of texts",
    ),
    "metadata null": (with_header(EXPERT, lambda header: header | {"__metadata__": None}), None),
    "index without metadata": (with_index(lambda index: index.pop("metadata")), None),
    "index with odd metadata": (with_index(lambda index: index.update(metadata=[1])), "its metadata must be"),
    "index that is a list": (with_text_of_index(lambda text: "[]"), "its weight_map must give each tensor a file"),
    "index of numbers": (with_text_of_index(lambda text: '{"weight_map": {"a": 1}}'), "must give each tensor a file"),
    "index of other folders": (
        with_text_of_index(lambda text: text.replace('"model-00001', '"../model-00001')),
        "must give each tensor a file",
    ),
    "index nested deep": (with_text_of_index(lambda text: NESTED), f"{INDEX}: cannot be read as JSON"),
    "header nested deep": (with_header(EXPERT, lambda header: NESTED), "its header is not JSON"),
    "header that is an empty list": (with_header(EXPERT, lambda header: "[]"), "its header is not a JSON object"),
    "entry that is a list": (with_header(EXPERT, lambda header: header | {EXPERT: [["dtype", "BF16"]]}), "bad entry"),
    "name with a line end": (
        with_header(EXPERT, lambda h: {"a\n" if n == EXPERT else n: e for n, e in h.items()}),
        "a\\n",
    ),
    "shard with an empty header": (empty_header, f"missing, though {INDEX} places it there (the same of "),
    "infinity in a norm": (replace(NORM, infinite), f"{NORM}: holds NaN or infinity"),
    "infinity in the bias": (replace(BIAS, infinite), f"{BIAS}: holds NaN or infinity"),
    "NaN in a norm of MTP": (replace(f"{MTP}hnorm.weight", nan), f"{MTP}hnorm.weight: holds NaN or infinity"),
    "NaN in a norm of an ignored layer": (
        both(with_config(num_hidden_layers=2), replace("model.layers.2.input_layernorm.weight", nan)),
        None,
    ),
    "NaN in a scale": (replace(EXPERT + SCALE, nan_scale), f"{EXPERT}{SCALE}: holds NaN or infinity"),
    "scales in BF16": (each(lambda n, t: {n: t.to(torch.bfloat16) if n.endswith(SCALE) else t}), None),
    "BF16 beside scales": (each(unquantized), "bfloat16, with scales of FP8 beside it"),
    "one weight of BF16 beside its scale": (
        replace(EXPERT, lambda t: t.to(torch.bfloat16)),
        f"{EXPERT}: bfloat16, with",
    ),
    "BF16 without scales, config says FP8": (
        both(each(unquantized), without(SCALE)),
        None,
    ),
    "scales of another name": (
        renamed(lambda name: name.replace(SCALE, "_scale")),
        None,
    ),
    "two scales of a weight": (
        each(lambda n, t: {n: t, n.replace(SCALE, "_scale"): t.clone()}),
        "weight_scale: a second scale of its weight; remove one of the two (the same of ",
    ),
    "scales of activations": (
        each(lambda n, t: {n: t, n.replace("weight" + SCALE, "input_scale"): torch.ones(1)} if SCALE in n else {n: t}),
        None,
    ),
    "quantization_config deleted": (with_config(quantization_config=None), None),
    "weight_block_size null": (with_config(quantization_config=FP8 | {"weight_block_size": None}), None),
    "weight_block_size of other blocks": (
        with_config(quantization_config=FP8 | {"weight_block_size": [64, 64]}),
        "config.json: weight_block_size is [64, 64], the scales are of blocks of [32, 32]; correct it",
    ),
    "64x64, quantization_config deleted": (both(in_blocks(64, 64), with_config(quantization_config=None)), None),
    "blocks of no common size": (
        both(in_blocks(24, 40), with_config(quantization_config=FP8)),
        "no scale fits blocks of [128, 128]",
    ),
    "one scale per tensor": (
        both(each(per_tensor), with_config(quantization_config=FP8 | {"weight_block_size": None})),
        None,
    ),
    "INT4 of no shape": (
        both(packed("weight_packed", "weight_scale", "weight_shape"), with_config(quantization_config=QUARTERS)),
        "weight_packed: shape [4], expected ",
    ),
    "INT4 with zero points": (
        both(packed("weight_packed", "weight_scale", "weight_zero_point"), with_config(quantization_config=QUARTERS)),
        "quant_method compressed-tensors (format pack-quantized): weights with weight_zero_point are not supported",
    ),
    "INT8": (
        each(lambda n, t: {n: t.view(torch.int8) if t.dtype == torch.float8_e4m3fn else t}),
        "dtype torch.int8 is not supported; use an FP8, INT4, BF16 or FP32 checkpoint (the same of ",
    ),
    "GPTQ": (
        both(packed("qweight", "qzeros", "scales", "g_idx"), with_config(quantization_config={"quant_method": "gptq"})),
        "quant_method gptq",
    ),
    "NVFP4": (
        both(
            packed("weight", "weight_scale", "weight_scale_2"),
            with_config(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        ),
        "quant_method modelopt (format NVFP4)",
    ),
    "quantized, config.json does not say how": (
        both(packed("qweight", "scales"), with_config(quantization_config=None)),
        "quant_method none: weights with",
    ),
    "names without model.": (renamed(lambda name: name.removeprefix("model.")), None),
    "names behind language_model.": (renamed(lambda name: "language_model." + name), None),
    "names behind model.language_model.": (
        renamed(lambda name: name.replace("model.", "model.language_model.", 1)),
        None,
    ),
    "names of something else": (renamed(lambda name: "other." + name), "tensors of the model; are these its weights"),
    "no index": (without_index, None),
    "one numbered file, no index": (in_one_file, None),
    "no index, a file short": (one_file_short, f"no {INDEX}, and 2 of 3 files model-*-of-*.safetensors"),
    "too few experts": (with_config(n_routed_experts=12), "do config.json and the weights belong together?"),
    "too many experts": (with_config(n_routed_experts=20), "missing (the same of"),
}
OTHER_WEIGHTS = (
    "a layer fewer than stored",
    "NaN in a norm of an ignored layer",
    "scales in BF16",
    "BF16 without scales, config says FP8",
    "64x64, quantization_config deleted",
    "one scale per tensor",
)
# Which faults of all tensors are told in one line.
ONE_LINE = (
    "BF16 beside scales",
    "two scales of a weight",
    "INT8",
    "weight_block_size of other blocks",
    "blocks of no common size",
    "INT4 with zero points",
    "GPTQ",
    "NVFP4",
    "quantized, config.json does not say how",
    "no index, a file short",
    "index that is a list",
    "index nested deep",
)


@pytest.fixture
def model_dir(tmp_path):
    (tmp_path / "model").mkdir()
    return write_encoded(tmp_path / "model", "FP8, float32 scales")


@pytest.fixture(scope="module")
def as_written(tmp_path_factory):
    """An undamaged folder, with rank files in `out`."""
    folder = tmp_path_factory.mktemp("as written")
    write_encoded(folder, "FP8, float32 scales")
    assert main(["shard", str(folder), str(folder / "out"), "--tp-degree", "2"]) == 0
    return folder


def contents(out_dir):
    return {path.name: path.read_bytes() for path in (out_dir / "weights").glob("*.safetensors")}


def weights_problem(model_dir):
    with Checkpoint(model_dir) as checkpoint:
        try:
            Weights(checkpoint, torch.float32)
        except CheckpointError as error:
            return str(error)
    return None


@pytest.mark.parametrize("name", FOLDERS)
def test_one_verdict(model_dir, tmp_path, as_written, capsys, name):
    damage, message = FOLDERS[name]
    damage(model_dir)
    inspected = main(["inspect", str(model_dir)])
    printed = capsys.readouterr().out
    sharded = main(["shard", str(model_dir), str(tmp_path / "out"), "--tp-degree", "2"])
    of_shard = capsys.readouterr().err
    generated = main(["generate", str(model_dir), "--prompt-ids", "5,6", "--max-new-tokens", "2"])
    of_generate = capsys.readouterr().err
    told = [line for line in printed.splitlines() if line.startswith("problem: ")]
    if message is None:
        assert (inspected, sharded, generated, weights_problem(model_dir)) == (0, 0, 0, None), (printed, of_shard)
        assert "complete: " in printed
        assert (contents(tmp_path / "out") == contents(as_written / "out")) == (name not in OTHER_WEIGHTS)
        return
    assert (inspected, sharded, generated) == (1, 2, 2), printed
    errors = [of_shard, of_generate, weights_problem(model_dir)]
    # verify goes by the config.json that the rank files were made with.
    if (model_dir / "config.json").read_bytes() == (as_written / "config.json").read_bytes():
        assert main(["verify", str(model_dir), str(as_written / "out")]) == 2
        errors.append(capsys.readouterr().err)
    for error in errors:
        assert message in error
        assert len(error.splitlines()) == 1
    assert any(message in line for line in told), told
    assert not (tmp_path / "out").exists()
    assert len(told) == 1 or name not in ONE_LINE, told


def test_layers_that_are_ignored_are_told(model_dir, capsys):
    with_config(num_hidden_layers=2)(model_dir)
    assert main(["inspect", str(model_dir)]) == 0
    printed = capsys.readouterr().out
    assert "MTP           none" in printed
    for layer in (2, 3):
        assert f"ignored: layer {layer}: num_hidden_layers is 2 (" in printed


@pytest.mark.parametrize(
    "damage", [without(MTP), with_config(num_hidden_layers=2)], ids=["no MTP layer", "a layer of the model instead"]
)
def test_with_mtp_needs_the_tensors(model_dir, tmp_path, capsys, damage):
    damage(model_dir)
    assert main(["shard", str(model_dir), str(tmp_path / "out"), "--tp-degree", "2", "--with-mtp"]) == 2
    error = capsys.readouterr().err
    assert "the checkpoint has no tensors of an MTP layer" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_mtp_layer_without_copies_is_written_with_the_models(model_dir, tmp_path):
    """What a checkpoint with copies of the model's embedding and head gives."""
    stored = {}
    for path in model_dir.glob("*.safetensors"):
        stored |= load_file(path)
    copies = {
        MTP + "embed_tokens.weight": "model.embed_tokens.weight",
        MTP + "shared_head.head.weight": "lm_head.weight",
    }
    each(lambda name, tensor: {name: stored[copies[name]].clone() if name in copies else tensor})(model_dir)
    arguments = ["--tp-degree", "2", "--with-mtp"]
    assert main(["shard", str(model_dir), str(tmp_path / "copies"), *arguments]) == 0
    without(*copies)(model_dir)
    assert main(["shard", str(model_dir), str(tmp_path / "none"), *arguments]) == 0
    for out_dir in ("none", "copies"):
        assert len(contents(tmp_path / out_dir / "mtp")) == 2
    assert contents(tmp_path / "none/mtp") == contents(tmp_path / "copies/mtp")
    assert main(["verify", str(model_dir), str(tmp_path / "none"), "--full"]) == 0
    assert main(["unshard", str(tmp_path / "none"), str(tmp_path / "back")]) == 0
    assert main(["shard", str(tmp_path / "back"), str(tmp_path / "again"), *arguments]) == 0
    assert contents(tmp_path / "again/mtp") == contents(tmp_path / "copies/mtp")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inspect_full_reads_the_weights(model_dir, capsys, value):
    name = "model.layers.0.self_attn.o_proj.weight"
    edit(model_dir, lambda tensors: {n: t.to(torch.bfloat16) if n == name else t for n, t in tensors.items()})
    drop(name + SCALE)(model_dir)
    assert main(["inspect", str(model_dir), "--full"]) == 0
    assert "every weight finite" in capsys.readouterr().out
    replace(name, lambda t: t.index_fill(0, torch.tensor(3), value))(model_dir)
    assert main(["inspect", str(model_dir)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(model_dir), "--full"]) == 1
    assert f"problem: {shard_of(model_dir, name)}: {name}: holds " in capsys.readouterr().out

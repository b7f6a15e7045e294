"""Sharding of 48 experts at the released sizes for 64 ranks: 2.1 GB of FP8 become 4.2 GB of BF16, or 2.1 GB of FP8.

Prints seconds and ratios within the run. BF16 is compared with two baselines: plainly writing as many bytes in as many
files, each with fsync (before and after, the faster counts), and the straightforward path in torch. FP8 is compared
with BF16; all forms take turns, and the fastest of each counts. 48 experts have the share of the bytes that the
released model's have: files of fp8-block are 0.52 of BF16's. The plain write also warms up: a virtual machine may be
given its memory only when it is first written to.

    python bench/shard.py [--folder /dev/shm] [--experts 48] [--rounds 2] [--skip-straightforward]
"""

import argparse
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch
from checkpoints import ONE_LAYER, write_random
from nxdi_deepseek.checkpoint.folder import Checkpoint
from nxdi_deepseek.checkpoint.layout import model_layout
from nxdi_deepseek.checkpoint.plan import make_plans
from nxdi_deepseek.checkpoint.sharder import shard_checkpoint
from nxdi_deepseek.model_config import load_model_config
from nxdi_deepseek.weight_forms import FORMS
from safetensors.torch import load_file, save_file

TP_DEGREE = 64


def straightforward(model_dir, out_dir):
    """Everything in memory, a torch operation per step: load, weight.to(float32) * scale, fuse, split, save."""
    config = load_model_config(model_dir)
    stored = {}
    for file in sorted(Path(model_dir).glob("*.safetensors")):
        stored.update(load_file(file))
    model = {}
    for spec in model_layout(config):
        parts = [dequantized(stored, source.name) for source in spec.sources]
        if len(spec.shape) < 3:
            model[spec.name] = torch.cat(parts)
        elif spec.stride == 2:
            pairs = zip(parts[::2], parts[1::2], strict=True)
            model[spec.name] = torch.stack([torch.cat([gate.T, up.T], dim=1) for gate, up in pairs])
        else:
            model[spec.name] = torch.stack([part.T for part in parts])
    out_dir.mkdir()
    for rank in range(TP_DEGREE):
        shards = {}
        for spec in model_layout(config):
            tensor = model[spec.name]
            if spec.partition_dim is not None:
                chunks = tensor.chunk(TP_DEGREE * spec.stride, spec.partition_dim)[rank::TP_DEGREE]
                tensor = torch.cat(chunks, spec.partition_dim)
            shards[spec.name] = tensor.contiguous()
        save_file(shards, out_dir / f"tp{rank}_sharded_checkpoint.safetensors")


def dequantized(stored, name):
    weight, scale = stored[name], stored.get(name + "_scale_inv")
    if scale is None:
        return weight.to(torch.bfloat16)
    spread = scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
    return (weight.to(torch.float32) * spread).to(torch.bfloat16)


def plain_write(folder, files, size):
    """Seconds of writing `files` files of `size` bytes one after the other, each with fsync; removes them."""
    block = os.urandom(1 << 24)
    start = time.perf_counter()
    for i in range(files):
        with (folder / f"plain{i}").open("wb", buffering=0) as file:
            left = size
            while left > 0:
                left -= file.write(block[:left])
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    for i in range(files):
        (folder / f"plain{i}").unlink()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="/dev/shm", help="folder for the checkpoint")
    parser.add_argument("--folder", default="/dev/shm", help="folder for the output")
    parser.add_argument("--experts", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2, help="of all forms of weights")
    parser.add_argument("--skip-straightforward", action="store_true", help="it takes most of the time")
    args = parser.parse_args()
    fields = ONE_LAYER | {"n_routed_experts": args.experts}
    with tempfile.TemporaryDirectory(dir=args.source) as source, tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size = write_random(source, fields)
        print(
            f"{args.experts} experts of {fields['hidden_size']}x{fields['moe_intermediate_size']}, {size / 1e9:.2f} GB"
        )
        with Checkpoint(source) as checkpoint:
            file_bytes = make_plans(checkpoint, folder, TP_DEGREE, "bfloat16")[0].file_bytes
        for form in FORMS:  # loads numba and the compiled loops
            shard_checkpoint(source, Path(folder) / form, TP_DEGREE, weights=form, ranks=[0])
            shutil.rmtree(Path(folder) / form)
        before = plain_write(Path(folder), TP_DEGREE, file_bytes)

        out = Path(folder) / "out"
        runs, cpu = {form: [] for form in FORMS}, dict.fromkeys(FORMS, float("inf"))
        for _ in range(args.rounds):
            for form in FORMS:
                start = time.process_time()
                runs[form].append(shard_checkpoint(source, out, TP_DEGREE, weights=form))
                cpu[form] = min(cpu[form], time.process_time() - start)
                shutil.rmtree(out)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"peak RSS {peak:.2f} GiB")
        fastest = {form: min(found, key=lambda summary: summary.seconds) for form, found in runs.items()}
        summary = fastest["bf16"]
        for form, found in fastest.items():
            ratio = f"{found.seconds / summary.seconds:.2f} of BF16's time"
            cores = f"{cpu[form]:.2f} s of processors, {cpu[form] / cpu['bf16']:.2f} of BF16's"
            print(f"{form}: {found.seconds:.2f} s for {found.bytes / 1e9:.2f} GB, {ratio}; {cores}")
        for form in ("fp8", "fp8-block"):
            print(f"error of {form}: " + ", ".join(f"{n} {e:.1e}" for n, e in fastest[form].errors.items()))
        plain = min(before, plain_write(Path(folder), TP_DEGREE, file_bytes))
        print(f"plain write with fsync: {plain:.2f} s for {summary.bytes / 1e9:.2f} GB")
        print(f"ratio to the plain write: {summary.seconds / plain:.2f}")
        if not args.skip_straightforward:
            start = time.perf_counter()
            straightforward(source, out)
            seconds = time.perf_counter() - start
            print(f"straightforward: {seconds:.2f} s, {seconds / summary.seconds:.1f} times as long")


if __name__ == "__main__":
    main()

"""Peak memory of sharding at the released sizes, from a checkpoint of holes: real headers, no disk used.

python bench/memory.py layer [--folder /dev/shm]   one layer of 256 experts, 4 of 64 ranks, 1.5 GB written
python bench/memory.py kimi [--folder /dev/shm]    one layer of 384 experts, INT4 to FP8, 4 of 64 ranks, 1.1 GB written
python bench/memory.py model [--folder /tmp]       all 61 layers, one rank; reads 240 GB of holes, writes nothing
"""

import argparse
import resource
import tempfile
import time
from unittest.mock import patch

from checkpoints import ONE_LAYER, RELEASED
from nxdi_deepseek.checkpoint import planned_file
from nxdi_deepseek.checkpoint.sharder import shard_checkpoint
from nxdi_deepseek.checkpoint.summary import inspect_checkpoint
from nxdi_deepseek.checkpoint.synthetic import write_sparse_checkpoint

KIMI = ONE_LAYER | {
    "n_group": 1,
    "n_routed_experts": 384,
    "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "topk_group": 1,
}
CASES = {"layer": (ONE_LAYER, range(4), "bf16"), "kimi": (KIMI, range(4), "fp8"), "model": (RELEASED, [0], "bf16")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--folder", help="where the files of holes, and the output, go")
    args = parser.parse_args()
    fields, ranks, weights = CASES[args.case]
    with tempfile.TemporaryDirectory(dir=args.folder) as source, tempfile.TemporaryDirectory(dir=args.folder) as out:
        write_sparse_checkpoint(source, fields)
        summary = inspect_checkpoint(source)
        print(f"{summary.tensors} tensors, {sum(summary.bytes_by_dtype.values()) / 1e9:.1f} GB apparent")
        show("before")
        if args.case == "model":
            # Its 23 GB of zeros would be written for nothing.
            with patch.object(planned_file, "pwrite_all"), patch("shutil.disk_usage") as usage:
                usage.return_value.free = 1 << 50
                run(source, out, ranks, weights)
        else:
            run(source, out, ranks, weights)


def run(source, out, ranks, weights):
    start = time.perf_counter()
    summary = shard_checkpoint(source, out, 64, ranks=ranks, weights=weights)
    show(f"after {summary.bytes / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s")


def show(when):
    print(f"peak RSS {when}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()

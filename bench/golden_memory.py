"""Peak memory of `nxdi-deepseek golden` at the released sizes: one dense and one expert layer, embedding and head.

Weights are holes on disk but for embeddings and routers, so that the tokens choose many of the 256 experts. More layers
take no more memory: each is freed before the next.

    python bench/golden_memory.py [--tokens 64] [--folder /tmp]
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from checkpoints import RELEASED
from nxdi_deepseek.checkpoint.synthetic import fill_rows, write_sparse_checkpoint
from nxdi_deepseek.cli import main as cli

FIELDS = RELEASED | {"first_k_dense_replace": 1, "num_hidden_layers": 2, "num_nextn_predict_layers": 0}
MODEL_BYTES = 671e9 * 4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="length of the prompt")
    parser.add_argument("--folder", help="where the files of holes, and the output, go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_sparse_checkpoint(folder, FIELDS, shards=4)
        generator = torch.Generator().manual_seed(0)
        fill_rows(folder, "model.embed_tokens.weight", 2 + args.tokens, generator)
        fill_rows(folder, "model.layers.1.mlp.gate.weight", FIELDS["n_routed_experts"], generator)
        prompt = ",".join(map(str, range(2, 2 + args.tokens)))
        start = time.perf_counter()
        cli(["golden", folder, "--prompt-ids", prompt, "--max-new-tokens", "1", "--out", str(Path(folder, "golden"))])
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{args.tokens} tokens: peak {peak / 1e9:.2f} GB, {seconds:.0f} s")
    print(f"the whole model in float32: {MODEL_BYTES / 1e9:.0f} GB, {MODEL_BYTES / peak:.0f} times as much")


if __name__ == "__main__":
    main()

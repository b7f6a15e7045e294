"""Train the tiny model: two stages of AdamW, plain RoPE at 512 tokens, then YaRN at 2048.

    python -m tools.train_tiny.train --tokens build/tokens.npz --out build

Writes trained.safetensors (BF16, correction biases float32) and curve.csv. Section numbers: arXiv:2412.19437.
"""

import argparse
import csv
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from .model import TinyDeepseekV3, load_config

MTP_WEIGHTS = (0.3, 0.1)  # lambda, early and late (sec. 4.2)
BIAS_SPEED = 0.001  # gamma; 0 over the last part of the run, so that the shipped bias belongs to the shipped router
FREEZE_BIAS_AT = 0.95
LONG_STAGE_AT = 0.8  # from here on YaRN and the long windows
BOS = 0


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", required=True, help="tokens.npz from corpus.py")
    parser.add_argument("--out", default="build", type=Path)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--tokens-per-step", type=int, default=32768)
    parser.add_argument("--windows", type=int, nargs=2, default=(512, 2048), help="window length of the two stages")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args(argv)


def sample_windows(stream, count, length, generator):
    """[count, length + 2]: BOS and length + 1 tokens from random places; the two extra are the targets."""
    starts = torch.randint(len(stream) - length - 1, (count, 1), generator=generator).to(stream.device)
    windows = stream[starts + torch.arange(length + 1, device=stream.device)]
    return F.pad(windows, (1, 0), value=BOS)


def heldout_windows(stream, length):
    """Consecutive windows over the whole stream, [count, length + 2], BOS first; the tail that fills none is left."""
    count = (len(stream) - 1) // length
    starts = torch.arange(count, device=stream.device).unsqueeze(1) * length
    return F.pad(stream[starts + torch.arange(length + 1, device=stream.device)], (1, 0), value=BOS)


def losses(model, windows):
    """(main cross-entropy, MTP cross-entropy) of windows [B, S + 2] (sec. 2.2, eq. 24)."""
    logits, mtp_logits = model(windows[:, :-1])
    main = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:-1].flatten())
    mtp = F.cross_entropy(mtp_logits.float().flatten(0, 1), windows[:, 2:].flatten())
    return main, mtp


@torch.no_grad()
def evaluate(model, windows):
    """Mean (main, MTP) held-out loss; the routers' load counters are left as they were."""
    model.eval()
    loads = [gate.load.clone() for gate in model.gates]
    with autocast(windows.device):
        sums = torch.tensor([[loss.item() for loss in losses(model, part)] for part in windows.split(16)])
    sizes = torch.tensor([len(part) for part in windows.split(16)]).unsqueeze(1)
    for gate, load in zip(model.gates, loads, strict=True):
        gate.load.copy_(load)
    model.train()
    return ((sums * sizes).sum(0) / len(windows)).tolist()


def autocast(device):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def learning_rate(step, steps, peak):
    """Linear warm-up over 2 % of the run, then a cosine to zero."""
    warmup = max(steps // 50, 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def build_optimizer(model, args):
    """AdamW, betas as in sec. 4.2; weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def train_step(model, run, optimizer, windows, progress):
    """One optimizer step and one bias update; returns the two losses as tensors."""
    with autocast(windows.device):
        main, mtp = losses(run, windows)
        loss = main + MTP_WEIGHTS[progress >= LONG_STAGE_AT] * mtp
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for gate in model.gates:
        gate.update_bias(BIAS_SPEED if progress < FREEZE_BIAS_AT else 0.0)
    return main.detach(), mtp.detach()


def train(args, device):
    """Train from scratch; returns (model, rows of the training curve)."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    generator = torch.Generator().manual_seed(args.seed)
    arrays = np.load(args.tokens)
    stream, heldout = (torch.from_numpy(arrays[name].astype(np.int64)).to(device) for name in ("train", "heldout"))
    heldout = heldout_windows(heldout, args.windows[0])
    model = TinyDeepseekV3(load_config(), args.dropout, yarn=False).to(device)
    run = torch.compile(model, dynamic=False) if args.compile else model
    optimizer = build_optimizer(model, args)
    rows, start, extended = [], time.time(), False
    for step in range(args.steps):
        progress = step / args.steps
        if progress >= LONG_STAGE_AT and not extended:
            model.rotary.extend()
            extended = True
        length = args.windows[extended]
        windows = sample_windows(stream, args.tokens_per_step // length, length, generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        main, mtp = train_step(model, run, optimizer, windows, progress)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            values = [main.item(), mtp.item(), *evaluate(model, heldout)]
            rows.append([step + 1, (step + 1) * args.tokens_per_step, *(round(value, 4) for value in values)])
            print(*rows[-1], f"{time.time() - start:.0f} s", flush=True)
    return model, rows


def save(model, rows, out):
    """BF16 weights (training names, experts stacked) with float32 biases, and the curve."""
    state = model.state_dict()
    kept = {name: t if name.endswith("e_score_correction_bias") else t.bfloat16() for name, t in state.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in kept.items()}, out / "trained.safetensors")
    with open(out / "curve.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "tokens", "train_loss", "train_mtp_loss", "heldout_loss", "heldout_mtp_loss"])
        writer.writerows(rows)


def main(argv=None):
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, rows = train(args, device)
    save(model, rows, args.out)


if __name__ == "__main__":
    main()

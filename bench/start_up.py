"""How long `nxdi-deepseek inspect` of the small model takes, as a multiple of `python -c "import torch"`.

Both start new processes, in turns; the median of each counts.

    python bench/start_up.py [--runs 7]
"""

import argparse
import subprocess
import sys
import time
from statistics import median

from nxdi_deepseek.tiny_model import TINY_MODEL_DIR

COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "inspect": [sys.executable, "-m", "nxdi_deepseek.cli", "inspect", str(TINY_MODEL_DIR)],
}


def seconds(command):
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    for command in COMMANDS.values():
        seconds(command)  # fills the system's file cache
    times = {name: [] for name in COMMANDS}
    for _ in range(args.runs):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    for name in COMMANDS:
        print(f"{name}: {median(times[name]):.2f} s")
    print(f"ratio: {median(times['inspect']) / median(times['import torch']):.2f}")


if __name__ == "__main__":
    main()

"""Runs a command with NxDI in CPU mode on a machine without the Neuron SDK, in all of the command's processes:

    python test/support/without_sdk.py nxdi-deepseek inference-demo --model-type deepseek_v3 ... --on-cpu
    python test/support/without_sdk.py vllm serve MODEL_DIR ...

NxD and NxDI are looked for as in the tests: installed, else their source (see nxdi.py).
"""

import os
import pathlib
import sys

_SUPPORT = pathlib.Path(__file__).resolve().parent


def environment():
    """Environment variables for such a command, the caller's own included."""
    paths = [str(_SUPPORT / "site"), str(_SUPPORT.parent), os.environ.get("PYTHONPATH")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "NXD_CPU_MODE": "1",
        "NXDI_DEEPSEEK_VLLM_CPU": "1",
    }


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    os.execvpe(sys.argv[1], sys.argv[1:], environment())

"""What a comparison must reach. A gates file is JSON with any of these names and a bound for each:

{"top1_agreement": 0.95, "kl_max": 0.1}
"""

import json
from pathlib import Path

from ..errors import ConfigError

# Metric -> whether the bound is the least ("min") or the most ("max") that passes.
DIRECTIONS = {
    "top1_exact": "min",
    "top1_agreement": "min",
    "top5_agreement": "min",
    "max_difference": "max",
    "mean_difference": "max",
    "kl_mean": "max",
    "kl_max": "max",
    "pearson": "min",
    "nxdi_passed": "min",
    "decode_prefill_top1": "min",
    "decode_prefill_max_difference": "max",
}

# Without a gates file. float32: rounding, with a factor of some tens; choices may differ in ties only. bfloat16: at
# most one token in ten differs (TT-Metal's gate for DeepSeek-V3), KL as MaxText bounds it for the 671B model.
DEFAULTS = {
    "float32": {
        "top1_agreement": 1.0,
        "top5_agreement": 1.0,
        "max_difference": 1e-3,
        "kl_max": 1e-6,
        "pearson": 0.99999,
        "nxdi_passed": 1.0,
        "decode_prefill_top1": 1.0,
        "decode_prefill_max_difference": 1e-3,
    },
    "bfloat16": {"top1_exact": 0.9, "top5_agreement": 0.98, "kl_mean": 0.1, "decode_prefill_top1": 0.9},
}


def read_gates(path: str | Path) -> dict[str, float]:
    """Raises ConfigError for a file that is no JSON object of known names and numbers."""
    try:
        gates = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(gates, dict):
        raise ConfigError(f"{path}: holds no JSON object; write {{'top1_agreement': 0.95}} in JSON")
    for name, bound in gates.items():
        if name not in DIRECTIONS:
            raise ConfigError(f"{path}: {name} is no gate; the gates are {', '.join(DIRECTIONS)}")
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            raise ConfigError(f"{path}: {name}: {bound!r} must be a number")
    return gates


def failed_gates(metrics: dict[str, float | None], gates: dict[str, float]) -> dict[str, str]:
    """Gate -> why it fails, for those that do. NaN fails every gate; what was not measured (None) fails none."""
    failed = {}
    for name, bound in gates.items():
        value = metrics[name]
        if value is None:
            continue
        if not (value >= bound if DIRECTIONS[name] == "min" else value <= bound):
            failed[name] = f"{value:.3g} {'below' if DIRECTIONS[name] == 'min' else 'above'} {bound:g}"
    return failed

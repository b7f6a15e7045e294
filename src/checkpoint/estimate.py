"""What sharding will take: bytes from the layout, time from doing a little of it."""

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path

from ..errors import CheckpointError
from .decoder import UnitDecoder
from .folder import Checkpoint
from .parallel import run_threads, thread_count
from .plan import ShardPlan, make_plans
from .reader import CheckpointReader

_PROBE_SECONDS = 3.0


@dataclass(frozen=True)
class ShardEstimate:
    """Bytes, and bytes per second of the output. file_bytes: of one file of the model itself. free: on the disk."""

    files: int
    file_bytes: int
    bytes: int
    free: int
    source_bytes: int
    rate: float
    probed: int


def estimate_sharding(
    model_dir: str | Path,
    out_dir: str | Path,
    tp_degree: int,
    dtype: str,
    ranks: Sequence[int],
    jobs: int | None = None,
    with_mtp: bool = False,
    weights: str = "bf16",
    fused: bool = False,
) -> ShardEstimate:
    """Checks the checkpoint as shard_checkpoint does, then writes for some seconds to a file that vanishes."""
    jobs = thread_count(jobs)
    folder = next(path for path in (Path(out_dir).absolute(), *Path(out_dir).absolute().parents) if path.exists())
    with Checkpoint(model_dir) as checkpoint:
        reader, plans = checkpoint.reader, make_plans(checkpoint, out_dir, tp_degree, dtype, with_mtp, weights, fused)
        probed, seconds = _probe(plans[0], reader, ranks, jobs, folder)
        source_bytes = sum(entry.nbytes for entry in reader.entries.values())
    return ShardEstimate(
        files=len(plans) * len(ranks),
        file_bytes=plans[0].file_bytes,
        bytes=len(ranks) * sum(plan.file_bytes for plan in plans),
        free=shutil.disk_usage(folder).free,
        source_bytes=source_bytes,
        rate=probed / seconds,
        probed=probed,
    )


def _probe(
    plan: ShardPlan, reader: CheckpointReader, ranks: Sequence[int], jobs: int, folder: Path
) -> tuple[int, float]:
    """(bytes, seconds) of making and writing units from all over the model, until the time is up."""
    decoder = UnitDecoder(reader, plan.config, plan.dtype, plan.tp_degree, ranks)
    start = time.monotonic()
    # Far apart, so that the mix of experts and the rest is about right however few there is time for.
    step = max(1, round(len(plan.units) * 0.382))
    while gcd(step, len(plan.units)) > 1:
        step += 1
    order = (i * step % len(plan.units) for i in range(len(plan.units)))
    in_time = (i for i in order if time.monotonic() - start < _PROBE_SECONDS)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:

            def write(i: int) -> int:
                for made in decoder.regions(plan.units[i]):
                    for _, _, bits in (*plan.placed(plan.units[i], made),) * len(made.ranks):
                        os.write(file.fileno(), memoryview(bits).cast("B"))
                return plan.unit_output_bytes(i, ranks)

            probed = sum(run_threads(in_time, write, min(jobs, decoder.affordable_jobs(plan.units))))
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
    return probed, time.monotonic() - start

"""Runs of the sharder that end badly, in processes of their own."""

import multiprocessing
import os
import resource
import signal
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

from nxdi_deepseek.checkpoint import sharder

# Starting from a process that has everything imported takes milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pytest", "nxdi_deepseek.checkpoint.sharder", "support.warm_kernels"])
_TEST_FOLDER = Path(__file__).parents[1]


def start(function, *args):
    with patch.dict(os.environ, PYTHONPATH=f"{_TEST_FOLDER}:{os.environ.get('PYTHONPATH', '')}"):
        forkserver.ensure_running()
    process = _CONTEXT.Process(target=function, args=args)
    process.start()
    return process


def shard_and_tell(model_dir, out_dir, tp_degree, piece, connection):
    """With a journal entry for every unit, not every some seconds. Says when `piece` units are done, and goes on."""
    done = 0

    def progress(*_):
        nonlocal done
        done += 1
        if done == piece:
            connection.send(done)

    sharder.SYNC_SECONDS = 0.0
    sharder.shard_checkpoint(model_dir, out_dir, tp_degree, jobs=2, resume=True, progress=progress)
    connection.send(done)


def kill_at(piece, delay, *args):
    """Runs the sharder on args and kills it `delay` seconds after it has done `piece` units, in whatever it is then."""
    receiver, sender = pipe()
    process = start(shard_and_tell, *args, piece, sender)
    receiver.recv()
    time.sleep(delay)
    process.kill()
    process.join()


def shard_with_file_limit(model_dir, out_dir, tp_degree, limit, connection):
    """Sends the message of the error that a system refusing files beyond `limit` bytes leads to."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        sharder.shard_checkpoint(model_dir, out_dir, tp_degree)
    except Exception as error:
        connection.send((type(error).__name__, str(error)))


def shard_slowly(model_dir, out_dir, tp_degree, connection):
    """Says when it has begun, then takes its time."""

    def progress(*_):
        connection.send("begun")
        time.sleep(60)

    sharder.shard_checkpoint(model_dir, out_dir, tp_degree, progress=progress)


def peak_memory(model_dir, out_dir, tp_degree, ranks, connection):
    """Sends the process's peak RSS in bytes after sharding `ranks`."""
    sharder.shard_checkpoint(model_dir, out_dir, tp_degree, ranks=ranks)
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def pipe():
    return _CONTEXT.Pipe(duplex=False)

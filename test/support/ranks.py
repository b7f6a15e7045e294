"""Groups of processes, one per rank. A group takes longer to start than most of what it is asked for: it is kept for
the next that asks for the same, until `end_groups`."""

import importlib.util
import inspect
import multiprocessing
import os
import pathlib
import sys
import tempfile
import traceback
from multiprocessing import connection

import torch

_groups = {}
_SECONDS_TO_END = 10


def run(function, tp_degree, *args, initialize):
    """Calls function(*args) on every rank of a group of processes; returns the ranks' results in order.

    initialize(tp_degree, init_method) joins the process group, once. `function` stands at the top level of a file, such
    as a test module; arguments and results can be pickled. What a rank raises ends the group and is an AssertionError.
    """
    key = initialize, tp_degree
    if key not in _groups:
        _groups[key] = _Group(initialize, tp_degree)
    try:
        return _groups[key].call(function, args)
    except BaseException:
        _groups.pop(key).kill()
        raise


def end_groups():
    while _groups:
        _groups.popitem()[1].end()


class _Group:
    def __init__(self, initialize, tp_degree):
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(tp_degree):
            ours, theirs = context.Pipe()
            arguments = (rank, tp_degree, initialize, self._folder.name, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def call(self, function, args):
        # Named by file: pytest may know the test module by a name that the new processes cannot import.
        request = inspect.getsourcefile(function), function.__name__, args
        for pipe in self._pipes:
            pipe.send(request)
        waiting = dict(zip(self._pipes, range(len(self._pipes)), strict=True))
        while waiting:
            for pipe in connection.wait(list(waiting)):
                rank = waiting.pop(pipe)
                try:
                    error = pipe.recv()
                except EOFError:
                    error = "the process has ended"
                assert error is None, f"rank {rank}: {error}"
        return [
            torch.load(_result_path(self._folder.name, rank), weights_only=False) for rank in range(len(self._pipes))
        ]

    def end(self):
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(_SECONDS_TO_END)
        self.kill()

    def kill(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank, tp_degree, initialize, folder, pipe):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(tp_degree))
    try:
        initialize(tp_degree, init_method=f"file://{folder}/rendezvous")
        while request := pipe.recv():
            path, name, args = request
            torch.save(getattr(_module(path), name)(*args), _result_path(folder, rank))
            pipe.send(None)
    except BaseException:
        pipe.send(traceback.format_exc())
        return
    # A rank that leaves early takes its peers' connections with it.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _module(path):
    name = pathlib.Path(path).stem
    found = sys.modules.get(name)
    if found is None or getattr(found, "__file__", None) != path:
        spec = importlib.util.spec_from_file_location(name, path)
        found = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    return found


def _result_path(folder, rank):
    return os.path.join(folder, f"rank{rank}.pt")

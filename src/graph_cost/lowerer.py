"""Starts the process that lowers graphs, and talks to it."""

import json
import subprocess
import sys
from typing import Any

from ..errors import GraphCostError
from .count import GraphCost
from .patterns import Found
from .request import Request


class Lowerer:
    """A process that has torch_xla, NxD and NxDI imported. Use it in a `with` block, for one package."""

    def __enter__(self) -> "Lowerer":
        command = [sys.executable, "-m", f"{__package__}.lowering"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def cost(self, request: Request) -> GraphCost:
        """Raises GraphCostError where the graph cannot be lowered or counted."""
        return GraphCost.from_dict(self._ask("cost", request))

    def patterns(self, request: Request) -> list[Found]:
        """The kinds of instructions of a graph. Raises GraphCostError where it cannot be lowered."""
        return [Found(**item | {"places": tuple(item["places"])}) for item in self._ask("patterns", request)]

    def _ask(self, task: str, request: Request) -> Any:
        try:
            self._process.stdin.write(json.dumps([task, request.to_json()]) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):  # it ended, and said why on stderr
            raise GraphCostError(f"{request}: the lowering process failed") from None
        if "error" in answer:
            raise GraphCostError(f"{request}: {answer['error']}")
        return answer

"""Errors whose message is meant for the user: one line that names the culprit and the remedy."""


class DeepseekError(ValueError):
    """Base of every error caused by the user's input; the command line prints it without a traceback."""


class ConfigError(DeepseekError):
    """A config.json, NeuronConfig or argument that cannot work."""


class CheckpointError(DeepseekError):
    """A checkpoint folder, shard or tensor that cannot be loaded."""


class GraphCostError(DeepseekError):
    """A graph that cannot be lowered or counted."""


class DeviceGraphError(DeepseekError):
    """A device graph that cannot be lowered or executed, or a result that must not be used."""


_SHOWN_PROBLEMS = 20


def report_problems(what: str, problems: list[str]) -> None:
    """Raises one CheckpointError for all of `problems`, if there are any; `problems` of the error holds them all."""
    if problems:
        more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        error = CheckpointError(f"{what}: {'; '.join(problems[:_SHOWN_PROBLEMS])}{more}")
        error.problems = problems
        raise error

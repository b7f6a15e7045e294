"""Errors whose message is meant for the user: one line that names the culprit and the remedy."""


class DeepseekError(ValueError):
    """Base of every error caused by the user's input; the command line prints it without a traceback."""


class ConfigError(DeepseekError):
    """A config.json, NeuronConfig or argument that cannot work."""


class CheckpointError(DeepseekError):
    """A checkpoint folder, shard or tensor that cannot be loaded."""

"""What a rank's memory holds, and what fits on an instance: arithmetic on a ModelConfig, no model and no backend."""

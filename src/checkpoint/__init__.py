"""Reading, converting and laying out DeepSeek-V3 checkpoints."""

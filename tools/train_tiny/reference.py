"""transformers' DeepseekV3ForCausalLM in float32: the independent implementation that the goldens come from."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, DeepseekV3ForCausalLM


def load_reference(config, tensors):
    """The model from a config dict and float32 tensors under released names.

    It goes through a folder and `from_pretrained`, so that each transformers version applies its own renames. The
    quantization_config is left out (the tensors are dequantized) and so is the MTP layer, which transformers ignores.
    """
    config = {key: value for key, value in config.items() if key != "quantization_config"} | {"torch_dtype": "float32"}
    mtp = f"model.layers.{config['num_hidden_layers']}."
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if not name.startswith(mtp)}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        save_file(kept, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        model, report = DeepseekV3ForCausalLM.from_pretrained(
            folder,
            config=AutoConfig.from_pretrained(folder),
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    if any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ValueError(f"transformers did not load the checkpoint cleanly: {report}")
    return model.eval()

"""Tiny checkpoint folders with what the doors need besides weights: a tokenizer and a generation_config.json."""

import json

from nxdi_deepseek.checkpoint.synthetic import write_checkpoint
from nxdi_deepseek.example_configs import DEMO_CONFIG
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# float32, so that the reference has the very same weights; more than one dense, expert and dense-to-expert step.
CONFIG = {field: value for field, value in DEMO_CONFIG.items() if field != "quantization_config"} | {
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 0,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 72,
    "vocab_size": 1024,  # NxDI compares the 1000 largest logits
    "torch_dtype": "float32",
    "eos_token_id": None,  # generation stops at the length alone
}


def write_served_checkpoint(model_dir, **fields):
    """Writes a checkpoint whose token i is the word `wi` (0: `<pad>`, 1: `<eos>`). Returns its path as a string."""
    config = CONFIG | fields
    write_checkpoint(model_dir, config)
    write_tokenizer(model_dir, config["vocab_size"])
    return str(model_dir)


def write_tokenizer(model_dir, vocab_size):
    """And a generation_config.json."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(model_dir)
    (model_dir / "generation_config.json").write_text(json.dumps({"do_sample": False, "pad_token_id": 0}))


def words(tokens):
    """The text of token ids."""
    return " ".join(f"w{token}" for token in tokens)

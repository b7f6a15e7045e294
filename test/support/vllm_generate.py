"""Offline generation with vLLM, in its own environment: reads a JSON job from stdin, writes the tokens to `output`.

{"engine": {arguments of vllm.LLM}, "prompts": [[token, ...], ...], "new_tokens": n, "output": path}. With prefix
caching, the number of tokens of each prompt that were found in the cache goes to `output`.cached.
"""

import json
import pathlib
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    job = json.load(sys.stdin)
    llm = LLM(skip_tokenizer_init=True, **job["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling)
    pathlib.Path(job["output"]).write_text(json.dumps([output.outputs[0].token_ids for output in outputs]))
    if job["engine"].get("enable_prefix_caching"):
        cached = [output.num_cached_tokens for output in outputs]
        pathlib.Path(job["output"]).with_suffix(".cached").write_text(json.dumps(cached))

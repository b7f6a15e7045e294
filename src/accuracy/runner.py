"""Runs the model through its serving path, and compares all that it says with golden outputs.

A batch of prompts goes into the cache, then a token of each at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend
from ..application import NeuronDeepseekV3ForCausalLM
from ..dtypes import dtype_name
from ..errors import ConfigError
from .comparison import Comparison, compare
from .metrics import coarser
from .recording import Entry, Recording, Rule, dimensions
from .tracing import Findings, attention_hooks, compare_traces, hooks


class Runner:
    """The sequences of a batch in the cache slots of a model on either backend.

    trace: None, or a dict that each step extends, stage -> `i.POINT` -> parts [S, width] (see joined_trace).
    """

    def __init__(self, model: Any):
        self.model = model
        self.lengths: list[int] = []
        self.trace: dict[str, dict[str, list[Tensor]]] | None = None

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Starts a sequence for each prompt; float32 logits [B, V] after it."""
        width = max(map(len, prompts))
        pad = self.model.config.pad_token_id
        ids = torch.tensor([prompt + [pad] * (width - len(prompt)) for prompt in prompts])
        mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
        self.lengths = [len(prompt) for prompt in prompts]
        self.model.reset()
        return self._run(ids, self.lengths, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).where(mask > 0, 1))

    def decode(self, tokens: list[int]) -> Tensor:
        """One more token in each sequence; float32 logits [B, V]."""
        positions = torch.tensor(self.lengths)[:, None]
        self.lengths = [length + 1 for length in self.lengths]
        return self._run(torch.tensor(tokens)[:, None], [1] * len(tokens), position_ids=positions)

    @torch.no_grad()
    def _run(self, ids: Tensor, used: list[int], **inputs: Tensor) -> Tensor:
        with self._tracing(used):
            return self.model(input_ids=ids, seq_ids=torch.arange(len(ids)), **inputs).logits[:, -1].float().clone()

    @contextmanager
    def _tracing(self, used: list[int]) -> Iterator[None]:
        """Appends what the modules give in a step to `trace`: the first `used` positions of each sequence."""
        if self.trace is None:
            yield
            return

        def put(stage: str, point: str, value: Tensor) -> None:
            value = value.reshape(len(used), -1, value.shape[-1]).float()
            for i, length in enumerate(used):
                self.trace.setdefault(stage, {}).setdefault(f"{i}.{point}", []).append(value[i, :length].clone())

        with hooks([handle for module in decoder_modules(self.model) for handle in _hook_model(module, put)]):
            yield


def decoder_modules(model: Any) -> set[nn.Module]:
    """The decoder stacks behind a causal LM on the CPU: one, or NxDI's for prompts and for decoding."""
    if backend.NAME == "nxdi":
        return {wrapper.model for wrapper in model.models}
    return {model.model}


def teacher_forced(runner: Runner, entries: list[Entry]) -> list[Tensor]:
    """The logits [T, V] that follow each prompt and each of its tokens but the last, prompts and tokens as given."""
    steps = max(len(entry.tokens) for entry in entries)
    rows = [runner.prefill([entry.prompt for entry in entries])]
    for step in range(steps - 1):
        rows.append(runner.decode([entry.tokens[min(step, len(entry.tokens) - 1)] for entry in entries]))
    logits = torch.stack(rows, dim=1)
    return [logits[i, : len(entry.tokens)] for i, entry in enumerate(entries)]


def prefilled(runner: Runner, entries: list[Entry]) -> list[Tensor]:
    """The same logits, each from a prompt that holds all tokens before it: nothing is decoded."""
    steps = max(len(entry.tokens) for entry in entries)
    rows = [runner.prefill([entry.prompt + entry.tokens[:step] for entry in entries]) for step in range(steps)]
    logits = torch.stack(rows, dim=1)
    return [logits[i, : len(entry.tokens)] for i, entry in enumerate(entries)]


def free_run(runner: Runner, entries: list[Entry], rule: Rule) -> list[list[int]]:
    """The model's own greedy tokens, as many as the entries have."""
    logits = runner.prefill([entry.prompt for entry in entries])
    tokens: list[list[int]] = [[] for _ in entries]
    for step in range(rule.max_new_tokens):
        for own, row in zip(tokens, logits, strict=True):
            own.append(rule.choose(row, step))
        if step + 1 < rule.max_new_tokens:
            logits = runner.decode([own[-1] for own in tokens])
    return [own[: len(entry.tokens)] for own, entry in zip(tokens, entries, strict=True)]


def joined_trace(runner: Runner, entries: list[Entry]) -> dict[str, dict[str, Tensor]]:
    """The trace of a teacher-forced run, as a golden recording has it: stage -> `i.POINT` -> [S, width]."""
    limits = [len(entry.prompt) + len(entry.tokens) - 1 for entry in entries]
    return {
        stage: {name: torch.cat(parts)[: limits[int(name.partition(".")[0])]] for name, parts in points.items()}
        for stage, points in runner.trace.items()
    }


def _hook_model(model: nn.Module, put: Any) -> Iterator[Any]:
    yield model.embed_tokens.register_forward_hook(lambda _, __, out: put("embed_tokens", "embedding", out))
    yield model.norm.register_forward_hook(lambda _, __, out: put("norm", "norm", out))
    for number, layer in enumerate(model.layers):
        yield from _hook_layer(layer, lambda point, value, stage=f"layers.{number}": put(stage, point, value))


def _hook_layer(layer: nn.Module, put: Any) -> Iterator[Any]:
    def output(module: nn.Module, point: str, pick: Any = lambda out: out) -> Any:
        return module.register_forward_hook(lambda _, __, out: put(point, pick(out)))

    def first(out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out

    yield output(layer.input_layernorm, "input_layernorm")
    yield from attention_hooks(layer.self_attn, put)
    yield output(layer.self_attn, "self_attn.k_pe", lambda out: out[1][0])
    yield output(layer.post_attention_layernorm, "post_attention_layernorm")
    if layer.is_moe:
        router = layer.mlp.router
        yield output(router, "mlp.router.scores", lambda out: router.scores_for_choice(out[0]))
        yield output(router, "mlp.router.weights", lambda out: out[1])
        yield output(layer.mlp.expert_mlps, "mlp.experts", first)
        if layer.mlp.shared_experts is not None:
            yield output(layer.mlp.shared_experts, "mlp.shared_experts", first)
    yield output(layer.mlp, "mlp", first)
    if layer.post_mlp_layernorm is not None:
        yield output(layer.post_mlp_layernorm, "post_mlp_layernorm")
    yield output(layer, "output", first)


def evaluate(
    model: NeuronDeepseekV3ForCausalLM, golden: Recording, gates: dict[str, float], bisect: bool = False
) -> Comparison:
    """Runs a loaded model, on either backend, whose seq_len holds the golden prompts and tokens.

    bisect: also compare what every module gives with the trace of the golden recording, on the CPU and with all prompts
    in one batch. The modules of a compiled model cannot be seen. Raises ConfigError.
    """
    run = record(model, golden)
    whole = _in_batches(model, golden.entries, prefilled)
    findings = trace_findings(model, golden) if bisect else None
    return compare(golden, run, gates, whole, findings)


def record(model: NeuronDeepseekV3ForCausalLM, golden: Recording) -> Recording:
    """What the model says where it is given the golden tokens, and the tokens that it chooses itself."""
    rule = golden.rule()
    own_tokens = _in_batches(model, golden.entries, lambda runner, entries: free_run(runner, entries, rule))
    entries = [replace(entry, own_tokens=own) for entry, own in zip(golden.entries, own_tokens, strict=True)]
    return Recording(
        source=backend.describe().removeprefix("backend: "),
        dtype=dtype_of(model),
        dimensions=dimensions(model.config.model),
        entries=entries,
        stop_tokens=golden.stop_tokens,
        min_new_tokens=golden.min_new_tokens,
        logits=_in_batches(model, golden.entries, teacher_forced),
    )


def trace_findings(model: NeuronDeepseekV3ForCausalLM, golden: Recording) -> Findings:
    entries, batch_size = golden.entries, model.neuron_config.batch_size
    if batch_size != len(entries):
        raise ConfigError(f"bisect needs batch_size {len(entries)}, the number of golden prompts, not {batch_size}")
    runner = Runner(model)
    runner.trace = {}
    teacher_forced(runner, entries)
    return compare_traces(golden, joined_trace(runner, entries).__getitem__, coarser(golden.dtype, dtype_of(model)))


def dtype_of(model: NeuronDeepseekV3ForCausalLM) -> str:
    return dtype_name(model.neuron_config.torch_dtype)


def _in_batches(
    model: NeuronDeepseekV3ForCausalLM, entries: list[Entry], run: Callable[[Runner, list[Entry]], list[Any]]
) -> list[Any]:
    """run(runner, entries) for batches of the model's size; the last is filled up with its last entry."""
    size, results = model.neuron_config.batch_size, []
    for start in range(0, len(entries), size):
        batch = entries[start : start + size]
        results += run(Runner(model), batch + batch[-1:] * (size - len(batch)))[: len(batch)]
    return results

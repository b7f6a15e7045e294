"""What is looked at inside a model, and where an error starts: the first point that rounding cannot explain.

The names are the same in Hugging Face's modules and in ours. A stage is `embed_tokens`, `layers.0` ... or `norm`; its
points follow the forward pass. Every value is [S, width], a row per position of a sequence.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..model_config import ModelConfig
from .metrics import TRACE_MARGIN, relative_error, row_errors
from .recording import Recording, stages

# Point -> what computes it, told to whoever looks for an error.
POINTS = {
    "embedding": "embedding",
    "input_layernorm": "norm before attention",
    "self_attn.q_proj": "query projection",
    "self_attn.q_b_proj": "query projections and the norm between them",
    "self_attn.kv_a_layernorm": "key/value down-projection and its norm: the cached latent",
    "self_attn.k_pe": "key/value down-projection, rotary embedding or positions: the cached rotary key",
    "self_attn.heads": "attention over heads: rotary embedding of queries, softmax scale, mask or kv_b_proj",
    "self_attn.o_proj": "output projection of attention",
    "post_attention_layernorm": "norm before the MLP",
    "mlp.router.scores": "router weight or correction bias",
    "mlp.router.weights": "choice of experts or their weights",
    "mlp.experts": "routed experts",
    "mlp.shared_experts": "shared experts",
    "mlp": "dense MLP, or sum of routed and shared experts",
    "post_mlp_layernorm": "norm after the experts",
    "output": "residual additions",
    "norm": "final norm",
}

_ROUTER = "mlp.router.weights"
_ATTENTION_MODULES = ("q_proj", "q_b_proj", "kv_a_layernorm", "o_proj")


@contextmanager
def hooks(handles: list) -> Iterator[None]:
    """Removes the hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attention_taps(attention: nn.Module, put: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls put(point, value [B, S, width]) for the projections of an attention module, Hugging Face's or ours."""
    with hooks(attention_hooks(attention, put)):
        yield


def attention_hooks(attention: nn.Module, put: Callable[[str, Tensor], None]) -> list:
    handles = []
    for name in _ATTENTION_MODULES:
        module = getattr(attention, name, None)
        if module is not None:
            point = f"self_attn.{name}"
            handles.append(module.register_forward_hook(lambda _, __, out, point=point: put(point, out)))
    before = attention.o_proj.register_forward_pre_hook(lambda _, args: put("self_attn.heads", args[0]))
    return [*handles, before]


def put(trace: dict[str, Tensor] | None, point: str, values: dict[int, Tensor]) -> None:
    """Adds the value of each sequence to a trace as `SEQUENCE.POINT`, in float32; nothing where none is asked for."""
    if trace is not None:
        trace.update((f"{i}.{point}", value.detach().float().contiguous()) for i, value in values.items())


def trace_width(config: ModelConfig) -> int:
    """Numbers that the traces of all stages hold for a position."""
    hidden, heads, experts = config.hidden_size, config.num_attention_heads, config.n_routed_experts
    head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = heads * head + config.kv_lora_rank + config.qk_rope_head_dim + 3 * hidden  # two norms and o_proj
    routed = 2 * experts + (2 if config.n_shared_experts else 1) * hidden
    routed += hidden if config.member.norm_after_experts else 0
    sparse = sum(config.has_experts(layer) for layer in range(config.num_hidden_layers))
    return 2 * hidden + config.num_hidden_layers * (attention + 2 * hidden) + sparse * routed


def interleave(k_pe: Tensor) -> Tensor:
    """Hugging Face keeps the rotated pairs as two halves [.., P]; DeepSeek as neighbours."""
    return k_pe.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


@dataclass
class Flip:
    """A token for which other experts were chosen. margin: by how much golden's biased scores prefer its own choice.
    kind: "a tie" where rounding may decide, "not a tie", or "after a tie" where the inputs differ because of one."""

    stage: str
    prompt: int
    position: int
    golden: list[int]
    ours: list[int]
    margin: float
    kind: str

    def __str__(self) -> str:
        return (
            f"{self.stage}: prompt {self.prompt}, position {self.position}: experts {self.ours} instead of "
            f"{self.golden} (margin {self.margin:.1e}, {self.kind})"
        )


@dataclass
class Origin:
    """The first point out of tolerance, at its worst prompt and position. experts: those that all bad tokens chose and
    no good one did, where the point is the experts' output."""

    stage: str
    point: str
    prompt: int
    position: int
    error: float
    tolerance: float
    tokens: int
    experts: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.stage if self.stage in ("embed_tokens", "norm") else f"{self.stage}.{self.point}"

    def __str__(self) -> str:
        which = f"; only tokens of expert {', '.join(map(str, self.experts))}" if self.experts else ""
        return (
            f"{self.name} ({POINTS[self.point]}): relative error {self.error:.1e} exceeds {self.tolerance:.1e} for "
            f"{self.tokens} tokens, worst at prompt {self.prompt}, position {self.position}{which}"
        )


@dataclass
class Findings:
    """origin: None where the traces agree. growth: the worst relative error of each stage's output."""

    origin: Origin | None = None
    flips: list[Flip] = field(default_factory=list)
    growth: list[tuple[str, float]] = field(default_factory=list)


def compare_traces(golden: Recording, ours: Callable[[str], dict[str, Tensor]], dtype: str) -> Findings:
    """golden: a recording with a trace; ours: gives `i.POINT` -> [S, width] for a stage; dtype: the coarser of the two.

    A token that a tie sends to other experts is not judged from there on, nor is what attends to it in later stages:
    both are right. Raises ConfigError where ours has other positions or modules.
    """
    findings, sizes = Findings(), golden.dimensions
    prompts = range(len(golden.entries))
    judged: dict[int, int | None] = dict.fromkeys(prompts)  # rows up to here are judged, None: all
    for number, stage in enumerate(stages(sizes)):
        expected, actual = golden.trace(stage), ours(stage)
        _check_same(stage, expected, actual)
        tolerance = TRACE_MARGIN * relative_error(dtype, number, sizes["hidden_size"])
        points = [point for point in POINTS if f"0.{point}" in expected]
        errors = {p: {i: row_errors(expected[f"{i}.{p}"], actual[f"{i}.{p}"]) for i in prompts} for p in points}
        findings.growth.append((stage, max(float(rows.max()) for rows in errors[points[-1]].values())))
        errors = {p: {i: rows[: judged[i]] for i, rows in by_prompt.items()} for p, by_prompt in errors.items()}
        if _ROUTER in points:
            flips = _flips(stage, sizes, judged, expected, actual, tolerance)
            _excuse_ties(flips, errors, judged)
            findings.flips += flips
        findings.origin = findings.origin or _first_origin(stage, errors, tolerance, expected)
    return findings


def _excuse_ties(flips: list[Flip], errors: dict[str, dict[int, Tensor]], judged: dict[int, int | None]) -> None:
    points = list(errors)
    for flip in flips:
        if flip.kind == "a tie":
            for point in points[points.index(_ROUTER) :]:
                errors[point][flip.prompt][flip.position] = 0
            limit = judged[flip.prompt]
            judged[flip.prompt] = flip.position if limit is None else min(limit, flip.position)


def _check_same(stage: str, expected: dict[str, Tensor], actual: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        if name not in actual or actual[name].shape != tensor.shape:
            what = list(actual[name].shape) if name in actual else "missing"
            raise ConfigError(
                f"trace of {stage}: {name}: {what}, golden has {list(tensor.shape)}; were the tokens others?"
            )


def _first_origin(
    stage: str, errors: dict[str, dict[int, Tensor]], tolerance: float, expected: dict[str, Tensor]
) -> Origin | None:
    for point, by_prompt in errors.items():
        by_prompt = {i: rows for i, rows in by_prompt.items() if len(rows)}
        prompt = max(by_prompt, key=lambda i: float(by_prompt[i].max()), default=None)
        worst = 0.0 if prompt is None else float(by_prompt[prompt].max())
        if worst > tolerance:
            position = int(by_prompt[prompt].argmax())
            tokens = sum(int((rows > tolerance).sum()) for rows in by_prompt.values())
            experts = _suspects(by_prompt, tolerance, expected) if point == "mlp.experts" else []
            return Origin(stage, point, prompt, position, worst, tolerance, tokens, experts)
    return None


def _suspects(errors: dict[int, Tensor], tolerance: float, expected: dict[str, Tensor]) -> list[int]:
    bad = torch.cat([rows > tolerance for rows in errors.values()])
    chosen = torch.cat([expected[f"{i}.{_ROUTER}"][: len(rows)] != 0 for i, rows in errors.items()])
    return (chosen[bad].all(0) & ~chosen[~bad].any(0)).nonzero().flatten().tolist()


def _flips(
    stage: str,
    sizes: dict[str, int],
    judged: dict[int, int | None],
    expected: dict[str, Tensor],
    actual: dict[str, Tensor],
    tolerance: float,
) -> list[Flip]:
    flips = []
    for i, limit in judged.items():
        golden, ours = (trace[f"{i}.{_ROUTER}"] != 0 for trace in (expected, actual))
        scores = expected[f"{i}.mlp.router.scores"]
        for position in (golden != ours).any(-1).nonzero().flatten().tolist():
            chosen, row = (golden[position], ours[position]), scores[position]
            margin = flip_margin(row, *chosen, sizes["n_group"], sizes["topk_group"])
            is_tie = abs(margin) <= tolerance * float(row.abs().max())
            kind = "after a tie" if limit is not None and position >= limit else "a tie" if is_tie else "not a tie"
            experts = (experts.nonzero().flatten().tolist() for experts in chosen)
            flips.append(Flip(stage, i, position, *experts, margin, kind))
    return flips


def flip_margin(scores_E: Tensor, golden_E: Tensor, ours_E: Tensor, n_group: int, topk_group: int) -> float:
    """By how much biased scores prefer golden's choice (bool) to ours: of groups, where ours takes another one, else
    of experts. Infinity where ours chose no other expert, only fewer."""
    dropped, taken = golden_E & ~ours_E, ours_E & ~golden_E
    if not (taken.any() and dropped.any()):
        return float("inf")
    groups = scores_E.unflatten(0, (n_group, -1))
    ratings = groups.topk(min(2, groups.shape[1]), dim=-1).values.sum(-1)
    allowed = torch.zeros(n_group, dtype=torch.bool).scatter(0, ratings.topk(topk_group).indices, True)
    foreign = taken.unflatten(0, (n_group, -1)).any(-1) & ~allowed
    if foreign.any():
        return float(ratings[allowed].min() - ratings[foreign].min())
    return float(scores_E[dropped].max() - scores_E[taken].min())

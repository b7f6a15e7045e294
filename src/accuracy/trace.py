"""What is looked at inside a model, under the same names in Hugging Face's modules and in ours.

A stage is `embed_tokens`, `layers.0` ... or `norm`. Its points follow the forward pass; the first one that is wrong is
where an error starts. Every value is [S, width], a row per position of a sequence.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

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
    "output": "residual additions",
    "norm": "final norm",
}

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


def interleave(k_pe: Tensor) -> Tensor:
    """Hugging Face keeps the rotated pairs as two halves [.., P]; DeepSeek as neighbours."""
    return k_pe.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

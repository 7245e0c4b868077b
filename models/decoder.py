"""What decoders of the Llama family share: fields of configurations, state, layers, grouped-query attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tensorgraph.errors import FormatError
from tensorgraph.graph import Graph, Node
from tensorgraph.models.blocks import embed, feed_forward, flatten, head, heads, norm
from tensorgraph.models.builder import Builder
from tensorgraph.models.config import MOST_LAYERS, RopeScaling, by_layer, from_gguf
from tensorgraph.models.names import Made, made_of_layers
from tensorgraph.ops import flash_attn, rope
from tensorgraph.ops.position import llama3_freq_factors, yarn_freq_factors
from tensorgraph.source import hide_source
from tensorgraph.state import StateSpec

hide_source(__file__)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Fields as published; sizes in elements."""

    vocab_size: int = from_gguf("vocab_size")
    hidden_size: int = from_gguf("embedding_length")
    intermediate_size: int = from_gguf("feed_forward_length")
    num_hidden_layers: int = from_gguf("block_count", most=MOST_LAYERS)
    num_attention_heads: int = from_gguf("attention.head_count")
    num_key_value_heads: int | None = from_gguf("attention.head_count_kv", None)
    head_dim: int | None = from_gguf("attention.key_length", None, also=("attention.value_length",))
    max_position_embeddings: int = from_gguf("context_length")
    rms_norm_eps: float = from_gguf("attention.layer_norm_rms_epsilon")
    rope_theta: float = from_gguf("rope.freq_base", 10000.0)
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False  # of published checkpoints; a GGUF file then has no output weight

    @property
    def n_head_kv(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def window(self, layer: int) -> int | None:
        """How many positions back a layer looks; None: to the first."""
        return None


@dataclass(frozen=True, kw_only=True)
class WindowedConfig(DecoderConfig):
    """Some layers see a window alone: those that `layer_types` names, or `slides` says where it is empty, as in GGUF files."""

    sliding_window: int = from_gguf("attention.sliding_window")
    layer_types: tuple[Literal["sliding_attention", "full_attention"], ...] = by_layer(lambda c: c.types())

    def __post_init__(self) -> None:
        if self.layer_types and len(self.layer_types) < self.num_hidden_layers:
            given = f"{len(self.layer_types)} for {self.num_hidden_layers} layers"
            raise FormatError(f"[config] layer_types must have one for each layer; got {given}")

    def slides(self, layer: int) -> bool:
        raise NotImplementedError

    def types(self) -> tuple[str, ...]:
        """Of each layer."""
        every = range(self.num_hidden_layers)
        return self.layer_types or tuple("sliding_attention" if self.slides(i) else "full_attention" for i in every)

    def window(self, layer: int) -> int | None:
        return self.sliding_window if self.types()[layer] == "sliding_attention" else None


def names(c: DecoderConfig) -> dict[str, Made]:
    """Where a published checkpoint holds what the graph is built with."""
    return made_of_layers(c.num_hidden_layers, tied=c.tie_word_embeddings)


def states(c: DecoderConfig) -> dict[str, StateSpec]:
    """Keys and values of every layer, as long as its window sees them."""
    shape = c.n_head_kv, c.head_size
    return {f"blk.{i}.{name}": StateSpec(shape, keep=c.window(i)) for i in range(c.num_hidden_layers) for name in ("k", "v")}


def decode(
    g: Builder,
    c: DecoderConfig,
    attention: Callable[[Builder, Node, int], Node],
    mix: Callable[[Builder, Node], Node] | None = None,
) -> Graph:
    """Layers of attention and a feed-forward, each after a norm and added to what it reads, between embeddings and head.

    Args:
        attention: `(scope, normed x [T, D], layer) -> [T, D]`.
        mix: what stands in place of the gated feed-forward.
    """
    x = embed(g, c.vocab_size, c.hidden_size)  # [T, D]
    for i in range(c.num_hidden_layers):
        b = g.block(i)
        x = x + attention(b, norm(b, "attn_norm", x, c.rms_norm_eps), i)
        y = norm(b, "ffn_norm", x, c.rms_norm_eps)
        x = b.tap("out", x + (feed_forward(b, y, c.intermediate_size) if mix is None else mix(b, y)))
    return g.finish(head(g, x, c.vocab_size, c.rms_norm_eps))


def queries_keys_values(g: Builder, x: Node, c: DecoderConfig, *, qk_norm: bool = False) -> tuple[Node, Node, Node]:
    """By heads, and with `qk_norm` queries and keys RMS-normed within each. Shapes: [T, D] -> [T, H | Hkv | Hkv, Dh]."""
    q = heads(g.linear("attn_q", x, c.num_attention_heads * c.head_size), c.num_attention_heads)
    k = heads(g.linear("attn_k", x, c.n_head_kv * c.head_size), c.n_head_kv)
    v = heads(g.linear("attn_v", x, c.n_head_kv * c.head_size), c.n_head_kv)
    if qk_norm:
        q, k = norm(g, "attn_q_norm", q, c.rms_norm_eps), norm(g, "attn_k_norm", k, c.rms_norm_eps)
    return q, k, v


def attend(
    g: Builder,
    q: Node,
    k: Node,
    v: Node,
    c: DecoderConfig,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: Node | None = None,
) -> Node:
    """Attention to the rows so far and these, and the projection of what it gives; `scale` is `Dh**-0.5` where not given.

    Shapes: q [T, H, Dh], k, v [T, Hkv, Dh], sinks [H] -> [T, D].
    """
    k, v = g.append("k", k), g.append("v", v)  # [S, Hkv, Dh]
    seen = g.segment("k", k, v, window=window)
    scale = c.head_size**-0.5 if scale is None else scale
    o = flash_attn(q, seen, scale=scale, sinks=sinks, pos=g.positions, seq=g.seqs)  # [T, H, Dh]
    return g.linear("attn_output", g.tap("attn_out", flatten(o)), c.hidden_size)


def rotate(
    g: Builder, x: Node, scaling: RopeScaling, *, base: float, n_dims: int | None = None, layout: str = "half_split"
) -> Node:
    """Rotary positions, of the first `n_dims` channels where given. Shapes: [T, H, Dh] -> [T, H, Dh].

    Args:
        layout: which channels are pairs: `half_split`, i and i + n_dims / 2, or `interleaved`, neighbours.
    """
    width = x.shape[-1]
    assert isinstance(width, int)
    n_dims = n_dims or width
    magnitude = scaling.magnitude if scaling.rope_type == "yarn" else 1.0
    if scaling.rope_type == "yarn" and not scaling.truncate:
        fast, slow, original = scaling.beta_fast, scaling.beta_slow, scaling.original_max_position_embeddings
        ramp = g.literal("rope_freqs", yarn_freq_factors(n_dims, base, scaling.factor, fast, slow, original))
        return rope(x, g.positions, ramp, n_dims=n_dims, base=base, layout=layout, magnitude=magnitude)
    factors = g.root.optional("rope_freqs.weight", n_dims // 2)
    if factors is None and scaling.rope_type == "llama3":
        original = scaling.original_max_position_embeddings
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        factors = g.literal("rope_freqs", llama3_freq_factors(n_dims, base, scaling.factor, low, high, original))
    stretch = 1.0 / scaling.factor if scaling.rope_type in ("linear", "yarn") else 1.0
    yarn: dict[str, Any] = {}
    if scaling.rope_type == "yarn":
        yarn = {"ext_factor": 1.0, "beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        yarn |= {"magnitude": magnitude, "original_context": scaling.original_max_position_embeddings}
    return rope(x, g.positions, factors, n_dims=n_dims, base=base, layout=layout, freq_scale=stretch, **yarn)

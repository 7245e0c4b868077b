"""The planted mistakes, in groups that run one after another; the groups run beside each other."""

from __future__ import annotations

from tests.models.mistakes.decoders import DECODERS
from tests.models.mistakes.deepseek import ROUTERS_AND_MLA, SPARSE
from tests.models.mistakes.deepseek_v4 import COMPRESSION, STREAMS_AND_EXPERTS
from tests.models.mistakes.encoders import ENCODERS
from tests.models.mistakes.llama import LLAMA
from tests.models.mistakes.ops import OPS
from tests.models.mistakes.state import STATE
from tests.models.planting import Mistake

GROUPS: dict[str, tuple[Mistake, ...]] = {
    "llama and sessions": LLAMA,
    "Qwen and Gemma": DECODERS,
    "routers and latent attention": ROUTERS_AND_MLA,
    "sparse attention": SPARSE,
    "V4's attention": COMPRESSION,
    "V4's streams and experts": STREAMS_AND_EXPERTS,
    "encoders": ENCODERS,
    "ops": OPS,
    "state": STATE,
}

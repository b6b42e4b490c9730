"""Networks of real models, how many tokens they compute, and the methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ...runs.checks import check_at_least, check_one_of
from ...runs.records import Json

# What transformers calls its ways to compute experts.
EXPERTS = ("eager", "batched_mm", "grouped_mm")
# One of this many neurons is kept; of experts, in each of them.
SHARES = (12, 4)
OURS = {f"topk-{share}": share for share in SHARES}
# A step of a way that moves more than this is left out, and the table says how much it would be.
_MOST_GIB = 32.0
_LEAST_SIZE = 48


class Network(NamedTuple):
    """
    name    what tables call it
    model   class of transformers, whose configuration has the sizes by default
    tokens  besides one at a time
    sizes   fields of the configuration that differ from its defaults
    d_ff    field that holds the neurons, of an expert where there are several
    experts, experts_per_token  fields that hold their numbers; none where there is one network
    """

    name: str
    model: str
    tokens: int
    sizes: Mapping[str, int] = {}
    d_ff: str = "intermediate_size"
    experts: str = ""
    experts_per_token: str = "num_experts_per_tok"


NETWORKS = {
    "mixtral-8x7b": Network("Mixtral-8x7B", "MixtralModel", 256, experts="num_local_experts"),
    "qwen3-30b-a3b": Network("Qwen3-30B-A3B", "Qwen3MoeModel", 1024, {}, "moe_intermediate_size", "num_experts"),
    "gpt-oss-20b": Network("gpt-oss-20b", "GptOssModel", 512, {"num_local_experts": 32}, experts="num_local_experts"),
    "olmoe-1b-7b": Network("OLMoE-1B-7B", "OlmoeModel", 1024, {"intermediate_size": 1024}, experts="num_experts"),
    "phi3-mini": Network("Phi-3-mini", "Phi3Model", 512),
    "glm4-9b": Network("GLM-4-9B", "Glm4Model", 256),
    "modernbert-base": Network("ModernBERT-base", "ModernBertModel", 4096),
}


@dataclass(frozen=True)
class Work:
    """The network of one layer of a model.

    network  among `NETWORKS`
    tokens   how many it computes; of one token the forward pass alone is timed
    shrink   the sizes of a token and of the network are divided by this, for a trial
    experts  at most this many, for a check
    """

    network: str
    tokens: Sequence[int] = field(default=())
    shrink: int = 1
    experts: int | None = None

    def __post_init__(self) -> None:
        check_one_of(list(NETWORKS), self, "network")
        object.__setattr__(self, "tokens", tuple(self.tokens) or (1, self.about.tokens))
        check_at_least(1, self, "shrink")
        if min(self.tokens) < 1:
            raise ValueError(f"tokens must be at least 1, got {min(self.tokens)}")

    def as_record(self) -> Json:
        return asdict(self) | {"tokens": list(self.tokens)}

    @property
    def about(self) -> Network:
        return NETWORKS[self.network]

    @property
    def config(self) -> Any:
        """Of a model with one layer and hardly a vocabulary."""
        import transformers

        about = self.about
        kind = getattr(transformers, about.model).config_class
        sizes = {"hidden_size": kind().hidden_size, about.d_ff: getattr(kind(), about.d_ff)} | dict(about.sizes)
        shrunk = {
            name: self._shrunk(size) if name in ("hidden_size", about.d_ff) else size for name, size in sizes.items()
        }
        if self.experts is not None and about.experts:
            shrunk[about.experts] = self.experts
            shrunk[about.experts_per_token] = 2
        # Attention is not computed: one head.
        few = {"num_hidden_layers": 1, "vocab_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
        return kind(**shrunk, **few, pad_token_id=0, bos_token_id=1, eos_token_id=2)

    def _shrunk(self, size: int) -> int:
        """grouped_mm takes rows of whole vectors alone, and the least k should be above 1."""
        return size if self.shrink == 1 else max(_LEAST_SIZE, size // self.shrink // 16 * 16)

    @property
    def d_model(self) -> int:
        return self.config.hidden_size

    @property
    def d_ff(self) -> int:
        return getattr(self.config, self.about.d_ff)

    @property
    def num_experts(self) -> int:
        """1 where there is one network for all tokens."""
        return getattr(self.config, self.about.experts) if self.about.experts else 1

    @property
    def experts_per_token(self) -> int:
        return getattr(self.config, self.about.experts_per_token) if self.about.experts else 1

    @property
    def rivals(self) -> tuple[str, ...]:
        return EXPERTS if self.about.experts else ("dense",)

    @property
    def weights_gib(self) -> float:
        """Of all experts, in float32."""
        return self.num_experts * self._of_an_expert_gib

    @property
    def _of_an_expert_gib(self) -> float:
        return 4 * 3 * self.d_model * self.d_ff / 2**30

    def k(self, method: str) -> int:
        """Neurons kept by a method of ours, of each expert."""
        return self.d_ff // OURS[method]

    def why_not(self, method: str, tokens: int, mode: str) -> str | None:
        """Why a method is not measured; None where it is."""
        gathered_gib = tokens * self.experts_per_token * self._of_an_expert_gib
        if method == "batched_mm" and gathered_gib > _MOST_GIB / 8:
            return f"it would copy the weights of every token's experts, {gathered_gib:,.0f} GiB"
        written_gib = self.num_experts * self.weights_gib
        if method == "eager" and mode == "forward_backward" and written_gib > _MOST_GIB:
            return f"it would write a gradient of all weights for every expert, {written_gib:,.0f} GiB"
        return None

    def __str__(self) -> str:
        experts = f", {self.num_experts} experts, {self.experts_per_token} a token" if self.about.experts else ""
        shrunk = f", shrunk by {self.shrink}" if self.shrink > 1 else ""
        return f"{self.about.name}: d_model = {self.d_model:,}, d_ff = {self.d_ff:,}{experts}{shrunk}"

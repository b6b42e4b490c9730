"""One sequence over many processes: each holds a part of the tokens, and attention is that of one process.

spans.py      which tokens each process holds
shards.py     the tokens of this process, and all of them again
ranks.py      the processes, and what they send to one another, with its gradient
agreement.py  what the processes tell one another before a call, so that all raise or none
attention.py  the operation
cost.py       what it sends and keeps, on paper
batches.py    shards of a model's inputs, and the loss
models.py     the context in which a converted model holds shards

Nothing here knows transformers; `convert` asks `models.py` whether a layer's model holds shards.
"""

from .attention import sequence_parallel_attention
from .batches import sequence_loss, shard_batch
from .cost import SequenceParallelCost, sequence_parallel_cost
from .models import sequence_parallel
from .shards import sequence_positions, shard_sequence, unshard_sequence

__all__ = [
    "SequenceParallelCost",
    "sequence_loss",
    "sequence_parallel",
    "sequence_parallel_attention",
    "sequence_parallel_cost",
    "sequence_positions",
    "shard_batch",
    "shard_sequence",
    "unshard_sequence",
]

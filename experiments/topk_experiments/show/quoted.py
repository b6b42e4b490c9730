"""Numbers of the paper (Gupta et al. 2021), read off its figures (about +-0.02 GiB, +-0.01 s).

They were measured on a GPU, in float32, with dropout 0.1 (the chunk sizes without), and stand in pictures and tables
beside what was measured here, always as a quotation.
"""

from __future__ import annotations

from collections.abc import Sequence


def _curve(sizes: Sequence[int], gib: Sequence[float], seconds: Sequence[float]) -> dict[int, tuple[float, float]]:
    """size -> (GiB, seconds), for the first sizes: what the paper does not draw at its end is missing."""
    return dict(zip(sizes, zip(gib, seconds, strict=True), strict=False))


# L -> (GiB, seconds) of forward and backward: batch 1, 12 heads of 64, causal, query chunks of 1,024, k = 128, 256
# random features. What the paper does not draw is missing: no memory was left.
_LENGTHS = (2048, 4096, 6144, 8192, 10240, 16384, 32768, 61440)
ATTENTION_LAYER = {
    "vanilla": _curve(_LENGTHS, (1.07, 4.82, 10.74, 19.02, 29.65), (0.18, 0.22, 0.26, 0.30, 0.38)),
    "performer": _curve(
        _LENGTHS, (0.34, 0.67, 0.99, 1.32, 1.64, 2.61, 5.10, 9.51), (0.21, 0.22, 0.23, 0.24, 0.25, 0.30, 0.38, 0.56)
    ),
    "query-chunks": _curve(
        _LENGTHS, (0.86, 1.69, 2.54, 3.37, 4.31, 6.90, 14.52, 28.62), (0.20, 0.22, 0.28, 0.34, 0.42, 0.77, 2.58, 8.59)
    ),
    "topk": _curve(
        _LENGTHS, (0.24, 0.58, 0.75, 0.98, 1.17, 2.63, 5.15, 9.63), (0.18, 0.22, 0.27, 0.31, 0.37, 0.65, 2.01, 7.09)
    ),
}

# d_ff -> (GiB, seconds) of forward and backward: 262,144 tokens, d_model 768, chunks of 16,384 tokens, k = 512.
FEED_FORWARD_LAYER_TOKENS = 262144
_D_FFS = (2048, 6144, 16384, 32768, 65536)
FEED_FORWARD_LAYER = {
    "vanilla": _curve(_D_FFS, (9.27, 26.29), (0.46, 1.00)),
    "query-chunks": _curve(_D_FFS, (6.72, 7.32, 10.41, 17.26, 27.94), (0.67, 1.31, 2.96, 5.57, 10.76)),
    "topk": _curve(_D_FFS, (7.78, 8.04, 9.72, 9.57, 12.26), (0.66, 1.25, 2.72, 5.06, 9.86)),
    "topk-sparse": _curve(_D_FFS, (8.38, 8.42, 9.01, 11.35, 14.04), (3.34, 3.97, 5.61, 7.89, 11.30)),
}

# Query chunk -> (GiB, seconds) of the forward pass of query chunking without top-k, L = 65,536, no mask.
CHUNK_SIZE_LENGTH = 65536
CHUNK_SIZE = _curve((128, 256, 512, 1024, 2048), (2.27, 3.40, 6.02, 10.90, 20.65), (8.61, 5.25, 3.56, 2.73, 2.69))

# L -> (GiB, seconds) of one training step of a 12-layer model, on a GPU that the paper does not name: float32, dropout
# 0.1, 12 heads of 64, 3,072 neurons; queries in chunks of 1,024 and tokens of feed-forward layers in chunks of 4,096;
# top-k in attention alone, k = 64. Vanilla's only point was read by eye.
_MODEL_LENGTHS = (2048, 8192, 16384, 18432, 28672, 32768)
MODEL = {
    "vanilla": _curve(_MODEL_LENGTHS, (9.2,), (0.3,)),
    "performer": _curve(_MODEL_LENGTHS, (3.48, 12.62, 24.98, 28.09), (0.51, 1.02, 1.62, 1.80)),
    "query-chunks": _curve(_MODEL_LENGTHS, (1.85, 6.61, 14.36, 16.32, 28.47), (0.38, 2.15, 7.48, 9.36, 22.47)),
    "topk": _curve(_MODEL_LENGTHS, (1.40, 5.22, 11.17, 12.52, 23.30, 27.99), (0.44, 1.90, 6.00, 7.31, 16.78, 21.87)),
}
MODEL_NOTE = (
    "Quoted: Gupta et al. 2021, a 12-layer model, read off the figure; on a GPU, with dropout 0.1; feed-forward layers "
    "in token chunks, but for Performer's."
)

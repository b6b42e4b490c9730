"""Numbers of the paper (Gupta et al. 2021), read off its figures (about +-0.02 GiB, +-0.01 s).

They were measured on a GPU, in float32, with dropout 0.1 (the chunk sizes without), and stand in pictures and tables
beside what was measured here, always as a quotation.
"""

from __future__ import annotations

# L -> (GiB, seconds) of forward and backward: batch 1, 12 heads of 64, causal, query chunks of 1,024, k = 128, 256
# random features. What the paper does not draw is missing: no memory was left.
ATTENTION_LAYER = {
    "vanilla": {
        2048: (1.07, 0.18),
        4096: (4.82, 0.22),
        6144: (10.74, 0.26),
        8192: (19.02, 0.30),
        10240: (29.65, 0.38),
    },
    "performer": {
        2048: (0.34, 0.21),
        4096: (0.67, 0.22),
        6144: (0.99, 0.23),
        8192: (1.32, 0.24),
        10240: (1.64, 0.25),
        16384: (2.61, 0.30),
        32768: (5.10, 0.38),
        61440: (9.51, 0.56),
    },
    "query-chunks": {
        2048: (0.86, 0.20),
        4096: (1.69, 0.22),
        6144: (2.54, 0.28),
        8192: (3.37, 0.34),
        10240: (4.31, 0.42),
        16384: (6.90, 0.77),
        32768: (14.52, 2.58),
        61440: (28.62, 8.59),
    },
    "topk": {
        2048: (0.24, 0.18),
        4096: (0.58, 0.22),
        6144: (0.75, 0.27),
        8192: (0.98, 0.31),
        10240: (1.17, 0.37),
        16384: (2.63, 0.65),
        32768: (5.15, 2.01),
        61440: (9.63, 7.09),
    },
}

# d_ff -> (GiB, seconds) of forward and backward: 262,144 tokens, d_model 768, chunks of 16,384 tokens, k = 512.
FEED_FORWARD_LAYER_TOKENS = 262144
FEED_FORWARD_LAYER = {
    "vanilla": {2048: (9.27, 0.46), 6144: (26.29, 1.00)},
    "query-chunks": {
        2048: (6.72, 0.67),
        6144: (7.32, 1.31),
        16384: (10.41, 2.96),
        32768: (17.26, 5.57),
        65536: (27.94, 10.76),
    },
    "topk": {2048: (7.78, 0.66), 6144: (8.04, 1.25), 16384: (9.72, 2.72), 32768: (9.57, 5.06), 65536: (12.26, 9.86)},
    "topk-sparse": {
        2048: (8.38, 3.34),
        6144: (8.42, 3.97),
        16384: (9.01, 5.61),
        32768: (11.35, 7.89),
        65536: (14.04, 11.30),
    },
}

# Query chunk -> (GiB, seconds) of the forward pass of query chunking without top-k, L = 65,536, no mask.
CHUNK_SIZE_LENGTH = 65536
CHUNK_SIZE = {128: (2.27, 8.61), 256: (3.40, 5.25), 512: (6.02, 3.56), 1024: (10.90, 2.73), 2048: (20.65, 2.69)}

# L -> (GiB, seconds) of one training step of a 12-layer model, on a GPU that the paper does not name: float32, dropout
# 0.1, 12 heads of 64, 3,072 neurons; queries in chunks of 1,024 and tokens of feed-forward layers in chunks of 4,096;
# top-k in attention alone, k = 64. Vanilla's only point was read by eye.
MODEL = {
    "vanilla": {2048: (9.2, 0.3)},
    "performer": {2048: (3.48, 0.51), 8192: (12.62, 1.02), 16384: (24.98, 1.62), 18432: (28.09, 1.80)},
    "query-chunks": {
        2048: (1.85, 0.38),
        8192: (6.61, 2.15),
        16384: (14.36, 7.48),
        18432: (16.32, 9.36),
        28672: (28.47, 22.47),
    },
    "topk": {
        2048: (1.40, 0.44),
        8192: (5.22, 1.90),
        16384: (11.17, 6.00),
        18432: (12.52, 7.31),
        28672: (23.30, 16.78),
        32768: (27.99, 21.87),
    },
}
MODEL_NOTE = (
    "Quoted: Gupta et al. 2021, a 12-layer model, read off the figure; on a GPU, with dropout 0.1; feed-forward layers "
    "in token chunks, but for Performer's."
)

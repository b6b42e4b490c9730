"""What Gupta et al. 2021 measured of a 12-layer model, read off their figure (about +-0.02 GiB and +-0.01 s; vanilla's
only point by eye).

On a GPU that they do not name, float32, dropout 0.1, 12 heads of 64, 3,072 neurons; queries in chunks of 1,024 and
tokens of feed-forward layers in chunks of 4,096; top-k in attention alone, k = 64.
"""

from __future__ import annotations

# method -> length -> GiB
PEAK_GIB = {
    "vanilla": {2048: 9.2},
    "performer": {2048: 3.48, 8192: 12.62, 16384: 24.98, 18432: 28.09},
    "query-chunks": {2048: 1.85, 8192: 6.61, 16384: 14.36, 18432: 16.32, 28672: 28.47},
    "topk": {2048: 1.40, 8192: 5.22, 16384: 11.17, 18432: 12.52, 28672: 23.30, 32768: 27.99},
}
# method -> length -> seconds of a forward and backward pass
SECONDS = {
    "vanilla": {2048: 0.3},
    "performer": {2048: 0.51, 8192: 1.02, 16384: 1.62, 18432: 1.80},
    "query-chunks": {2048: 0.38, 8192: 2.15, 16384: 7.48, 18432: 9.36, 28672: 22.47},
    "topk": {2048: 0.44, 8192: 1.90, 16384: 6.00, 18432: 7.31, 28672: 16.78, 32768: 21.87},
}
NOTE = (
    "Quoted: Gupta et al. 2021, a 12-layer model, read off the figure; on a GPU, with dropout 0.1; feed-forward layers "
    "in token chunks, but for Performer's."
)

"""What is measured of a cache type: values with their errors, and the statistics of a KL divergence run."""

from __future__ import annotations

import msgspec


class Metric(msgspec.Struct, frozen=True):
    """A measured value and its standard error."""

    value: float
    error: float


class KldStats(msgspec.Struct, frozen=True):
    """Final statistics of ``llama-perplexity --kl-divergence``. KL divergence in nats, rates in percent."""

    mean: Metric
    median: Metric
    p90: Metric
    p99: Metric
    p999: Metric
    max: float
    same_top: Metric  # percent of tokens whose most probable next token is the same
    ppl: Metric
    ppl_base: Metric
    ln_ppl_ratio: Metric
    mean_dp: Metric  # change of the probability of the right token, percent
    rms_dp: Metric
    chunks: int
    tokens: int  # scored

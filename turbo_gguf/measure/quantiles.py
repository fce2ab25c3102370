"""The error of a quantile, from other quantiles of the same values."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist


def quantile_error(quantiles: dict[float, float], largest: float, p: float, n: int) -> float:
    """Estimate the standard error of the ``p`` quantile of ``n`` independent values.

    The rank of a quantile has the standard deviation sqrt(p (1-p) n); the error is half the distance between the values at the
    ranks one deviation below and above, read off the printed quantiles (straight lines of the logarithm over the normal score of
    p: exact for log-normal values, which KL divergences of tokens nearly are).
    """
    normal = NormalDist()
    known = {**quantiles, 1 - 0.5 / n: largest} if 1 - 0.5 / n > max(quantiles) else dict(quantiles)
    points = sorted((normal.inv_cdf(q), value) for q, value in known.items())
    spread = math.sqrt(p * (1 - p) / n)

    def at(q: float) -> float:
        x = normal.inv_cdf(min(max(q, 0.5 / n), 1 - 0.5 / n))
        x = min(max(x, points[0][0]), points[-1][0])
        for (x0, y0), (x1, y1) in pairwise(points):
            if x <= x1:
                t = (x - x0) / (x1 - x0)
                return y0 * (y1 / y0) ** t if y0 > 0 else y0 + (y1 - y0) * t
        return points[-1][1]

    return max(0.0, (at(p + spread) - at(p - spread)) / 2)

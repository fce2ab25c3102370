"""Temporal decay: the oldest tokens of a sequence lose one bit of each value of ``turbo3`` and ``turbo4``, in place.

Shares are percent of a sequence: hot and warm tokens stay whole, cold ones, the oldest, decay. It happens before the tokens of a
batch are stored, in steps of :data:`STEP` tokens, and saves no memory.
"""

from __future__ import annotations

import re

from turbo_gguf.cache.written import Written
from turbo_gguf.errors import UsageError


class DecayShares(Written):
    """Percent of a sequence, from its newest tokens to its oldest. What is cold loses one bit."""

    __slots__ = ("cold", "hot", "warm")

    def __init__(self, hot: int, warm: int, cold: int) -> None:
        self.hot, self.warm, self.cold = hot, warm, cold

    @classmethod
    def parse(cls, text: str) -> DecayShares:
        """Read a preset or three percentages.

        Raises:
            UsageError: it is neither, the percentages do not add up to 100, or nothing is cold.
        """
        if text in PRESETS:
            return PRESETS[text]
        match = re.fullmatch(r"([0-9]{1,3}),([0-9]{1,3}),([0-9]{1,3})", text)
        if match is None:
            raise UsageError(f"unknown decay {text!r}", _HINT)
        hot, warm, cold = map(int, match.groups())
        total = hot + warm + cold
        if total != 100:
            raise UsageError(f"decay {text}: the percentages add up to {total}, not to 100", _HINT)
        if not cold:
            raise UsageError(f"decay {text}: nothing is cold, so nothing decays", "leave decay out")
        return cls(hot, warm, cold)

    @property
    def percent(self) -> str:
        """``15,35,50``."""
        return f"{self.hot},{self.warm},{self.cold}"

    def __str__(self) -> str:
        """Name of the preset, or :attr:`percent`."""
        return next((name for name, preset in PRESETS.items() if preset.percent == self.percent), self.percent)


PRESETS: dict[str, DecayShares] = {
    "conservative": DecayShares(25, 40, 35),
    "balanced": DecayShares(15, 35, 50),
    "aggressive": DecayShares(5, 25, 70),
}

STEP = 32
"""The number of cold tokens is rounded down to a multiple of this."""

_HINT = f"decay is {', '.join(PRESETS)}, or HOT,WARM,COLD in percent of the tokens, newest first: 15,35,50"


def cells(ctx: int, batch: int, ubatch: int, cold: int) -> int:
    """Tokens that decay while a chunk is computed.

    Decay runs before each ubatch is stored, so the last one sees the others: the oldest ``cold`` percent of them have decayed then.

    Args:
        ctx: tokens of the chunk.
        batch: tokens of a ``llama_decode`` call.
        ubatch: tokens that it computes at a time.
        cold: percent.
    """
    last = ctx % batch or batch
    stored = ctx - (last % ubatch or ubatch)
    return stored * cold // 100 // STEP * STEP

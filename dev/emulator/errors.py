"""What the emulator ends with. Each message names the kernel and the instruction once :mod:`machine` has added them."""

from __future__ import annotations


class EmulatorError(Exception):
    """Base of all of them."""


class Unsupported(EmulatorError):
    """An instruction, operand or kernel property that the emulator does not know."""


class OutOfBounds(EmulatorError):
    """A lane accessed memory that is not part of an allocation, of the block's LDS or of the lane's scratch."""


class Race(EmulatorError):
    """Waves of one block touched the same LDS address, one of them writing, with no barrier between."""


class BadBarrier(EmulatorError):
    """Waves of one block wait at different barriers."""


class BadOperand(EmulatorError):
    """An operand breaks a rule of the instruction (a WMMA operand that is not the same in both halves of the wave)."""

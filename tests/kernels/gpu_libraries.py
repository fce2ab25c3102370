"""Compiles what the tests without a GPU load: the HIP backend for the emulator, and the Vulkan backend for Mesa's driver for CPUs.

They would do so at first use. Where nothing is in the cache that takes half an hour of two cores, which is why continuous integration
starts this beside other tests, with what these leave of the cores.
"""

from __future__ import annotations

import emulated_tools
import lavapipe_tools


def main() -> None:
    """Compile one after the other."""
    emulated_tools.runtime()
    emulated_tools.build()
    lavapipe_tools.library()


if __name__ == "__main__":
    main()

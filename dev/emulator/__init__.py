"""An emulator of gfx1100 (RDNA3, waves of 32 lanes) in numpy, and a stand-in for the HIP runtime that runs libggml-hip.so on it.

All waves of a grid that stand at the same instruction execute it together, as one numpy operation over ``(waves, 32)``. See
``README.md`` beside this file for what is checked and what is not covered.
"""

"""Folding a calibration and the rotation of V into the weights of a model: ``docs/guides/fuse.md``."""

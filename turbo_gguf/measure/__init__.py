"""Runs of llama.cpp's tools, checked and kept: KL divergence and speed."""

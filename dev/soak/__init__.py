"""Hours of mixed and hostile traffic on the patched llama-server: make soak."""

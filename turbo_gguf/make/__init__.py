"""From a llama.cpp snapshot to a build: sources, presets, toolkits, compiling."""

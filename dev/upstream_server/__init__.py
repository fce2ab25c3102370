"""Upstream's own server tests on the patched llama-server, with a cache type for all of them and models that are made here.

``python -m upstream_server`` (``make test-server``) runs them; ``README.md`` beside this file says what is mapped to what.
"""

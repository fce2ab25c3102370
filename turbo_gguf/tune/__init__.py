"""The search for the KV cache of least loss under a budget: types by layer and side, calibration, exact tokens."""

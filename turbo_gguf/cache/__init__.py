"""What a KV cache is asked to be: types, settings, layers, decay, calibration."""

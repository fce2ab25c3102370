"""From what Q, K and V look like to a calibration."""

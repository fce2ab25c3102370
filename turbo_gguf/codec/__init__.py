"""The turbo formats in Python: constants, numpy reference, C oracle through ctypes, and the header generator."""

"""The mathematics of SPCT: pure functions from arrays to arrays. No model, config, file or log is
known here."""

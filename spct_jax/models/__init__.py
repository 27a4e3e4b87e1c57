"""Decoder-only language models: blocks, the loop over them, the cache, and the scalar reward head."""

"""SAEs, transcoders and crosscoders of every format: loading, encoding, decoding, measuring."""

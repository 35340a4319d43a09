"""fable's dictionaries: SAEs, transcoders, a crosscoder and a cross-layer transcoder, with their trainer."""

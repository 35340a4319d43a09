"""The Glasshouse server: language models behind glass, over gRPC."""

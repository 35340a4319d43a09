"""One file per proto service, and the conversions between protobuf messages and types: nothing else."""

"""The gRPC server around the services: statuses, keys, limits, deadlines, logs, metrics, health, draining."""

"""What outlives a request: named, versioned directions, probes, monitors and feature labels, and where they came from."""

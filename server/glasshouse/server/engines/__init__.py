"""What computes: one interface, an engine per way of running a model."""

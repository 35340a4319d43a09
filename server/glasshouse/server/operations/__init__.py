"""Long work: queued, with progress, cancelled on request, its result kept for a while."""

"""Why did the model say that: metrics, patch grids, what attribution calls return, and attribution graphs."""

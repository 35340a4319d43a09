"""Why a model said what it said: gradients, patches, circuits and attribution graphs on a served model."""

"""Hook points on a live model: resolving their names, and attaching callbacks that read and edit in place."""

"""Programs that a run starts as processes of their own, because of what they import."""

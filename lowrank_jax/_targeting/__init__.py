"""Selection of leaves: patterns, configurations, plans, and the targets they resolve to."""

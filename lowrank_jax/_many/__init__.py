"""Many adapters of one model: stacks, blends, compression, extraction, pools."""

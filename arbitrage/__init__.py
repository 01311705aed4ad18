"""Step-level speculative reasoning, routed by predicted advantage."""

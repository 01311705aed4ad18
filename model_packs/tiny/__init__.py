"""Makes the `tiny` model pack: draft, target, process reward model and router, from scratch."""

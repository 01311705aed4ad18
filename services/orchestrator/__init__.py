"""The orchestrator: runs the loop for its callers over the model services."""

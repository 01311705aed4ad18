"""The PRM service: scores steps."""

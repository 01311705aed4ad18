"""The router service: judges draft steps."""

"""The `arbitrage` command."""

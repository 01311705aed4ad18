"""The version of this code, as it was installed."""

from importlib.metadata import version

VERSION = version("arbitrage")

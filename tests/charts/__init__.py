"""Tests of the Helm chart: they render it with a real Helm, and need no cluster."""

"""What `make check` runs beside linters and tests."""

"""Real servers of models, installed for these tests, behind our services."""

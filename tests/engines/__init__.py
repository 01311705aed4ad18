"""Real servers of language models, installed for these tests, behind our generator."""

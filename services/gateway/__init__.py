"""HTTP in front of orchestrators: the OpenAI API."""

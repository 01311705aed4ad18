"""The processes of the product, and what they share."""

"""What the product does with inputs that nobody would write, and with more than it can take."""

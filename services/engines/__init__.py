"""What runs a model, each kind behind one small Protocol."""

"""The algorithm: step-level speculation routed by advantage. It knows no transport and no model."""

"""The generator service: writes steps. Deployed as the draft and as the target."""

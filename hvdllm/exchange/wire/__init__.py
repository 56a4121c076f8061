"""How a sum travels: one file a wire."""

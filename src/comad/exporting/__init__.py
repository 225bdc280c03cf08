"""How a backbone leaves: a folder that loads elsewhere without comad."""

"""Train a network, resume, export."""

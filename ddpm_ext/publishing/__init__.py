"""Model cards, and runs on the Hub."""

"""The command `ddpm-ext` and its command lines."""

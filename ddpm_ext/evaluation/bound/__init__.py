"""The bound of Eq. (5): bits/dim of real images, and the network's errors at every step."""

__all__: list[str] = []

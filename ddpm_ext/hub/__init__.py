"""Files between this machine and the Hub: retried, checked, told in sentences."""

__all__: list[str] = []

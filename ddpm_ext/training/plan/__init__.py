"""What a run is and takes, said before it is made."""

__all__: list[str] = []

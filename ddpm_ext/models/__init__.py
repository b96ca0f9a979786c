"""The papers' networks as UNet2DModel."""

__all__: list[str] = []

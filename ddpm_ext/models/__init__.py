"""The networks of the papers as UNet2DModel."""

"""From noise to images with a UNet2DModel."""

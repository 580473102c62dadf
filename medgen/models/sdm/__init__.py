"""The semantic diffusion model: images from label maps, whose middle and decoder see the map at every layer."""

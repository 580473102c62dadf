"""The flow transformer: images, or latents of them, from captions and masks, by a Next-DiT that learns a velocity."""

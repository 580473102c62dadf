"""DP-WGAN-GP: images from a generator that may be given away, because what it learnt of any one patient is bounded."""

"""The denoising engine: requests in, committed text and trajectories out. Knows no Ray and no HTTP."""

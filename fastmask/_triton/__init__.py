"""What Triton kernels of several ops share, and the proof of what they compile to. Imports nothing itself."""

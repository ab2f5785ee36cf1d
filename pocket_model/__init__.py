"""The embedded model: a small, trained Qwen-Image-Edit and everything it was made with."""

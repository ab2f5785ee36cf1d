"""The parts of the five steps: pictures, prompts, noise levels, denoising, LoRAs, and where weights go."""
